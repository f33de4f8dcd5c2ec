from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from octavo.errors import ModelError
from octavo.hub.checkpoint import Checkpoint, SafetensorsCheckpoint, open_checkpoint, safetensors_paths
from octavo.hub.gguf_weights import GgufCheckpoint
from octavo.hub.source import Source
from octavo.runtime.torch_checkpoint import PyTorchCheckpoint
from tests.gguf_files import HEADS, KV_HEADS, llama_order, tiny_metadata, tiny_tensors, write_gguf


def source(path: Path, kind: Any = "folder") -> Source:
    return Source(str(path), kind, path, None, "")


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(6, 4, generator=generator),
        "b": torch.randn(8, 2, generator=generator).to(torch.bfloat16),
        "c": torch.randn(3, 5, 2, generator=generator).to(torch.float16),
        "d": torch.arange(4),
        "scale": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "f8": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
    }


def bits(tensor: torch.Tensor) -> np.ndarray:
    carriers = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    return tensor.view(carriers[tensor.dtype]).numpy() if tensor.dtype in carriers else tensor.numpy()


def check_equal(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors()) == set(expected)
    for name, tensor in expected.items():
        info, array = checkpoint.tensors()[name], checkpoint.read(name)
        assert info.shape == tuple(tensor.shape) == array.data.shape
        assert info.dtype == array.dtype == str(tensor.dtype).removeprefix("torch.")
        assert info.nbytes == tensor.numel() * tensor.element_size()
        np.testing.assert_array_equal(array.data, bits(tensor))


def index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- safetensors ------------------------------------------------------------------------------------------------------


def test_safetensors_are_read_as_written(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors", {"format": "pt"})
    check_equal(open_checkpoint(source(tmp_path)), weights())


def test_a_slice_of_safetensors_is_a_view_of_those_bytes(tmp_path: Path) -> None:
    save_file({"a": weights()["a"], "b": weights()["b"]}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(source(tmp_path))
    part = checkpoint.read("a", (slice(2, 5), slice(1, 3)))
    np.testing.assert_array_equal(part.data, weights()["a"][2:5, 1:3].numpy())
    assert not part.data.flags.owndata
    np.testing.assert_array_equal(checkpoint.read("b", (slice(4, 8),)).data, bits(weights()["b"][4:8]))


def test_shards_of_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    parts = [{"a": weights()["a"]}, {"b": weights()["b"], "d": weights()["d"]}]
    for i, part in enumerate(parts, 1):
        save_file(part, tmp_path / f"model-0000{i}-of-00002.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")  # not in the index: ignored
    index(tmp_path, {k: f"model-0000{i}-of-00002.safetensors" for i, p in enumerate(parts, 1) for k in p})
    check_equal(open_checkpoint(source(tmp_path)), parts[0] | parts[1])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00003.safetensors")
    for with_index in (False, True):
        if with_index:
            index(tmp_path, {k: f"model-0000{i}-of-00003.safetensors" for i, k in enumerate("abc", 1)})
        with pytest.raises(ModelError) as caught:
            open_checkpoint(source(tmp_path))
        assert caught.value.id == "HF040"
        assert "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors" in caught.value.cause


def test_consolidated_files_and_subfolders_give_way_to_the_model(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert [p.name for p in safetensors_paths(tmp_path)] == ["consolidated.safetensors"]
    for i in (1, 2):
        save_file({f"m{i}": torch.ones(2)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    (tmp_path / "original").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "original" / "model.safetensors")
    assert set(open_checkpoint(source(tmp_path)).tensors()) == {"m1", "m2"}


def test_files_without_an_index_are_in_natural_order_and_may_not_share_a_tensor(tmp_path: Path) -> None:
    for i in (10, 2, 1):
        save_file({f"t{i}": torch.ones(1)}, tmp_path / f"part{i}.safetensors")
    assert [p.name for p in safetensors_paths(tmp_path)] == [
        "part1.safetensors",
        "part2.safetensors",
        "part10.safetensors",
    ]
    save_file({"t2": torch.ones(1)}, tmp_path / "part3.safetensors")
    with pytest.raises(ModelError, match=r"'t2' is in part2.safetensors and in part3.safetensors"):
        open_checkpoint(source(tmp_path))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", ""])
def test_an_index_cannot_name_files_outside_the_folder(tmp_path: Path, name: str) -> None:
    index(tmp_path, {"a": name})
    with pytest.raises(ModelError, match="not inside the folder") as caught:
        open_checkpoint(source(tmp_path))
    assert caught.value.id == "HF041"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="index of shards"):
        open_checkpoint(source(tmp_path))


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "empty": b"",
    "short": b"\x01\x02",
    "header length": struct.pack("<Q", 2**63) + bytes(64),
    "header above the limit": struct.pack("<Q", 100_000_001) + bytes(64),
    "header beyond the file": struct.pack("<Q", 65) + bytes(64),
    "not JSON": raw(b"{nope}"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "not an object": raw([1, 2]),
    "too deep": raw(b"[" * 200_000),
    "key twice": raw(
        b'{"a":' + json.dumps(tensor()).encode() + b',"a":' + json.dumps(tensor()).encode() + b"}", bytes(8)
    ),
    "entry of another kind": raw({"a": 5}, bytes(8)),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "negative offset": raw({"a": tensor(offsets=(-8, 0))}, bytes(8)),
    "offset as a fraction": raw({"a": tensor(offsets=(0, 8.0))}, bytes(8)),
    "offset as a truth value": raw({"a": tensor((), (False, 4))}, bytes(4)),
    "shape is text": raw({"a": tensor("2")}, bytes(8)),
    "negative size": raw({"a": tensor((-2, -1))}, bytes(8)),
    "shape and bytes differ": raw({"a": tensor((3,))}, bytes(8)),
    "product wraps": raw({"a": tensor((2**62, 4), (0, 0))}),
    "empty and too large": raw({"a": tensor((2**62, 2**62, 0), (0, 0))}),
    "data cut": raw({"a": tensor()}, bytes(7)),
    "data left over": raw({"a": tensor()}, bytes(9)),
    "gap": raw({"a": tensor(), "b": tensor(offsets=(16, 24))}, bytes(24)),
    "overlap": raw({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)),
    "does not start at 0": raw({"a": tensor(offsets=(4, 12))}, bytes(12)),
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "web page": b"<!DOCTYPE html><html>503</html>",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(source(tmp_path))
    assert caught.value.id == "HF041"
    assert "model.safetensors" in caught.value.cause
    assert caught.value.remedy


def test_an_unaligned_tensor_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": tensor()}).encode()
    header += b" " * (9 - len(header) % 8)  # data at an odd address
    (tmp_path / "model.safetensors").write_bytes(raw(header, struct.pack("<2f", 1, 2)))
    array = open_checkpoint(source(tmp_path)).read("a").data
    assert array.tolist() == [1.0, 2.0]
    assert array.flags.aligned


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw({"a": tensor(dtype="F4")}, bytes(8)))
    with pytest.raises(ModelError, match="'F4'") as caught:
        open_checkpoint(source(tmp_path))
    assert caught.value.id == "HF050"


@settings(max_examples=150)
@given(at=st.integers(0, 400), bit=st.integers(0, 7), cut=st.integers(0, 400))
def test_flips_and_cuts_give_an_error_or_tensors(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file(weights(), path)
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content[: len(content) - (cut if cut < 100 else 0)])
    id, checkpoint = "", None
    try:
        checkpoint = SafetensorsCheckpoint((path,))
    except ModelError as error:
        id = error.id
    assert id in ("", "HF041", "HF050")
    if checkpoint:
        assert all(checkpoint.read(name).data.shape == info.shape for name, info in checkpoint.tensors().items())


# --- pickled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_read_when_there_are_no_safetensors(tmp_path: Path, zipped: bool) -> None:
    saved = {name: t for name, t in weights().items() if zipped or name != "f8"}  # the old layout knows no float8
    torch.save(saved, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    checkpoint = open_checkpoint(source(tmp_path), pytorch=PyTorchCheckpoint)
    check_equal(checkpoint, saved)
    np.testing.assert_array_equal(checkpoint.read("b", (slice(1, 3),)).data, bits(weights()["b"][1:3]))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(source(tmp_path), pytorch=PyTorchCheckpoint).tensors()) == {"a"}
    assert set(open_checkpoint(source(tmp_path), "pt", pytorch=PyTorchCheckpoint).tensors()) == set(saved)


def test_pickled_shards_of_an_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    index(tmp_path, {"a": "pytorch_model-00001-of-00002.bin", "b": "x.bin"}, "pytorch_model.bin.index.json")
    with pytest.raises(ModelError, match=r"lacks x\.bin"):
        open_checkpoint(source(tmp_path), pytorch=PyTorchCheckpoint)
    torch.save({"b": torch.ones(2)}, tmp_path / "x.bin")
    assert set(open_checkpoint(source(tmp_path), pytorch=PyTorchCheckpoint).tensors()) == {"a", "b"}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/nonexistent/touched"),))


@pytest.mark.parametrize("content", [{"a": Evil()}, [1, 2], {"a": 3}])
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        open_checkpoint(source(tmp_path), pytorch=PyTorchCheckpoint)
    assert caught.value.id == "HF041"


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights(), path)
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=rf"{length} bytes"):
            open_checkpoint(source(tmp_path), pytorch=PyTorchCheckpoint)


def test_a_folder_without_weights_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        open_checkpoint(source(tmp_path))
    assert caught.value.id == "HF040"


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "permuted"), [("llama", True), ("smollm3", True), ("qwen2", False), ("qwen3", False)])
def test_gguf_tensors_have_the_names_and_the_row_order_of_transformers(
    tmp_path: Path, arch: str, permuted: bool
) -> None:
    original = tiny_tensors(tied=False, bias=True, norms=True) | {"blk.0.mystery.weight": np.ones((2, 2), np.float32)}
    stored = dict(original) | {"rope_freqs.weight": np.ones(4, np.float32)}
    if permuted:
        for name, value in original.items():
            if ".attn_q." in name:
                stored[name] = llama_order(value, HEADS)
            elif ".attn_k." in name:
                stored[name] = llama_order(value, KV_HEADS)
    path = write_gguf(tmp_path / "m.gguf", stored, tiny_metadata(arch), arch=arch)
    checkpoint = open_checkpoint(source(path, "gguf"))
    expected = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "blk.0.mystery.weight": "blk.0.mystery.weight",
    }
    for i in range(2):
        block = {
            "input_layernorm.weight": "attn_norm.weight",
            "post_attention_layernorm.weight": "ffn_norm.weight",
            "self_attn.o_proj.weight": "attn_output.weight",
            "self_attn.q_norm.weight": "attn_q_norm.weight",
            "self_attn.k_norm.weight": "attn_k_norm.weight",
            **{f"self_attn.{p}_proj.{leaf}": f"attn_{p}.{leaf}" for p in "qkv" for leaf in ("weight", "bias")},
            **{f"mlp.{p}_proj.weight": f"ffn_{p}.weight" for p in ("gate", "up", "down")},
        }
        expected |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{own}" for theirs, own in block.items()}
    assert set(checkpoint.tensors()) == set(expected)
    for name, own in expected.items():
        array = checkpoint.read(name)
        assert array.dtype == checkpoint.tensors()[name].dtype == "float32"
        np.testing.assert_array_equal(array.data, original[own])
        rows = slice(1, original[own].shape[0] // 2 + 1)
        np.testing.assert_array_equal(checkpoint.read(name, (rows,)).data, original[own][rows])


def test_raw_blocks_of_a_query_projection_are_in_the_order_of_transformers(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    weight = tiny_tensors()["blk.0.attn_q.weight"]
    stored = gguf.quants.quantize(np.ascontiguousarray(llama_order(weight, HEADS)), kind)
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (stored, kind)}, tiny_metadata())
    checkpoint = open_checkpoint(source(tmp_path), "gguf")  # a folder with one GGUF file
    name = "model.layers.0.self_attn.q_proj.weight"
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.block_types() == {name: "Q8_0"}
    blocks = checkpoint.read_raw(name)
    np.testing.assert_array_equal(checkpoint.read_raw(name, slice(3, 20)), blocks[3:20])
    np.testing.assert_array_equal(blocks.reshape(len(blocks), -1), gguf.quants.quantize(weight, kind))
    np.testing.assert_array_equal(
        open_checkpoint(source(path, "gguf")).read(name, (slice(3, 20), slice(5, 30))).data,
        gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)[3:20, 5:30],
    )


def test_rows_that_heads_cannot_share_are_refused(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q.weight": np.ones((30, 32), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tensors, tiny_metadata())
    with pytest.raises(ModelError, match="30 rows, which 4 heads"):
        open_checkpoint(source(path, "gguf")).read("model.layers.0.self_attn.q_proj.weight")
