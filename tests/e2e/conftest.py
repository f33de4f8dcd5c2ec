"""What several files here serve: a folder with a tokenizer and a config, for engines without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the stub worker; files whose engines compute have a `model` of their own."""
    folder = tmp_path_factory.mktemp("model") / "stub"
    tiny.tokenizer(folder)
    tiny.write_json(folder / "config.json", tiny.config())
    return folder
