"""Block formats of GGML and their dequantisation.

A row of a tensor is a sequence of blocks; a block is a few scales and the packed integers of 32 or 256 values. Layouts
are those of ggml's ``ggml-common.h``; a value is computed as ggml's reference does, in float32 and in the same order,
so results are equal bit for bit. Notation: d scale, m minimum (both float16), q integer, all in the order of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_CHUNK_VALUES = 1 << 16  # of one pass: keeps the intermediate arrays in the second-level cache


@dataclass(frozen=True)
class BlockFormat:
    """``values`` numbers in ``nbytes`` bytes. ``decode`` fills float32 [n, values] from bytes [n, nbytes]."""

    name: str
    values: int
    nbytes: int
    decode: Callable[[Bytes, Floats], None]


def dequantise(blocks: Bytes, format: BlockFormat) -> Floats:
    """Bytes [..., n, format.nbytes] to float32 [..., n * format.values]."""
    if blocks.shape[-1] != format.nbytes:
        raise ValueError(f"blocks of {format.name} have {format.nbytes} bytes, not {blocks.shape[-1]}")
    lead = blocks.shape[:-2]
    flat = blocks.reshape(-1, format.nbytes)
    out = np.empty((flat.shape[0], format.values), np.float32)
    step = max(1, _CHUNK_VALUES // format.values)
    with np.errstate(all="ignore"):  # scales of a damaged file may be inf or nan; that is not this function's business
        for start in range(0, flat.shape[0], step):
            part = slice(start, start + step)
            format.decode(np.ascontiguousarray(flat[part]), out[part])
    return out.reshape(*lead, blocks.shape[-2] * format.values)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of each block, as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(packed: Bytes, bits: int) -> Bytes:
    """Bytes [n, g, k] to their bit fields [n, g, 8 // bits, k], lowest first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields: Bytes = (packed[:, :, None, :] >> shifts) & np.uint8((1 << bits) - 1)
    return fields


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """32 single bits from byte ``at`` on, as 0 or 16: uint8 [n, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _nibbles32(blocks: Bytes, at: int) -> Bytes:
    """32 four-bit values: the low halves of 16 bytes, then the high ones."""
    return _fields(blocks[:, None, at : at + 16], 4).reshape(-1, 32)


def _scale(out: Floats, d: Floats, q: npt.NDArray[Any]) -> None:
    np.copyto(out, q)
    out *= d


def _f32(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: Bytes, out: Floats) -> None:
    out.view(np.uint32)[:] = blocks.view("<u2").astype(np.uint32) << np.uint32(16)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    _scale(out, _half(blocks, 0), blocks[:, 2:].view(np.int8))


def _q4_0(blocks: Bytes, out: Floats) -> None:
    _scale(out, _half(blocks, 0), _nibbles32(blocks, 2).view(np.int8) - np.int8(8))


def _q4_1(blocks: Bytes, out: Floats) -> None:
    _scale(out, _half(blocks, 0), _nibbles32(blocks, 4))
    out += _half(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    q = _nibbles32(blocks, 6) | _fifth_bits(blocks, 2)
    _scale(out, _half(blocks, 0), q.view(np.int8) - np.int8(16))


def _q5_1(blocks: Bytes, out: Floats) -> None:
    _scale(out, _half(blocks, 0), _nibbles32(blocks, 8) | _fifth_bits(blocks, 4))
    out += _half(blocks, 2)


# --- 256 values in groups, with a scale (and a minimum) for each group ------------------------------------------------


def _grouped(out: Floats, d: Floats, q: npt.NDArray[Any], m: Floats | None = None) -> None:
    """out[n, 256] = d[n, g] * q[n, 256] - m[n, g], group by group."""
    groups = out.reshape(out.shape[0], d.shape[1], -1)
    np.copyto(groups, q.reshape(groups.shape))
    groups *= d[:, :, None]
    if m is not None:
        groups -= m[:, :, None]


def _q2_k(blocks: Bytes, out: Floats) -> None:
    """16 bytes of (scale, minimum) in four bits each, 64 bytes of two-bit q, d, dmin."""
    scales = blocks[:, :16]
    q = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2)
    d, dmin = _half(blocks, 80), _half(blocks, 82)
    _grouped(out, d * (scales & 15).astype(np.float32), q, dmin * (scales >> 4).astype(np.float32))


def _q3_k(blocks: Bytes, out: Floats) -> None:
    """32 bytes with the high bit of q, inverted; 64 bytes of its two low bits; 16 six-bit scales in 12 bytes; d."""
    n = blocks.shape[0]
    low = _fields(blocks[:, 32:96].reshape(n, 2, 32), 2).reshape(n, 256)
    high = _fields(blocks[:, :32].reshape(n, 1, 32), 1).reshape(n, 256)
    q = low.view(np.int8) + (high << np.uint8(2)).view(np.int8) - np.int8(4)
    # Byte i of the first 8: low bits of scales i and i + 8; byte j of the last 4: high bits of j, j + 4, j + 8, j + 12.
    scales = _fields(blocks[:, None, 96:104], 4).reshape(n, 16) | (
        _fields(blocks[:, None, 104:108], 2).reshape(n, 16) << np.uint8(4)
    )
    _grouped(out, _half(blocks, 108) * (scales.view(np.int8) - np.int8(32)).astype(np.float32), q)


def _six_bit_pairs(packed: Bytes) -> tuple[Floats, Floats]:
    """8 scales and 8 minima of six bits each in 12 bytes: float32 [n, 8] twice.

    The first four of each lie in the low bits of bytes 0-3 and 4-7; the other four have their low halves in bytes 8-11
    and their two high bits on top of the first four.
    """
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 2) & 48)], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | ((second >> 2) & 48)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(blocks: Bytes, out: Floats) -> None:
    """d, dmin, 12 bytes of scales and minima, 128 bytes of four-bit q."""
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    q = _fields(blocks[:, 16:].reshape(-1, 4, 32), 4)
    _grouped(out, _half(blocks, 0) * scales, q, _half(blocks, 2) * minima)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    """As `_q4_k`, with the fifth bit of each q in 32 bytes before the 128."""
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    low = _fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 256)
    high = _fields(blocks[:, None, 16:48], 1).reshape(-1, 256)
    _grouped(out, _half(blocks, 0) * scales, low | (high << np.uint8(4)), _half(blocks, 2) * minima)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    """128 bytes with the four low bits of q, 64 with its two high bits, 16 int8 scales, d; q is offset by 32."""
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    q = (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    _grouped(out, _half(blocks, 208) * scales, q)


# Number of the type in the file -> format.
FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _f32),
    1: BlockFormat("F16", 1, 2, _f16),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    10: BlockFormat("Q2_K", 256, 84, _q2_k),
    11: BlockFormat("Q3_K", 256, 110, _q3_k),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    30: BlockFormat("BF16", 1, 2, _bf16),
}

# Types that exist and are not read here; for the error message.
OTHER_TYPES: dict[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
