"""What the documentation says about the code is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ERROR_ID = re.compile(r"\b(?:OCT|REQ|CFG|HF|MEM|ENG)\d{3}\b")


def test_the_catalogue_of_errors_lists_exactly_the_ids_in_use() -> None:
    used = {
        id
        for path in (ROOT / "src").rglob("*.py")
        for quoted in re.findall(r'"([A-Z]+\d{3})"', path.read_text(encoding="utf-8"))
        for id in ERROR_ID.findall(quoted)
    }
    listed = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert used == listed


def test_links_between_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_paths_of_source_files_named_in_the_documents_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"`((?:src|tools|tests|bench|csrc)/[\w./]+\.\w+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
