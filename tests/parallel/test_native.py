"""Native models divided among processes, against the same on one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from octavo.errors import ConfigError
from octavo.hub.checkpoint import Array, SafetensorsCheckpoint, Slices, open_checkpoint
from octavo.hub.configs import model_config, read_hf_dict
from octavo.hub.quantised.checkpoint import unquantised
from octavo.hub.resolve import resolve
from octavo.layers.linear import Linear
from octavo.models import registry
from octavo.models.base import Model
from octavo.parallel.group import SINGLE, Group
from octavo.runtime import loader
from octavo.runtime.torch_checkpoint import PyTorchCheckpoint
from tests.gguf_files import tiny_metadata, tiny_tensors, write_gguf
from tests.models.harness import Paged
from tests.models.test_quantised import write
from tests.parallel.ranks import Ranks
from tests.quantised_files import LAYOUTS, Tensors
from tools import tiny

PROMPT = [5, 9, 200, 17, 41, 300, 8, 77, 23]


class Counting(SafetensorsCheckpoint):
    """Counts the bytes that are read of each tensor."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        super().__init__(paths)
        self.read_bytes: Counter[str] = Counter()

    def read(self, name: str, slices: Slices | None = None) -> Array:
        found = super().read(name, slices)
        self.read_bytes[name] += found.data.nbytes
        return found


def built(folder: Path) -> Model:
    config = model_config(read_hf_dict(resolve(str(folder)), {}), dtype="float32", generation={})
    return registry.choose(config)[0](config, 128)


def answer(model: Model) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits of a prompt."""
    paged, prompt = Paged(model), [token % model.config.vocab_size for token in PROMPT]
    tokens = paged.greedy(paged.start(), prompt, 12)
    row = paged.start()
    return tokens, paged.step({row: prompt})[row]


def loaded(
    group: Group, folder: Path, load_format: str = "auto", keep_blocks: bool = False, quantization: str | None = None
) -> tuple[list[int], torch.Tensor]:
    model = built(folder)
    checkpoint = unquantised(
        open_checkpoint(resolve(str(folder)), load_format, pytorch=PyTorchCheckpoint), model.config.hf
    )
    report = loader.load(
        model,
        checkpoint,
        torch.device("cpu"),
        keep_blocks=keep_blocks,
        quantization=quantization,
    )
    assert keep_blocks or not report.kinds
    return answer(model)


def assert_same(
    found: list[tuple[list[int], torch.Tensor]], wanted: tuple[list[int], torch.Tensor], within: float = 1e-4
) -> None:
    for tokens, logits in found:
        assert tokens == wanted[0]
        torch.testing.assert_close(logits, wanted[1], rtol=within, atol=within)


@pytest.mark.parametrize("size", [2, 4])  # with four, there are two heads of K and V
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokens_and_logits_equal_those_of_one_rank(family: str, size: int, ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, family)
    assert_same(ranks.call(size, loaded, folder), loaded(SINGLE, folder))


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"vocab_size": 387},  # ranks have 97, 97, 97 and 96
        {"tie_word_embeddings": True, "vocab_size": 387},
        {"num_key_value_heads": 1},
    ],
    ids=str,
)
def test_biases_odd_vocabularies_and_shared_heads(overrides: dict[str, Any], ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "llama", **overrides)
    assert_same(ranks.call(4, loaded, folder), loaded(SINGLE, folder))


def test_pickled_files_can_be_divided_too(ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "qwen2")
    wanted = loaded(SINGLE, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same(ranks.call(2, loaded, folder, "pt"), wanted)


def dummy(group: Group, folder: Path) -> tuple[list[int], torch.Tensor]:
    model = built(folder)
    loader.fill_dummy(model, 3)
    return answer(model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dummy_weights_do_not_depend_on_the_number_of_ranks(family: str, ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, family)
    wanted = dummy(SINGLE, folder)
    assert wanted[1].std() > 0.01
    assert_same(ranks.call(2, dummy, folder), wanted)


def bytes_read(group: Group, folder: Path) -> Counter[str]:
    checkpoint = Counting((folder / "model.safetensors",))
    loader.load(built(folder), checkpoint, torch.device("cpu"))
    return checkpoint.read_bytes


def test_two_ranks_read_the_file_once_and_norms_twice(ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "llama")
    total = sum((found for found in ranks.call(2, bytes_read, folder)), Counter[str]())
    for name, info in SafetensorsCheckpoint((folder / "model.safetensors",)).tensors().items():
        assert total[name] == info.nbytes * (2 if "norm" in name else 1), name


def test_heads_of_keys_and_values_are_read_by_each_rank_that_has_them(ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "llama")
    total = sum((found for found in ranks.call(4, bytes_read, folder)), Counter[str]())
    for name, info in SafetensorsCheckpoint((folder / "model.safetensors",)).tensors().items():
        times = 4 if "norm" in name else 2 if "k_proj" in name or "v_proj" in name else 1
        assert total[name] == info.nbytes * times, name


def parameters(group: Group, folder: Path) -> tuple[int, int]:
    model = built(folder)
    return sum(p.numel() for p in model.parameters()), model.config.kv_bytes_per_token


def test_each_rank_holds_its_share(ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "llama")
    whole, cache = parameters(SINGLE, folder)
    for count, own_cache in ranks.call(2, parameters, folder):
        assert 0.5 * whole < count < 0.52 * whole
        assert own_cache == cache // 2


@pytest.mark.parametrize(
    ("size", "overrides", "cause", "remedy"),
    [
        (3, {}, "does not divide the attention heads (4); neither divides the K/V heads (2)", "Give one of 1, 2, 4."),
        (4, {"intermediate_size": 90}, "does not divide intermediate_size (90)", "Give one of 1, 2."),
    ],
)
def test_sizes_that_do_not_divide_are_named_with_what_would_work(
    size: int, overrides: dict[str, Any], cause: str, remedy: str, ranks: Ranks, tmp_path: Path
) -> None:
    folder = tiny.make(tmp_path, "llama", **overrides)
    with pytest.raises(ConfigError) as error:
        ranks.call(size, parameters, folder)
    assert cause in error.value.cause
    assert error.value.remedy == remedy


@pytest.mark.parametrize("size", [2, 4])
def test_weights_that_are_rounded_on_loading_can_be_divided_too(size: int, ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "llama", hidden_size=128, intermediate_size=256)  # shares of whole groups of 32
    wanted = loaded(SINGLE, folder, "auto", False, "int8")
    assert (wanted[1] - loaded(SINGLE, folder)[1]).abs().max() > 2e-2  # they are rounded
    assert_same(ranks.call(size, loaded, folder, "auto", False, "int8"), wanted, 2e-3)  # activations are rounded, too


def blocks_kept(group: Group, path: Path) -> tuple[int, int]:
    """(products of blocks, bytes that are read)."""
    model = built(path)
    checkpoint = open_checkpoint(resolve(str(path)))
    report = loader.load(model, checkpoint, torch.device("cpu"), keep_blocks=True)
    return sum(isinstance(module, Linear) and bool(module.kinds) for module in model.modules()), report.nbytes


@pytest.mark.parametrize("size", [2, 4])
def test_blocks_of_gguf_files_stay_as_they_are_where_a_share_is_whole_blocks(
    size: int, ranks: Ranks, tmp_path: Path
) -> None:
    """The tiny model has 64 inputs of the last product: two blocks of Q8_0. Its 32 of the others are one."""
    blocks = gguf.GGMLQuantizationType.Q8_0
    tensors = {
        name: (gguf.quants.quantize(value, blocks), blocks) if value.ndim == 2 and "embd" not in name else value
        for name, value in tiny_tensors().items()
    }
    path = write_gguf(tmp_path / "m.gguf", tensors, tiny_metadata())
    wanted = loaded(SINGLE, path, "auto", True)  # of which the logits are up to 10: activations are rounded
    assert_same(ranks.call(size, loaded, path, "auto", True), wanted, 2e-2)
    kept = {2: 2 * 3, 4: 2 * 2}[size]  # of two layers: QKV, gate and up, and down, which four ranks cannot keep
    assert blocks_kept(SINGLE, path)[0] == 2 * 4
    assert [count for count, _ in ranks.call(size, blocks_kept, path)] == [kept] * size


SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}


def quantised(folder: Path, layout: str) -> Path:
    """A model of which the shares of two ranks are whole groups."""
    settings, make = LAYOUTS[layout]
    plain = tiny.make(folder / "plain", "llama", **SIZES)
    tensors: Tensors = {}
    for seed, (name, tensor) in enumerate(sorted(load_file(plain / "model.safetensors").items())):
        cut = name.endswith("_proj.weight")
        tensors |= make(name.removesuffix(".weight"), *tensor.shape, seed)[0] if cut else {name: tensor}
    return write(folder / "quantised", plain, tensors, settings)


@pytest.mark.parametrize("keep_blocks", [False, True])
@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-int8", "fp8", "bitsandbytes-4"])
def test_quantised_checkpoints_can_be_divided_too(layout: str, keep_blocks: bool, ranks: Ranks, tmp_path: Path) -> None:
    path = quantised(tmp_path, layout)
    wanted = loaded(SINGLE, path, "auto", keep_blocks)
    assert_same(ranks.call(2, loaded, path, "auto", keep_blocks), wanted, 2e-3 if keep_blocks else 1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_gguf_files_can_be_divided_too(size: int, ranks: Ranks, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_tensors(), tiny_metadata())
    assert_same(ranks.call(size, loaded, path), loaded(SINGLE, path))
