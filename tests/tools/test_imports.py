"""The check of import directions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import imports


def problems(tmp_path: Path, module: str, text: str) -> list[str]:
    path = tmp_path / "src" / "octavo" / module
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    return imports.check(tmp_path / "src" / "octavo")


def test_the_project_obeys_its_own_rule() -> None:
    assert imports.check() == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("cache/a.py", "import torch"),
        ("sched/a.py", "def f():\n    import torch.nn"),
        ("hub/a.py", "from torch import Tensor"),
        ("types.py", "def f():\n    from torch import nn"),
        ("cli.py", "import torch"),
        ("__init__.py", "from torch import nn"),
        ("cache/a.py", "from octavo.sched import scheduler"),
        ("kernels/a.py", "from octavo.layers.linear import Linear"),
        ("kernels/a.py", "from ..layers import linear"),
        ("frontend/a.py", "from octavo.cache.pages import PagePool"),
        ("frontend/a.py", "from octavo.core import engine"),
        ("server/a.py", "import octavo.core.engine"),
        ("errors.py", "from octavo.cache import pages"),
        ("new_folder/a.py", "from octavo.cache import pages"),
    ],
)
def test_an_import_against_the_rule_is_found(tmp_path: Path, module: str, text: str) -> None:
    found = problems(tmp_path, module, text)
    assert len(found) == 1
    assert module in found[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("runtime/a.py", "import torch\nfrom octavo.models.registry import choose\nfrom octavo.hub import resolve"),
        ("frontend/a.py", "from octavo.cache.prefix import page_hashes\nfrom octavo.hub.tokenizer import Tokenizer"),
        ("server/a.py", "from octavo.frontend.client import EngineClient\nfrom octavo.types import Request"),
        ("cli.py", "def f():\n    import torch"),
        ("llm.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("llm.py", "from octavo.core.engine import EngineCore\nfrom octavo.frontend.inputs import InputProcessor"),
    ],
)
def test_an_import_within_the_rule_passes(tmp_path: Path, module: str, text: str) -> None:
    assert problems(tmp_path, module, text) == []
