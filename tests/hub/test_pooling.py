"""Which models embed and how, from options, sentence-transformers' files and the architecture's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.errors import ConfigError, ModelError, RequestError, UnsupportedModel
from octavo.hub.configs import read_hf_dict
from octavo.hub.pooling import Pooler, causal, pooler_of
from octavo.hub.source import Source, wanted_files
from octavo.types import Pooling
from tests.gguf_files import tiny_metadata, tiny_tensors, write_gguf

QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64}
BARE = {**QWEN, "architectures": ["Qwen3Model"]}
ST = "sentence_transformers.models."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, *kinds: str, **settings: Any) -> None:
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": ST + kind} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def found(folder: Path, hf: dict[str, Any] = QWEN, **options: Any) -> Pooler | None:
    source = Source("m", "folder", folder, None, "")
    return pooler_of(hf, source, EngineConfig.of(model="m", **options).model)


def pooler(folder: Path, hf: dict[str, Any] = QWEN, **options: Any) -> Pooler:
    made = found(folder, hf, **options)
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("hf", "options", "embeds"),
    [
        (QWEN, {}, False),
        (QWEN, {"runner": "generate"}, False),
        (QWEN, {"runner": "pooling"}, True),
        (QWEN, {"convert": "embed"}, True),
        (BARE, {}, True),
        (BARE, {"runner": "generate"}, False),
        (BARE, {"convert": "none"}, False),
        ({**BARE, "architectures": ["GPT2LMHeadModel"]}, {}, False),
        ({**BARE, "auto_map": {"AutoModelForCausalLM": "modeling.Qwen3Model"}}, {}, False),
    ],
)
def test_options_come_before_the_name_of_the_architecture(
    folder: Path, hf: dict[str, Any], options: dict[str, Any], embeds: bool
) -> None:
    assert (found(folder, hf, **options) is not None) is embeds


def test_a_pooling_module_makes_a_model_embed_unless_it_is_asked_to_generate(folder: Path) -> None:
    write(folder, "Transformer", "Pooling", "Normalize", pooling_mode_lasttoken=True)
    assert pooler(folder).kind == "last"
    assert found(folder, runner="generate") is None
    write(folder, "Transformer")
    assert found(folder) is None


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"word_embedding_dimension": 64}, "last"),
    ],
)
def test_the_kind_of_pooling_is_that_of_the_module(folder: Path, settings: dict[str, Any], kind: str) -> None:
    write(folder, "Transformer", "Pooling", **settings)
    assert pooler(folder).kind == kind
    assert not pooler(folder).normalize
    write(folder, "Transformer", "Pooling", "Normalize", **settings)
    assert pooler(folder).normalize


@pytest.mark.parametrize(("number", "kind"), [(1, "mean"), (2, "cls"), (3, "last")])
def test_a_gguf_file_may_name_a_pooling(folder: Path, number: int, kind: str) -> None:
    path = write_gguf(folder / "m.gguf", tiny_tensors(), tiny_metadata(pooling_type=number))
    hf = read_hf_dict(Source("m", "gguf", path, None, ""))
    assert (pooler(folder, hf).kind, pooler(folder, hf).normalize) == (kind, True)
    assert found(folder, {**hf, "gguf_pooling": 0}) is None
    with pytest.raises(UnsupportedModel, match="a pooling that octavo does not have"):
        found(folder, {**hf, "gguf_pooling": 4})


def test_options_of_pooling_come_before_the_files(folder: Path) -> None:
    write(folder, "Transformer", "Pooling", "Normalize", pooling_mode_max_tokens=True)
    with pytest.raises(UnsupportedModel, match="--pooler-config"):
        found(folder)
    made = pooler(folder, pooler_config={"pooling_type": "MEAN", "normalize": False})
    assert (made.kind, made.normalize) == ("mean", False)
    made = pooler(folder, pooler_config={"seq_pooling_type": "CLS", "use_activation": None})
    assert (made.kind, made.normalize) == ("cls", True)


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_type": "ALL"},
        {"pooling_type": 1},
        {"step_tag_id": 5},
        {"use_activation": "yes"},
        {"dimensions": 0},
        {"dimensions": True},
    ],
)
def test_options_of_pooling_that_mean_nothing_are_refused(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        found(folder, runner="pooling", pooler_config=settings)


def test_options_at_odds_are_refused(folder: Path) -> None:
    for options in (
        {"runner": "generate", "convert": "embed"},
        {"runner": "pooling", "convert": "none"},
        {"pooler_config": {"pooling_type": "LAST"}},
    ):
        with pytest.raises(ConfigError):
            found(folder, **options)


@pytest.mark.parametrize(
    ("hf", "said"),
    [
        ({"architectures": ["BertModel"], "model_type": "bert"}, "both directions"),
        ({**QWEN, "is_causal": False}, "both directions"),
        ({**BARE, "use_bidirectional_attention": True}, "both directions"),
        ({**QWEN, "architectures": ["Qwen3ForSequenceClassification"]}, "classifies"),
    ],
)
def test_models_that_are_no_decoders_are_refused(folder: Path, hf: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        found(folder, hf, runner="pooling")


def test_modules_that_octavo_lacks_are_refused_by_name(folder: Path) -> None:
    write(folder, "Transformer", "Pooling", "Dense", pooling_mode_lasttoken=True)
    with pytest.raises(UnsupportedModel, match="a module Dense"):
        found(folder)


@pytest.mark.parametrize("text", ["{", "{}", "[1]"])
def test_broken_files_are_named(folder: Path, text: str) -> None:
    (folder / "modules.json").write_text(text)
    with pytest.raises(ModelError, match=r"modules\.json"):
        found(folder)


def test_the_file_of_a_pooling_module_must_be_there_and_inside_of_the_folder(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    for path in ("1_Pooling", "..", str(folder)):
        (folder / "model" / "modules.json").write_text(json.dumps([{"type": ST + "Pooling", "path": path}]))
        with pytest.raises(ModelError, match="has no"):
            found(folder / "model")


def test_the_files_of_pooling_are_downloaded_with_the_small_ones() -> None:
    names = ["config.json", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "onnx/config.json"]
    assert set(wanted_files(names, weights=False)) == {"config.json", "modules.json", "1_Pooling/config.json"}


def test_an_architecture_without_a_head_becomes_the_one_with_a_head() -> None:
    names = {"Qwen3Model": "Qwen3ForCausalLM", "GPT2Model": "GPT2LMHeadModel", "GPT2LMHeadModel": "GPT2LMHeadModel"}
    for name, wanted in (names | {"LlamaForCausalLM": "LlamaForCausalLM"}).items():
        assert causal({"architectures": [name]})["architectures"] == [wanted]


def test_an_embedding_may_be_cut_only_where_the_model_was_trained_for_it(folder: Path) -> None:
    plain = pooler(folder, runner="pooling")
    assert plain.pooling(None, None) == Pooling("last")
    assert plain.pooling(None, False) == Pooling("last", normalize=False)
    with pytest.raises(RequestError, match="is_matryoshka"):
        plain.pooling(32, None)
    any_size = pooler(folder, {**QWEN, "is_matryoshka": True}, runner="pooling", pooler_config={"dimensions": 16})
    assert any_size.pooling(None, None) == Pooling("last", 16)
    assert any_size.pooling(64, None) == Pooling("last", 64)
    for wrong in (0, 65):
        with pytest.raises(RequestError, match="1 to 64"):
            any_size.pooling(wrong, None)
    some = pooler(folder, {**QWEN, "matryoshka_dimensions": [32, 64]}, runner="pooling")
    with pytest.raises(RequestError, match="32, 64"):
        some.pooling(16, None)
