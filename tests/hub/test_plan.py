"""Plans from configs and headers alone, checked against arithmetic done by hand and against what loading takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from octavo.config import EngineConfig
from octavo.errors import ConfigError, ModelError
from octavo.hub import machines
from octavo.hub.machines import Machine
from octavo.hub.peek import Peeked
from octavo.hub.plan import Plan, describe, make_plan, size
from octavo.hub.resolve import resolve
from octavo.plan_command import Models
from tests.gguf_files import tiny_metadata, tiny_tensors, write_gguf
from tools import tiny

CPU = Machine("test", "cpu", 1 << 30, 10e9, fast_bfloat16=False, kv_share=0.1)
GPU = Machine("card", "cuda", 1 << 34, 1e12, fast_bfloat16=True)


def plan(folder: Path, machine: Machine = CPU, **options: Any) -> Plan:
    config = EngineConfig.of(model=str(folder), **options)
    return make_plan(Peeked(resolve(str(folder))), config, machine, Models())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("plan") / "llama", "llama", generation={"temperature": 0.5})


def test_sizes_are_those_of_the_loaded_model(folder: Path) -> None:
    parameters = sum(p.numel() for p in tiny.build("llama").parameters())
    made = plan(folder)
    assert made.weights.parameters == parameters
    assert made.weights.loaded == made.weights.stored == 4 * parameters
    assert made.weights.read == 4 * (parameters - tiny.VOCAB_SIZE * 64)  # one row of an untied embedding is read
    assert made.cache.bytes_per_token == 2 * 3 * 2 * 16 * 4  # K and V, layers, heads, their size, float32
    assert made.floor_ms == pytest.approx(1e3 * made.weights.read / 10e9)
    assert (made.dtype, made.max_len, made.exit_code) == ("float32", 256, 0)
    assert (made.sampling, made.eos_ids) == ({"temperature": 0.5}, (tiny.EOS, tiny.BOS))


def test_tied_head_counts_once_and_is_read_whole(tmp_path: Path) -> None:
    made = plan(tiny.make(tmp_path, "qwen3"))
    parameters = sum(p.numel() for p in tiny.build("qwen3").parameters())
    assert made.weights.parameters == parameters
    assert made.weights.read == made.weights.loaded


def test_a_model_that_embeds_needs_no_head(folder: Path) -> None:
    made, whole = plan(folder, runner="pooling"), plan(folder)
    assert whole.weights.parameters - made.weights.parameters == tiny.VOCAB_SIZE * 64
    assert (made.weights.head, made.weights.layers) == (0, whole.weights.layers)
    assert "pooling         last, of length 1 (asked for)" in describe(made)


@pytest.mark.parametrize("sized", [{"kv_cache_memory_bytes": 1 << 20}, {"num_gpu_blocks_override": 40}])
def test_tokens_that_fit_are_what_the_worker_gets(folder: Path, sized: dict[str, Any]) -> None:
    from octavo.core.engine import EngineCore
    from octavo.runtime.worker import Worker

    options = {**sized, "max_num_seqs": 64, "device": "cpu"}
    core = EngineCore(EngineConfig.of(model=str(folder), **options), Worker())
    assert plan(folder, **options).cache.tokens == core.info.num_pages * core.info.page_size
    assert core.info.num_pages == sized.get("num_gpu_blocks_override", core.info.num_pages)
    core.close()


def test_sequences_of_each_length_fill_the_cache(folder: Path) -> None:
    made = plan(folder, kv_cache_memory_bytes=(4 * 16 + 1) * 16 * 768, max_num_seqs=3)
    assert made.cache.tokens == 1024
    assert made.cache.sequences == {256: 3}  # four fit, three may run


def test_length_shrinks_to_what_fits_unless_it_was_asked_for(folder: Path) -> None:
    little = {"kv_cache_memory_bytes": 5 * 16 * 768}
    made = plan(folder, **little)
    assert (made.max_len, made.exit_code) == (64, 0)
    asked = plan(folder, max_model_len=128, **little)
    assert (asked.max_len, asked.exit_code) == (128, 4)
    assert any("--max-model-len 64" in line for line in asked.advice)


def test_weights_larger_than_the_machine_do_not_run(folder: Path) -> None:
    made = plan(folder, Machine("small", "cuda", 1 << 18, 1e12, fast_bfloat16=True))
    assert made.exit_code == 4
    assert made.cache.sequences == {}
    assert "none fits" in describe(made)
    assert any("--gpu l4" in line for line in made.advice)


def test_gpu_keeps_a_reserve_and_computes_in_bfloat16(folder: Path) -> None:
    made = plan(folder, GPU)
    assert made.dtype == "bfloat16"
    assert 0.8 * GPU.memory < made.cache.budget < 0.9 * GPU.memory - made.weights.loaded


def test_a_cache_of_8_bits_holds_twice_the_tokens_on_a_gpu_and_is_refused_on_a_cpu(folder: Path) -> None:
    wide, narrow = (plan(folder, GPU, kv_cache_dtype=dtype, kv_cache_memory_bytes=1 << 20) for dtype in ("auto", "fp8"))
    assert narrow.cache.bytes_per_token * 2 == wide.cache.bytes_per_token
    assert narrow.cache.tokens // 2 in range(wide.cache.tokens, wide.cache.tokens + 17)
    with pytest.raises(ConfigError, match="Leave it at auto"):
        plan(folder, CPU, kv_cache_dtype="fp8")


def test_unsupported_architecture_is_planned_with_the_reason(folder: Path) -> None:
    made = plan(folder, hf_overrides={"architectures": ["FooForCausalLM"]})
    assert (made.implementation, made.exit_code) == (None, 3)
    assert "FooForCausalLM" in made.implementation_reason
    assert made.weights.loaded > 0


def test_a_model_of_transformers_is_planned_with_the_layers_it_is_seen_to_have(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=100, **sizes)).save_pretrained(tmp_path)
    made = plan(tmp_path)
    assert "Transformers backend" in made.implementation_reason
    assert made.cache.bytes_per_token == 2 * 2 * 64 * 4
    assert made.exit_code == 0


def test_rope_and_length_formula_are_told(tmp_path: Path) -> None:
    text = describe(plan(tiny.make(tmp_path, "llama", rope="linear")))
    assert "linear, theta 10000, factor 4, 16 of 16 dimensions" in text
    assert "1024 (max_position_embeddings 256 x linear factor 4)" in text


def test_gguf_counts_values_not_stored_bytes(tmp_path: Path) -> None:
    metadata = {**tiny_metadata(), "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.tokens": ["a", "b", "c", "d"]}
    made = plan(write_gguf(tmp_path / "m.gguf", tiny_tensors(), metadata))
    parameters = sum(tensor.size for tensor in tiny_tensors().values())
    assert made.weights.parameters == parameters
    assert made.weights.loaded == 4 * parameters
    assert made.quantisation == "GGUF F32 dequantised on loading"


def test_blocks_of_few_bits_are_kept_unless_a_dtype_is_named(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    metadata = {**tiny_metadata(), "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.tokens": ["a", "b", "c", "d"]}
    tensors = tiny_tensors()
    matrices = sum(tensor.size for tensor in tensors.values() if tensor.ndim == 2)
    norms = sum(tensor.size for tensor in tensors.values() if tensor.ndim == 1)
    stored = {name: (gguf.quants.quantize(t, kind), kind) if t.ndim == 2 else t for name, t in tensors.items()}
    path = write_gguf(tmp_path / "m.gguf", stored, metadata)
    kept, named = plan(path), plan(path, dtype="float32")
    assert kept.weights.loaded == matrices * 5 // 8 + 4 * norms
    assert kept.quantisation == "GGUF Q4_1 as stored"
    assert kept.weights.small
    assert not named.weights.small
    assert kept.weights.layers + kept.weights.head == kept.weights.parameters  # its head is tied
    assert named.weights.loaded == plan(path, GPU, dtype="float32").weights.loaded == 4 * (matrices + norms)
    assert plan(path, GPU).quantisation == "GGUF Q4_1 as stored"
    assert plan(path, GPU, dtype="bfloat16").quantisation == "GGUF Q4_1 dequantised on loading"


def test_int8_takes_eight_bits_and_a_scale_for_32(folder: Path) -> None:
    plain, rounded = plan(folder, dtype="float32"), plan(folder, dtype="float32", quantization="int8")
    assert 8.5 / 32 < rounded.weights.loaded / plain.weights.loaded < 0.6


def test_pickled_weights_are_estimated_by_their_size(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(4000))
    made = plan(tmp_path)
    assert (made.weights.parameters, made.weights.loaded) == (1000, 4000)
    assert "pickled" in describe(made)


def test_experts_that_a_token_does_not_use_are_not_read(folder: Path, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    hf = {**json.loads((folder / "config.json").read_text()), "num_experts": 4, "num_experts_per_tok": 1}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(4)]
    save_file({name: np.zeros((8, 8), np.float32) for name in names}, tmp_path / "model.safetensors")
    made = plan(tmp_path)
    assert (made.weights.loaded, made.weights.read) == (1024, 256)


def test_model_without_weights_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError) as caught:
        plan(tmp_path)
    assert caught.value.id == "HF040"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (-5, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_a_gpu_is_known_by_its_name_and_another_is_answered_with_those_that_are() -> None:
    assert machines.named("H100").bandwidth == 3350e9
    with pytest.raises(ConfigError, match="l40s"):
        machines.named("voodoo2")


@pytest.mark.parametrize(
    ("title", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3350e9),
        ("NVIDIA A100-SXM4-40GB", 1555e9),
        ("NVIDIA A100-SXM4-80GB", 2039e9),
        ("NVIDIA GeForce RTX 4090", 1008e9),
        ("Voodoo 2", None),
    ],
)
def test_bandwidth_by_the_name_that_a_driver_gives(title: str, bandwidth: float | None) -> None:
    assert machines.bandwidth_of(title) == bandwidth


def test_measured_bandwidth_is_that_of_some_memory() -> None:
    assert 1e8 < machines.measure_bandwidth() < 1e13


def test_what_a_model_without_known_layers_keeps_is_not_guessed(tmp_path: Path) -> None:
    tiny.make(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    kept = {key: config[key] for key in ("vocab_size", "hidden_size", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(
        json.dumps({**kept, "architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    )
    made = plan(tmp_path)
    assert "found out by running the model" in describe(made)
    assert "none fits" not in describe(made)
    assert made.exit_code == 0
