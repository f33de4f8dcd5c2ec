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


def said(pattern: str) -> list[tuple[Path, str]]:
    """What ``pattern`` finds in the documents, each with its page."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return [(page, found) for page in pages for found in re.findall(pattern, page.read_text(encoding="utf-8"))]


def test_links_between_the_documents_lead_somewhere() -> None:
    links = said(r"\]\(([^)#:]+)\)")
    assert links
    assert [f"{page.name} links to {target}" for page, target in links if not (page.parent / target).exists()] == []


def test_paths_of_source_files_named_in_the_documents_exist() -> None:
    paths = said(r"`((?:src|tools|tests|bench|csrc)/[\w./]+\.\w+)`")
    assert paths
    assert [f"{page.name} names {path}" for page, path in paths if not (ROOT / path).exists()] == []
