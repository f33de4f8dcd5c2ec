from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from octavo.config import ModelConfig
from octavo.errors import ConfigError, ModelError
from octavo.hub.checkpoint import Array, Checkpoint, open_checkpoint
from octavo.hub.configs import model_config, read_hf_dict
from octavo.hub.gguf import GgufReader
from octavo.hub.gguf_weights import GgufCheckpoint
from octavo.hub.patches import normalise
from octavo.hub.resolve import resolve
from octavo.hub.safetensors_file import TensorInfo
from octavo.kernels import select
from octavo.layers.base import Layer
from octavo.models.llama import LlamaForCausalLM
from octavo.runtime import loader
from octavo.runtime.loader import LoadReport, fill_dummy, load
from tests.gguf_files import HEADS, HIDDEN, KV_HEADS, llama_order, tiny_metadata, tiny_tensors, write_gguf
from tools import tiny

CPU = torch.device("cpu")


class Memory:
    """A checkpoint in memory that remembers what was read."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = dict(arrays)
        self.read_names: list[str] = []
        self.forgotten: list[int] = []  # how many had been read at each time

    def forget(self) -> None:
        self.forgotten.append(len(self.read_names))

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(a.dtype, a.data.shape, a.data.nbytes) for name, a in self.arrays.items()}

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Array:
        self.read_names.append(name)
        array = self.arrays[name]
        return Array(array.data[slices or ()], array.dtype)


def config(family: str = "llama", dtype: str = "float32", **overrides: object) -> ModelConfig:
    return model_config(normalise(tiny.config(family, **overrides))[0], dtype=dtype)


def model(family: str = "llama", dtype: str = "float32", **overrides: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(config(family, dtype, **overrides), 64)


def checkpoint(family: str = "llama", dtype: str = "float32", **overrides: object) -> Memory:
    """The weights of a tiny model under Transformers' names."""
    arrays = {}
    for name, tensor in tiny.build(family, dtype=dtype, **overrides).state_dict().items():
        if dtype == "bfloat16":
            arrays[name] = Array(tensor.view(torch.uint16).numpy(), dtype)
        else:
            arrays[name] = Array(tensor.numpy(), dtype)
    return Memory(arrays)


def run(target: LlamaForCausalLM, source: Checkpoint) -> LoadReport:
    return load(target, source, CPU)


def failure(target: LlamaForCausalLM, source: Memory) -> ModelError:
    with pytest.raises(ModelError) as error:
        run(target, source)
    assert source.read_names == []  # nothing is read before everything is known to fit
    return error.value


def test_parts_are_stacked_in_order() -> None:
    source, target = checkpoint(), model()
    run(target, source)
    parts = [source.arrays[f"model.layers.1.self_attn.{part}_proj.weight"].data for part in "qkv"]
    fused = target.model.layers[1].self_attn.qkv_proj.weight
    assert torch.equal(fused, torch.from_numpy(np.concatenate(parts)))
    assert not any(parameter.is_meta for parameter in target.parameters())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_are_cast_to_the_type_of_the_model(stored: str, dtype: str) -> None:
    source, target = checkpoint(dtype=stored), model(dtype=dtype)
    run(target, source)
    array = source.arrays["model.norm.weight"].data
    values = torch.from_numpy(array.copy())
    values = values.view(torch.bfloat16) if stored == "bfloat16" else values
    assert target.model.norm.weight.dtype == getattr(torch, dtype)
    assert torch.equal(target.model.norm.weight, values.to(getattr(torch, dtype)))


def test_shards_on_disk_load_like_one_file(tmp_path: Path) -> None:
    models = []
    for shards in (1, 3):
        folder = tiny.make(tmp_path / str(shards), shards=shards)
        target = model()
        report = run(target, open_checkpoint(resolve(str(folder))))
        models.append(target)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    assert report.tensors == 3 * 9 + 3
    assert report.nbytes == sum(parameter.nbytes for parameter in target.parameters())
    for one, other in zip(*(target.parameters() for target in models), strict=True):
        assert torch.equal(one, other)


def test_tensors_larger_than_a_piece_are_read_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PIECE", 5000)
    source, target, whole = checkpoint(), model(), model()
    run(target, source)
    monkeypatch.undo()
    run(whole, checkpoint())
    assert source.read_names.count("model.embed_tokens.weight") == -(-384 // (5000 // 256))
    for one, other in zip(target.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_error_of_a_reader_reaches_the_caller() -> None:
    source = checkpoint()

    def fail(name: str, slices: tuple[slice, ...] | None = None) -> Array:
        raise ModelError(f"{name} is damaged.", "Download it again.", id="HF041")

    source.read = fail  # type: ignore[method-assign]
    with pytest.raises(ModelError) as error:
        run(model(), source)
    assert error.value.id == "HF041"


def test_progress_rises_to_one() -> None:
    seen: list[float] = []
    load(model(), checkpoint(), CPU, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_missing_tensors_are_counted_and_paired_with_the_nearest_spare_names() -> None:
    source = checkpoint()
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        source.arrays[name.replace("o_proj", "out_proj")] = source.arrays.pop(name)
    error = failure(model(), source)
    assert error.id == "HF043"
    assert "lacks 3 " in error.cause
    assert "model.layers.0.self_attn.o_proj.weight (nearest: model.layers.0.self_attn.out_proj.weight)" in error.cause


def test_long_lists_of_names_are_cut_to_ten() -> None:
    error = failure(model(), Memory({}))
    assert error.cause.count("model.layers") == 9  # the tenth is embed_tokens
    assert "30 " in error.cause
    assert "…" in error.cause


def test_unexpected_tensors_are_an_error() -> None:
    """For example biases that config.json does not mention."""
    source = checkpoint(attention_bias=True)
    error = failure(model(), source)
    assert error.id == "HF042"
    assert "12 tensors" in error.cause
    assert "q_proj.bias" in error.cause


def test_shapes_are_compared_before_reading() -> None:
    error = failure(model(vocab_size=400), checkpoint())
    assert error.id == "HF044"
    assert "model.embed_tokens.weight is [384, 64] where the model needs [400, 64]" in error.cause


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_quantised_values_are_refused_and_not_read_as_numbers(dtype: str) -> None:
    source = checkpoint()
    name = "model.layers.0.mlp.down_proj.weight"
    source.arrays[name] = Array(np.zeros((64, 96), dtype=np.uint8), dtype)
    error = failure(model(), source)
    assert error.id == "HF050"
    assert name in error.cause


def test_buffers_of_old_checkpoints_and_a_tied_head_are_ignored() -> None:
    source, target = checkpoint("qwen3"), model("qwen3")
    head = source.arrays["lm_head.weight"]
    source.arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = Array(np.ones(8, np.float32), "float32")
    report = run(target, source)
    assert set(report.unused) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    hidden = torch.randn(2, 64)
    torch.testing.assert_close(target.logits(hidden), hidden @ torch.from_numpy(head.data).T)
    assert sum(p.numel() == 384 * 64 for p in target.parameters()) == 1


def test_a_head_of_its_own_is_used_though_config_json_ties_it() -> None:
    """As Transformers does."""
    source, target = checkpoint("qwen3"), model("qwen3")
    head = np.random.default_rng(0).standard_normal((384, 64), np.float32)
    source.arrays["lm_head.weight"] = Array(head, "float32")
    run(target, source)
    hidden = torch.randn(2, 64)
    torch.testing.assert_close(target.logits(hidden), hidden @ torch.from_numpy(head).T)
    embedding = torch.from_numpy(source.arrays["model.embed_tokens.weight"].data)
    assert torch.equal(target.model.embed_tokens(torch.arange(384)), embedding)


def test_a_head_that_is_not_tied_is_not_ignored() -> None:
    source = checkpoint()
    del source.arrays["lm_head.weight"]
    error = failure(model(), source)
    assert error.id == "HF043"
    assert "lm_head.weight" in error.cause


def test_layers_are_finished_with_the_chosen_operators_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the memory is about one model: at each packing, no later layer has memory yet."""
    target = model()
    waiting: list[int] = []

    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        waiting.append(sum(parameter.is_meta for parameter in target.parameters()))

    ops = dataclasses.replace(select.REFERENCE, pack_linear=pack)
    monkeypatch.setattr(select, "ops", lambda device, dtype: ops)
    run(target, checkpoint())
    assert waiting == sorted(set(waiting), reverse=True)
    assert waiting[-1] == 0
    assert target.model.norm.ops is ops


def test_what_was_read_is_forgotten_after_each_layer() -> None:
    target, source = model(), checkpoint()
    run(target, source)
    assert len(source.forgotten) == sum(1 for module in target.modules() if isinstance(module, Layer))


def test_dummy_weights_are_normal_and_norms_are_one() -> None:
    target = model("qwen3", "bfloat16", hidden_size=256)
    fill_dummy(target, seed=3)
    for name, parameter in target.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert abs(parameter.float().mean()) < 0.001
            assert abs(parameter.float().std() - 0.02) < 0.001


def test_dummy_biases_are_not_constant() -> None:
    target = model("qwen2")
    fill_dummy(target, seed=0)
    assert target.model.layers[0].self_attn.qkv_proj.bias.std() > 0.01


def test_dummy_weights_depend_on_the_seed_and_the_name_only() -> None:
    first, again, other, deeper = model(), model(), model(), model(num_hidden_layers=5)
    for target, seed in ((first, 1), (again, 1), (other, 2), (deeper, 1)):
        fill_dummy(target, seed)
    down = [target.model.layers[1].mlp.down_proj.weight for target in (first, again, other, deeper)]
    assert torch.equal(down[0], down[1])
    assert torch.equal(down[0], down[3])
    assert not torch.equal(down[0], down[2])
    assert not torch.equal(down[0], first.model.layers[2].mlp.down_proj.weight)


def gguf_checkpoint(folder: Path, kinds: Mapping[str, str], default: str = "Q8_0") -> GgufCheckpoint:
    """A tiny model whose matrices are in ``kinds`` (by a part of the name) or ``default``."""
    tensors: dict[str, object] = {}
    for name, value in tiny_tensors().items():
        kind = next((kinds[part] for part in kinds if part in name), default)
        if value.ndim == 2 and kind != "F32":
            quantised = getattr(gguf.GGMLQuantizationType, kind)
            value = (
                llama_order(value, HEADS if "attn_q" in name else KV_HEADS)
                if "attn_q" in name or "attn_k" in name
                else value
            )
            tensors[name] = (gguf.quants.quantize(np.ascontiguousarray(value), quantised), quantised)
        else:
            tensors[name] = value
    return GgufCheckpoint(GgufReader(write_gguf(folder / "m.gguf", tensors, tiny_metadata())))  # type: ignore[arg-type]


def gguf_models(
    source: GgufCheckpoint, folder: Path, dtype: str
) -> tuple[LlamaForCausalLM, LlamaForCausalLM, LoadReport]:
    """The model with its blocks as they are, and with their values in ``dtype``."""
    made = model_config(read_hf_dict(resolve(str(folder / "m.gguf")), {}), dtype=dtype)
    kept, plain = LlamaForCausalLM(made, 64), LlamaForCausalLM(made, 64)
    report = load(kept, source, CPU, keep_blocks=True)
    run(plain, source)
    return kept, plain, report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_a_gguf_file_stay_as_they_are_and_compute_nearly_the_same(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
    source = gguf_checkpoint(tmp_path, {"attn_v": "Q5_1", "ffn": "Q4_1"})
    kept, plain, report = gguf_models(source, tmp_path, dtype)
    assert report.kinds == ("Q4_1", "Q5_1", "Q8_0")
    assert "Q4_1, Q5_1, Q8_0 kept as they are" in str(report)
    stored = sum(source.read_raw(name).nbytes for name in source.block_types())
    assert stored < report.nbytes < stored + 2000  # and the norms
    assert not any(parameter.dim() == 2 for parameter in kept.parameters())
    layer, expected = kept.model.layers[0].self_attn.qkv_proj, plain.model.layers[0].self_attn.qkv_proj
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0)).to(kept.dtype)
    torch.testing.assert_close(layer(x), expected(x), atol=0.2, rtol=0.02)
    ids = torch.tensor([3, 0, 39])
    torch.testing.assert_close(kept.model.embed_tokens(ids), plain.model.embed_tokens(ids), atol=0, rtol=0)


def test_a_layer_with_a_part_that_is_not_in_blocks_is_dequantised(tmp_path: Path) -> None:
    pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
    source = gguf_checkpoint(tmp_path, {"attn_v": "F32", "ffn_up": "Q4_0"})
    kept, plain, report = gguf_models(source, tmp_path, "float32")
    assert report.kinds == ("Q4_0", "Q8_0")
    for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        layer, expected = (m.model.layers[1].get_submodule(name) for m in (kept, plain))
        x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1))
        exact = name == "self_attn.qkv_proj"
        assert torch.equal(layer(x), expected(x)) is exact
        torch.testing.assert_close(layer(x), expected(x), atol=0.2, rtol=0.02)


def test_blocks_are_dequantised_unless_asked_for(tmp_path: Path) -> None:
    _, plain, _ = gguf_models(gguf_checkpoint(tmp_path, {}), tmp_path, "float32")
    assert plain.model.layers[0].self_attn.o_proj.weight.dtype is torch.float32


def test_int8_rounds_weights_of_layers_and_head(tmp_path: Path) -> None:
    pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
    source, plain, rounded = checkpoint(dtype="float32"), model(), model()
    run(plain, source)
    load(rounded, source, CPU, quantization="int8")
    x = torch.randn(3, plain.config.hidden_size, generator=torch.Generator().manual_seed(2))
    for name in ("model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"):
        layer, expected = rounded.get_submodule(name), plain.get_submodule(name)
        inputs = x if name.endswith("qkv_proj") else x.repeat(1, expected.weight.shape[1] // x.shape[1] + 1)
        inputs = inputs[:, : expected.weight.shape[1]].contiguous()
        wanted = expected(inputs)
        error = (layer(inputs) - wanted).norm() / wanted.norm()
        assert 1e-4 < error < 0.02


def test_int8_is_refused_where_nothing_multiplies_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "ops", lambda device, dtype: select.REFERENCE)
    with pytest.raises(ConfigError, match="quantization is int8"):
        fill_dummy(model(), 0, quantization="int8")
