"""Models of other packages, found through the entry point group."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from octavo.config import ModelConfig
from octavo.errors import UnsupportedModel
from octavo.hub.configs import model_config
from octavo.hub.patches import normalise
from octavo.models import registry
from tools import tiny

MODULE = """
from octavo.models.llama import LlamaForCausalLM

class Mine(LlamaForCausalLM):
    pass
"""


def config(architecture: str) -> ModelConfig:
    return model_config({**normalise(tiny.config("llama"))[0], "architectures": [architecture]})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package ``octavo-mine`` with a model for an architecture of its own and for a native one."""
    info = tmp_path / "octavo_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: octavo-mine\nVersion: 1.0\n")
    lines = [f"{name} = octavo_mine:Mine" for name in ("MineForCausalLM", "Qwen2ForCausalLM")]
    (info / "entry_points.txt").write_text("\n".join(["[octavo.models]", *lines, "BadForCausalLM = octavo_mine:No"]))
    (tmp_path / "octavo_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("architecture", ["MineForCausalLM", "Qwen2ForCausalLM"])
def test_a_package_brings_a_model_which_goes_before_the_native_one(package: Path, architecture: str) -> None:
    model, reason = registry.choose(config(architecture))
    assert model.__name__ == "Mine"
    assert "octavo-mine" in reason


def test_finding_a_model_does_not_import_the_package(package: Path) -> None:
    sys.modules.pop("octavo_mine", None)
    address, _ = registry.find(config("MineForCausalLM"))
    assert address == "octavo_mine:Mine"
    assert "octavo_mine" not in sys.modules


def test_a_broken_package_is_named(package: Path) -> None:
    with pytest.raises(UnsupportedModel, match="octavo-mine") as caught:
        registry.choose(config("BadForCausalLM"))
    assert caught.value.id == "HF030"


def test_code_in_the_repo_is_mentioned_where_it_would_have_been_the_way() -> None:
    hf = {**normalise(tiny.config("llama"))[0], "architectures": ["NoSuchForCausalLM"]}
    with pytest.raises(UnsupportedModel) as caught:
        registry.find(model_config({**hf, "auto_map": {"AutoModel": "a.B"}}))
    assert "Python code" in caught.value.cause
    with pytest.raises(UnsupportedModel) as caught:
        registry.find(model_config(hf))
    assert "Python code" not in caught.value.cause
