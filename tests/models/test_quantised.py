"""Quantised checkpoints against the same weights written as floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.config import EngineConfig
from octavo.errors import ConfigError, ModelError
from octavo.kernels import select
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from tests.models.harness import Paged, native
from tests.quantised_files import LAYOUTS, Tensors, mxfp4
from tools import tiny

PROMPT = [5, 17, 203, 44, 380, 9, 120, 77, 31, 250, 6, 18]
SIZES: dict[str, Any] = {"intermediate_size": 128, "num_hidden_layers": 2}


def pair(folder: Path, layout: str, **config: Any) -> tuple[Path, Path]:
    """A quantised model, and the same one in float32."""
    settings, make = LAYOUTS[layout]
    plain = tiny.make(folder / "plain", **SIZES, **config)
    tensors = load_file(plain / "model.safetensors")
    quantised: Tensors = {}
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        if "_proj.weight" in name:
            parts, tensors[name] = make(name.removesuffix(".weight"), tensor.shape[0], tensor.shape[1], seed)
            quantised |= parts
        else:
            quantised[name] = tensor
    save_file(tensors, plain / "model.safetensors")
    return plain, write(folder / "quantised", plain, quantised, settings)


def write(folder: Path, like: Path, tensors: Tensors, settings: dict[str, Any]) -> Path:
    """A model with the config and the tokenizer of ``like``."""
    folder.mkdir()
    for file in like.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    hf = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "quantization_config": settings}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits(folder: Path, **how: Any) -> torch.Tensor:
    pages = Paged(native(folder, 64, dtype="float32", **how))
    return pages.step({(row := pages.start()): PROMPT})[row]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_floats_it_stands_for(layout: str, tmp_path: Path) -> None:
    plain, quantised = pair(tmp_path, layout)
    expected = logits(plain)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits(quantised), expected, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-int8", "fp8", "bitsandbytes-4"])
def test_the_transformers_backend_runs_it_too(layout: str, tmp_path: Path) -> None:
    plain, quantised = pair(tmp_path, layout)
    expected = logits(plain)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits(quantised, impl="transformers"), expected, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.skipif("Q4_1" not in select.ops(torch.device("cpu"), torch.float32).block_types, reason="no C++ extension")
@pytest.mark.parametrize("layout", ["gptq", "gptq-8", "awq", "compressed-w4", "compressed-int8"])
def test_groups_are_multiplied_as_they_are_stored(layout: str, tmp_path: Path) -> None:
    plain, quantised = pair(tmp_path, layout)
    model = native(quantised, 64, dtype="float32", keep_blocks=True)
    packed: Any = model.get_submodule("model.layers.0.mlp.gate_up_proj").packed
    assert packed.nbytes < 2 * 64 * packed.out_features  # fewer than two bytes a weight
    pages = Paged(model)
    found = pages.step({(row := pages.start()): PROMPT})[row]
    expected = logits(plain)
    # Activations are rounded for the products, and zeros times scales to float16.
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_experts_of_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(
        **{**sizes, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        vocab_size=tiny.VOCAB_SIZE,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config)
    model.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    quantised: Tensors = {}
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parts, tensors[name] = mxfp4(name, 4, tensor.shape[2], tensor.shape[1], seed)
            quantised |= parts
        else:
            quantised[name] = tensor
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    write(tmp_path / "quantised", tmp_path / "plain", quantised, {"quant_method": "mxfp4"})
    expected = logits(tmp_path / "plain", impl="transformers")
    torch.testing.assert_close(logits(tmp_path / "quantised", impl="transformers"), expected, atol=1e-5, rtol=1e-5)


def test_a_name_is_enough(tmp_path: Path) -> None:
    plain, quantised = pair(tmp_path, "awq")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def answer(folder: Path, **options: Any) -> list[int]:
        with LLM(str(folder), kv_cache_memory_bytes=1 << 20, max_model_len=64, **options) as llm:
            return llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids

    assert answer(quantised, dtype="float32", quantization="awq_marlin") == answer(plain, dtype="float32")
    with pytest.raises(ConfigError, match="quantization is gptq, but the checkpoint is quantised by awq"):
        answer(quantised, quantization="gptq")


def test_scales_without_a_statement_in_the_config_are_refused(tmp_path: Path) -> None:
    plain, quantised = pair(tmp_path, "awq")
    (quantised / "config.json").write_text((plain / "config.json").read_text())
    with pytest.raises(ModelError, match="qweight") as caught:
        native(quantised, 64)
    assert caught.value.id in ("HF042", "HF043")


def test_rounding_on_loading_is_another_thing() -> None:
    assert EngineConfig.of(model="m", quantization="int8").model.rounding == "int8"
    assert EngineConfig.of(model="m", quantization="gptq").model.rounding is None
