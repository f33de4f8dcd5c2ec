"""Small GGUF files for tests: whole models through the ``gguf`` package, damaged files byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, LAYERS = 32, 64, 40, 4, 2, 2


def llama_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter stores those of query and key projections."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tiny_tensors(seed: int = 0, *, tied: bool = True, bias: bool = False, norms: bool = False) -> dict[str, np.ndarray]:
    """Random weights of a two-layer model under GGUF names, rows in Transformers' order."""
    rng = np.random.default_rng(seed)
    head = HIDDEN // HEADS

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {"token_embd.weight": random(VOCAB, HIDDEN), "output_norm.weight": random(HIDDEN)}
    if not tied:
        tensors["output.weight"] = random(VOCAB, HIDDEN)
    for i in range(LAYERS):
        block = {
            "attn_norm.weight": random(HIDDEN),
            "attn_q.weight": random(HIDDEN, HIDDEN),
            "attn_k.weight": random(KV_HEADS * head, HIDDEN),
            "attn_v.weight": random(KV_HEADS * head, HIDDEN),
            "attn_output.weight": random(HIDDEN, HIDDEN),
            "ffn_norm.weight": random(HIDDEN),
            "ffn_gate.weight": random(INNER, HIDDEN),
            "ffn_up.weight": random(INNER, HIDDEN),
            "ffn_down.weight": random(HIDDEN, INNER),
        }
        if bias:
            block |= {f"attn_{p}.bias": random(block[f"attn_{p}.weight"].shape[0]) for p in "qkv"}
        if norms:
            block |= {"attn_q_norm.weight": random(head), "attn_k_norm.weight": random(head)}
        tensors |= {f"blk.{i}.{name}": value for name, value in block.items()}
    return tensors


def tiny_metadata(arch: str = "llama", **more: Any) -> dict[str, Any]:
    """The entries that every model has, ``more`` (under the architecture's prefix) added; None removes one."""
    values = {
        "block_count": LAYERS,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    } | {key.replace("__", "."): value for key, value in more.items()}
    return {f"{arch}.{key}": value for key, value in values.items() if value is not None}


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]],
    metadata: Mapping[str, Any] | None = None,
    *,
    arch: str = "llama",
) -> Path:
    """A valid file. A tensor is float32, or (raw bytes of its rows, type)."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- byte by byte -----------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def record(name: str, dims: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    dims = tuple(dims)
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw_gguf(
    entries: list[bytes] | None = None,
    records: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these parts; ``counts`` (tensors, entries) overrides what the header claims."""
    entries, records = entries or [], records or []
    tensors, pairs = counts or (len(records), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + b"".join(entries) + b"".join(records)
    return head + bytes(-len(head) % alignment) + data
