from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.config import ModelConfig
from octavo.errors import ConfigError, ModelError
from octavo.hub import configs
from octavo.hub.patches import normalise
from octavo.hub.source import Source
from tools import tiny


def read(folder: Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    return configs.read_hf_dict(Source("m", "folder", folder, None, ""), overrides)


def build(hf: dict[str, Any], **kwargs: Any) -> ModelConfig:
    return configs.model_config(normalise(hf)[0], **kwargs)


def written(tmp_path: Path, value: Any) -> Path:
    (tmp_path / "config.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return tmp_path


# --- against Transformers ---------------------------------------------------------------------------------------------


def transformers_view(hf: dict[str, Any]) -> dict[str, Any]:
    """What Transformers makes of ``hf``, in our terms; the masks' own rules for windows (see the modelling files)."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**hf)
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    rotated = getattr(config, "no_rope_layers", None) or [1] * count
    rope = config.rope_parameters
    eos = config.eos_token_id
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "hidden_act": config.hidden_act,
        "tie": config.tie_word_embeddings,
        "heads": [config.num_attention_heads] * count,
        "kv_heads": [config.num_key_value_heads] * count,
        "head_dim": [getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads] * count,
        "window": [window if kind == "sliding_attention" else None for kind in kinds],
        "rope": [(rope["rope_type"], rope["rope_theta"]) if flag else None for flag in rotated],
        "original": rope.get("original_max_position_embeddings"),
        "max_position": config.max_position_embeddings,
        "eos": () if eos is None else (eos,),
    }


def our_view(config: ModelConfig) -> dict[str, Any]:
    layers = config.layers
    spec = next(layer.rope for layer in layers if layer.rope)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "norm_eps": config.norm_eps,
        "hidden_act": config.hidden_act,
        "tie": config.tie_embeddings,
        "heads": [layer.heads for layer in layers],
        "kv_heads": [layer.kv_heads for layer in layers],
        "head_dim": [layer.head_dim for layer in layers],
        "window": [layer.window for layer in layers],
        "rope": [(layer.rope.kind, layer.rope.theta) if layer.rope else None for layer in layers],
        "original": spec.params.get("original_max_position_embeddings"),
        "max_position": spec.max_position,
        "eos": config.eos_ids,
    }


VARIANTS = {
    **{family: tiny.config(family) for family in tiny.FAMILIES},
    **{f"llama-{rope}": tiny.config("llama", rope=rope) for rope in tiny.ROPES},
    "mistral-no-window": tiny.config("mistral", sliding_window=None),
    "qwen2-window-off": tiny.config("qwen2", sliding_window=8, max_window_layers=1),
    "qwen2-window-above": tiny.config("qwen2", sliding_window=8, max_window_layers=1, use_sliding_window=True),
    "qwen3-window-types": tiny.config(
        "qwen3",
        sliding_window=8,
        use_sliding_window=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "smollm3-window": tiny.config("smollm3", sliding_window=8, use_sliding_window=True),
    "smollm3-interval": {
        k: v for k, v in tiny.config("smollm3", no_rope_layer_interval=2).items() if k != "no_rope_layers"
    },
    "llama-null-kv-heads": tiny.config("llama", num_key_value_heads=None),
    "llama-head-dim": tiny.config("llama", head_dim=24),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_config_agrees_with_transformers(name: str) -> None:
    assert our_view(build(VARIANTS[name])) == transformers_view(VARIANTS[name])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keys_left_out_get_the_class_defaults_of_transformers(family: str) -> None:
    hf = {**tiny.config(family), "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 1024}
    kept = {"model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"}
    kept |= {"num_hidden_layers"}
    for key in sorted(set(hf) - kept):
        less = {k: v for k, v in hf.items() if k != key}
        assert our_view(build(less)) == transformers_view(less), f"without {key}"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_config_written_by_transformers_is_read_back(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(**tiny.config(family)).save_pretrained(tmp_path)
    assert our_view(configs.model_config(read(tmp_path))) == transformers_view(tiny.config(family))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_folder_without_config_names_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError) as error:
        read(tmp_path)
    assert error.value.id == "HF002"
    assert "config.json" in error.value.cause
    assert "weights.bin" in error.value.cause


def test_a_config_that_is_no_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("gone")
    with pytest.raises(ModelError, match=r"config\.json is a link to a file that is gone"):
        read(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json is no file"):
        read(tmp_path)


def test_a_folder_of_gguf_files_is_told_to_name_one(tmp_path: Path) -> None:
    for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError) as error:
        read(tmp_path)
    assert f"{tmp_path}/m-Q4_K_M.gguf" in error.value.remedy


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(tiny.config()))
    assert read(tmp_path)["hidden_size"] == 64


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "", "\x00", "[" * 100_000])
def test_broken_config_is_an_error_with_its_path(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        read(written(tmp_path, text))
    assert error.value.id == "HF002"
    assert str(tmp_path) in error.value.cause


def test_config_without_architectures_and_with_unknown_type_is_refused() -> None:
    hf = {k: v for k, v in tiny.config("llama", model_type="nonesuch").items() if k != "architectures"}
    with pytest.raises(ModelError) as error:
        build(hf)
    assert error.value.id == "HF012"
    assert "nonesuch" in error.value.cause


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", -64),
        ("hidden_size", "64"),
        ("hidden_size", 65),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", True),
        ("num_key_value_heads", 3),
        ("vocab_size", 1.5),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", 10**400),
        ("layer_types", ["full_attention"]),
        ("no_rope_layers", [1]),
        ("max_position_embeddings", 0),
    ],
)
def test_bad_value_is_an_error_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(ModelError) as error:
        build(tiny.config("smollm3", **{key: value}))  # which reads all of them
    assert error.value.id == "HF002"
    assert key.removeprefix("rms_") in error.value.cause


# --- overrides --------------------------------------------------------------------------------------------------------


def test_rope_override_replaces_scaling_and_keeps_theta(tmp_path: Path) -> None:
    hf = tiny.config("llama", rope="llama3", rope_parameters={**tiny.ROPES["llama3"], "rope_theta": 5e5})
    out = read(written(tmp_path, hf), {"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert out["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert "rope_scaling" not in out


def test_theta_override_reaches_the_rope_dict(tmp_path: Path) -> None:
    out = read(written(tmp_path, tiny.config("llama")), {"rope_theta": 1e6})
    assert out["rope_parameters"]["rope_theta"] == 1e6


def test_null_rope_override_takes_the_scaling_away(tmp_path: Path) -> None:
    hf = tiny.config("llama", rope_parameters={**tiny.ROPES["yarn"], "rope_theta": 5e5})
    out = read(written(tmp_path, hf), {"rope_scaling": None})
    assert out["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}


def test_override_mends_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    hf = tiny.config("llama", rope_parameters={"rope_type": "linear", "type": "yarn"}, rope_theta=7.0)
    with pytest.raises(ModelError):
        read(written(tmp_path, hf))
    out = read(tmp_path, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}})
    assert out["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}


def test_rope_of_a_language_part_is_overridden_in_it(tmp_path: Path) -> None:
    hf = {"model_type": "x", "architectures": ["X"], "llm_config": tiny.config("llama", rope="llama3")}
    out = read(written(tmp_path, hf), {"text_config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}})
    assert out["text_config"]["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    assert "llm_config" not in out


def test_override_of_a_text_config_is_merged_into_it(tmp_path: Path) -> None:
    hf = {"model_type": "x", "architectures": ["X"], "text_config": tiny.config("llama")}
    out = read(written(tmp_path, hf), {"text_config": {"num_hidden_layers": 1}})
    assert out["text_config"]["num_hidden_layers"] == 1
    assert out["text_config"]["hidden_size"] == 64
    assert len(configs.model_config(out).layers) == 1


def test_what_a_function_sets_in_the_config_becomes_overrides(tmp_path: Path) -> None:
    inner = {"hidden_size": 64, "rope_theta": 1e4}
    folder = written(tmp_path, {"model_type": "m", "llm_config": inner, "vocab_size": 5, "use_cache": True})

    def change(hf: dict[str, Any]) -> dict[str, Any]:
        assert hf["vocab_size"] == 5
        hf["text_config"]["hidden_size"] = 32
        return hf | {"vocab_size": None, "new": 1}

    found = configs.overrides_by(change, Source("m", "folder", folder, None, ""))
    assert found == {"text_config": {"hidden_size": 32, "rope_theta": 1e4}, "vocab_size": None, "new": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hf: hf.clear(), "returned NoneType"),
        (lambda hf: {k: v for k, v in hf.items() if k != "vocab_size"}, "removed vocab_size"),
        (lambda hf: hf | {"text_config": {}}, "removed text_config.hidden_size"),
    ],
)
def test_a_function_that_loses_parts_of_the_config_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    folder = written(tmp_path, {"model_type": "m", "text_config": {"hidden_size": 64}, "vocab_size": 5})
    with pytest.raises(ConfigError, match=said) as caught:
        configs.overrides_by(change, Source("m", "folder", folder, None, ""))
    assert caught.value.remedy


def test_unknown_override_is_merged_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = read(written(tmp_path, tiny.config("llama")), {"hiden_size": 32, "sliding_window": 4})
    assert out["hiden_size"] == 32
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "hiden_size" in warned[0]


def test_override_of_architectures_makes_an_unknown_type_readable(tmp_path: Path) -> None:
    hf = {k: v for k, v in tiny.config("llama", model_type="nonesuch").items() if k != "architectures"}
    out = read(written(tmp_path, hf), {"architectures": ["LlamaForCausalLM"]})
    assert configs.model_config(out).architecture == "LlamaForCausalLM"


# --- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written_dtype", "wanted", "device", "got"),
    [
        ("bfloat16", "auto", "cpu", "bfloat16"),
        ("float16", "auto", "cuda", "float16"),
        ("float32", "auto", "cpu", "float32"),
        ("float32", "auto", "cuda", "bfloat16"),
        (None, "auto", "cpu", "float32"),
        (None, "auto", "cuda", "bfloat16"),
        ("float8_e4m3fn", "auto", "cpu", "bfloat16"),
        ("float32", "half", "cuda", "float16"),
        ("bfloat16", "float", "cpu", "float32"),
    ],
)
def test_the_dtype_is_the_one_asked_for_or_suits_file_and_device(
    written_dtype: str | None, wanted: str, device: str, got: str
) -> None:
    config = build(tiny.config("llama", dtype=written_dtype), dtype=wanted, device=device)
    assert config.dtype == got
    assert config.dtype_reason


@pytest.mark.parametrize(
    ("written_dtype", "fast", "got"),
    [(None, True, "bfloat16"), (None, False, "float32"), ("float32", True, "float32")],
)
def test_weights_without_a_type_run_in_bfloat16_where_a_cpu_has_instructions_for_it(
    written_dtype: str | None, fast: bool, got: str
) -> None:
    config = build(tiny.config("llama", dtype=written_dtype), device="cpu", fast_bfloat16=fast)
    assert config.dtype == got
    assert "CPU" in config.dtype_reason


def test_dtype_that_is_not_named_is_that_of_the_weights(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, dtype="bfloat16", shards=2)
    hf = json.loads((folder / "config.json").read_text())
    written(folder, {key: value for key, value in hf.items() if key != "dtype"})
    assert configs.model_config(read(folder)).dtype == "bfloat16"
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert configs.model_config(read(folder)).dtype == "float32"


def test_old_torch_dtype_is_read() -> None:
    hf = {k: v for k, v in tiny.config("llama").items() if k != "dtype"}
    assert build({**hf, "torch_dtype": "torch.bfloat16"}).dtype == "bfloat16"


def test_float16_is_refused_where_it_overflows() -> None:
    hf = tiny.config("llama", model_type="gemma2", dtype="float16")
    assert build(hf).dtype == "bfloat16"
    with pytest.raises(ModelError) as error:
        build(hf, dtype="half")
    assert error.value.id == "HF022"


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "overrides", "default", "limit"),
    [
        (None, {}, 256, 256),
        ("linear", {}, 1024, 1024),
        ("dynamic", {}, 128, 128),
        ("yarn", {}, 256, 256),
        ("yarn", {"max_position_embeddings": 64}, 256, 256),
        ("llama3", {}, 256, 256),
        ("longrope", {}, 64, 256),
        (None, {"model_max_length": 100}, 100, 100),
        (None, {"n_positions": 50}, 50, 50),
    ],
)
def test_length_follows_the_formula(rope: str | None, overrides: dict[str, Any], default: int, limit: int) -> None:
    config = build(tiny.config("llama", rope=rope, **overrides))
    assert configs.max_model_len(config, None)[0] == default
    assert configs.max_model_len(config, -1)[0] == default
    assert configs.max_model_len(config, limit)[0] == limit
    with pytest.raises(ModelError) as error:
        configs.max_model_len(config, limit + 1)
    assert error.value.id == "HF021"
    assert str(limit) in error.value.cause
    assert str(limit + 1) in error.value.cause


def test_length_reason_has_the_numbers() -> None:
    config = build(tiny.config("llama", rope="linear"))
    assert configs.max_model_len(config, None)[1] == "max_position_embeddings 256 x linear factor 4"


def test_config_without_a_length_gets_a_guess_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    hf = tiny.config("llama", model_type="nonesuch", rope_parameters=None)
    del hf["max_position_embeddings"]
    assert build(hf).max_len == 2048
    assert "--max-model-len" in caplog.text


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_config", "of_generation", "ids"),
    [
        (2, None, (2,)),
        (2, [2, 0], (2, 0)),
        ([2, 5], 7, (7, 2, 5)),
        (None, 3, (3,)),
        (None, None, ()),
    ],
)
def test_end_ids_of_both_files_count(of_config: Any, of_generation: Any, ids: tuple[int, ...]) -> None:
    config = build(tiny.config("llama", eos_token_id=of_config), generation={"eos_token_id": of_generation})
    assert config.eos_ids == ids


def test_an_end_of_text_that_is_no_id_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        config = build(tiny.config("llama", eos_token_id=["</s>", 5]))
    assert config.eos_ids == (5,)
    assert "'</s>' is no token id" in caplog.text
