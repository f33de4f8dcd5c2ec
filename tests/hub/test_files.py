"""Config, generation config and tokenizer from elsewhere than the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.errors import ModelError
from octavo.hub.configs import model_config
from octavo.hub.files import ModelFiles, find_files
from tests.gguf_files import tiny_metadata, tiny_tensors, write_gguf
from tools import tiny


def files(model: Path, **options: Any) -> ModelFiles:
    return find_files(EngineConfig.of(model=str(model), **options).model, weights=False)


def folder(path: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny.config(**config)))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    tiny.tokenizer(path)
    return path


def ends(found: ModelFiles) -> tuple[int, ...]:
    return model_config(found.hf_dict(), generation=found.generation).eos_ids


def test_auto_takes_the_models_own_generation_config(tmp_path: Path) -> None:
    found = files(folder(tmp_path / "m", {"temperature": 0.3, "eos_token_id": [7]}))
    assert found.sampling_defaults() == {"temperature": 0.3}
    assert ends(found) == (7, tiny.EOS)


def test_vllm_ignores_its_sampling_but_not_the_ends_of_a_text(tmp_path: Path) -> None:
    found = files(folder(tmp_path / "m", {"temperature": 0.3, "eos_token_id": [7]}), generation_config="vllm")
    assert found.sampling_defaults() == {}
    assert ends(found) == (7, tiny.EOS)


def test_a_folder_brings_sampling_and_ends(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", {"temperature": 0.3, "eos_token_id": [7]})
    other = folder(tmp_path / "o", {"top_p": 0.5, "eos_token_id": [9]})
    found = files(model, generation_config=str(other))
    assert found.sampling_defaults() == {"top_p": 0.5}
    assert ends(found) == (9, tiny.EOS)


@pytest.mark.parametrize(
    ("source", "defaults"), [("auto", {"temperature": 0.9, "top_k": 5}), ("vllm", {"temperature": 0.9})]
)
def test_overrides_are_merged_over_the_defaults(source: str, defaults: dict[str, Any], tmp_path: Path) -> None:
    model = folder(tmp_path / "m", {"temperature": 0.3, "top_k": 5})
    found = files(model, generation_config=source, override_generation_config={"temperature": 0.9})
    assert found.sampling_defaults() == defaults


def test_a_bad_override_is_an_error(tmp_path: Path) -> None:
    found = files(folder(tmp_path / "m"), override_generation_config={"temperature": -1})
    with pytest.raises(ModelError) as caught:
        found.sampling_defaults()
    assert caught.value.id == "HF002"


def test_config_from_elsewhere_describes_the_weights(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "m.gguf", tiny_tensors(), tiny_metadata())
    other = folder(tmp_path / "o", {"temperature": 0.3}, hidden_size=128)
    found = files(gguf, hf_config_path=str(other))
    assert found.hf_dict()["hidden_size"] == 128
    assert found.sampling_defaults() == {"temperature": 0.3}
    assert (found.weights.path, found.tokenizer().path) == (gguf, gguf)


def test_a_tokenizer_may_come_from_elsewhere(tmp_path: Path) -> None:
    model, other = folder(tmp_path / "m"), folder(tmp_path / "o")
    assert files(model, tokenizer=str(other)).tokenizer().path == other
