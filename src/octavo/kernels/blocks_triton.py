"""Products by weights of four and eight bits, which stay in memory as they are.

Four bits have a scale and a minimum for 32 inputs, eight bits a scale for 16: GGUF's types are brought into one of
these when they are packed. Up to `MOST_ROWS` rows are multiplied by a kernel that widens a tile of the weight in
registers, to exactly what it would be in the model's type, and multiplies it by tensor cores; for more rows the whole
weight is widened first, and the product is torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from octavo.kernels.linear_triton import MOST_ROWS, scratch
from octavo.kernels.pdl import chained, release, wait

GROUP = {4: 32, 8: 16}  # inputs that share a scale, by bits
FEW = (1, 2)  # rows that are multiplied without tensor cores: each is a kernel of its own
_MOST_GROUPS = 1024  # of a row of the weight there: it must fit into the registers of a program
_PROGRAMS = 256  # that the inputs are divided for, at least
_LEAST_SHARE = 1024  # inputs of a program, if they are divided


@dataclass(frozen=True)
class Launch:
    """``outputs`` rows of the weight and ``groups`` of their inputs are the tile of a program."""

    outputs: int
    groups: int
    warps: int
    stages: int


LAUNCHES = {4: Launch(64, 16, 4, 1), 8: Launch(64, 16, 4, 1)}
FEW_LAUNCHES = {4: (8192, 4), 8: (8192, 4)}  # bytes of codes that a program reads, and its warps


@dataclass(frozen=True)
class Blocks:
    """``codes[out, groups, 16]`` uint8 or int8, ``scales[out, groups]`` and ``least[out, groups]`` float16.

    A byte of four bits holds inputs i (low half) and 16 + i of its group; their values are ``code * scale + least``.
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    least: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.least is None else self.least.nbytes)


class BlockLinear:
    """See `select.PackedLinear`; ``parts`` lie one below the other."""

    few_rows: int | None = MOST_ROWS

    def __init__(self, parts: Sequence[Blocks], bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.parts = list(parts)
        self.dtype = dtype
        self.bias = None if bias is None else bias.to(dtype).contiguous()
        self.in_features = parts[0].codes.shape[1] * GROUP[parts[0].bits]
        self.out_features = sum(len(part.codes) for part in parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x[..., in] @ weight.T + bias``."""
        flat = x.reshape(-1, self.in_features)
        if len(flat) > MOST_ROWS or x.dtype == torch.float32:
            weights = [widen(part, self.dtype) for part in self.parts]
            return F.linear(x, weights[0] if len(weights) == 1 else torch.cat(weights), self.bias)
        out = torch.empty((len(flat), self.out_features), dtype=x.dtype, device=x.device)
        first = 0
        for part in self.parts:
            _multiply(flat.contiguous(), part, self.bias, out, first)
            first += len(part.codes)
        return out.view(*x.shape[:-1], self.out_features)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """``weight[ids]`` of a weight of one part: ``[T, in]``."""
        (part,) = self.parts
        return widen(part, self.dtype, ids)


@triton.jit
def _codes(octets, HIGH: tl.constexpr, NVIDIA: tl.constexpr):
    """Halves of bytes as floats, each 128 above its value: bits 16 and up of 128.0 are worth one and up."""
    if NVIDIA:  # four at a time, each by one selection of bytes
        select: tl.constexpr = (
            "prmt.b32 $0, t, 0x43000000, 0x7044; prmt.b32 $1, t, 0x43000000, 0x7144;"
            "prmt.b32 $2, t, 0x43000000, 0x7244; prmt.b32 $3, t, 0x43000000, 0x7344; }"
        )
        low: tl.constexpr = "{ .reg .b32 t; and.b32 t, $4, 0x0F0F0F0F; "
        high: tl.constexpr = "{ .reg .b32 t; shr.u32 t, $4, 4; and.b32 t, t, 0x0F0F0F0F; "
        return tl.inline_asm_elementwise(
            (high if HIGH else low) + select, "=r,=r,=r,=r,r", [octets], dtype=tl.float32, is_pure=True, pack=4
        )
    halves = (octets >> 4) if HIGH else (octets & 15)
    return ((halves.to(tl.int32) << 16) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def _load(codes_ptr, scales_ptr, least_ptr, at, live, BITS: tl.constexpr):
    """The groups at ``at[R, G]``: codes [R, G, 16]; scales and what is added of four bits, which `_codes` raises."""
    byte = tl.arange(0, 16)
    codes = tl.load(codes_ptr + at[:, :, None] * 16 + byte[None, None, :], live[:, :, None], 0,
                    eviction_policy="evict_first")  # fmt: skip
    scales = tl.load(scales_ptr + at, live, 0.0).to(tl.float32)
    if BITS == 4:
        least = tl.load(least_ptr + at, live, 0.0).to(tl.float32) - 128 * scales
    else:
        least = scales
    return codes, scales, least


@triton.jit
def _values(codes, scales, least, BITS: tl.constexpr, HIGH: tl.constexpr, NVIDIA: tl.constexpr):
    """What ``codes`` of a `_load` stand for."""
    if BITS == 4:
        return _codes(codes, HIGH, NVIDIA) * scales[:, :, None] + least[:, :, None]
    return codes.to(tl.float32) * scales[:, :, None]


@triton.jit
def _few_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, least_ptr, bias_ptr, out_ptr, out_size, groups, out_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, NVIDIA: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """As the kernel for few rows of `linear_triton`: whole rows of the weight, read before the wait for ``x``."""
    n, g, byte = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, GROUPS), tl.arange(0, 16)
    live = n < out_size
    at = tl.where(live, n, 0).to(tl.int64)[:, None] * groups + g[None, :]
    whole = live[:, None] & (g < groups)[None, :]
    codes, scales, least = _load(codes_ptr, scales_ptr, least_ptr, at, whole, BITS)
    bias = tl.load(bias_ptr + n, live, 0.0).to(tl.float32) if HAS_BIAS else 0.0
    release(CHAINED)
    wait(CHAINED)
    per: tl.constexpr = 32 if BITS == 4 else 16
    inputs = g[:, None] * per + byte[None, :]
    inside = (g < groups)[:, None]
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * groups * per + inputs, inside, 0.0).to(tl.float32)
        if BITS == 4:
            sums = tl.sum(_codes(codes, False, NVIDIA) * x[None, :, :], 2)
            total = tl.sum(x, 1)
            x = tl.load(x_ptr + row * groups * per + inputs + 16, inside, 0.0).to(tl.float32)
            sums += tl.sum(_codes(codes, True, NVIDIA) * x[None, :, :], 2)
            total += tl.sum(x, 1)
            sums = sums * scales + least * total[None, :]
        else:
            sums = tl.sum(codes.to(tl.float32) * x[None, :, :], 2) * scales
        out = tl.sum(sums, 1) + bias
        tl.store(out_ptr + row * out_stride + n, out.to(out_ptr.dtype.element_ty), live)


@triton.jit(do_not_specialize=["rows", "splits"])
def _product_kernel(
    x_ptr, codes_ptr, scales_ptr, least_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr,
    rows, out_size, groups, share, splits, out_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, NVIDIA: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """``OUTPUTS`` rows of the weight times ``share`` of the groups of inputs."""
    block, split = tl.program_id(0), tl.program_id(1)
    n, m, g = block * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS), tl.arange(0, GROUPS)
    live = n < out_size
    row = tl.where(live, n, 0).to(tl.int64)[:, None] * groups
    bias = tl.load(bias_ptr + n, live, 0.0).to(tl.float32) if HAS_BIAS else tl.zeros([OUTPUTS], tl.float32)
    per: tl.constexpr = 32 if BITS == 4 else 16
    k = tl.arange(0, GROUPS * 16)
    inputs = k // 16 * per + k % 16
    x_at = x_ptr + m[None, :] * (groups * per) + inputs[:, None]
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    release(CHAINED)
    wait(CHAINED)
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, groups), GROUPS):
        group = first + g
        whole = (group < groups)[None, :] & live[:, None]
        codes, scales, least = _load(codes_ptr, scales_ptr, least_ptr, row + group[None, :], whole, BITS)
        inside = (inputs + first * per < groups * per)[:, None] & (m < rows)[None, :]
        x = tl.load(x_at + first * per, inside, 0.0)
        weight = tl.reshape(_values(codes, scales, least, BITS, False, NVIDIA).to(dtype), [OUTPUTS, GROUPS * 16])
        acc = tl.dot(weight, x, acc)
        if BITS == 4:
            x = tl.load(x_at + first * per + 16, inside, 0.0)
            weight = tl.reshape(_values(codes, scales, least, BITS, True, NVIDIA).to(dtype), [OUTPUTS, GROUPS * 16])
            acc = tl.dot(weight, x, acc)
    kept = live[:, None] & (m < rows)[None, :]
    out_at = out_ptr + m[None, :] * out_stride + n[:, None]
    if not SPLIT:
        tl.store(out_at, (acc + bias[:, None]).to(dtype), kept)
    else:
        place = tl.arange(0, OUTPUTS)[:, None] * ROWS + m[None, :]
        own = partial_ptr + block.to(tl.int64) * splits * OUTPUTS * ROWS
        tl.store(own + split * OUTPUTS * ROWS + place, acc)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == splits - 1:
            acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
            for part in range(splits):
                acc += tl.load(own + part * OUTPUTS * ROWS + place, cache_modifier=".cg")
            tl.store(out_at, (acc + bias[:, None]).to(dtype), kept)
            tl.store(arrived_ptr + block, 0)  # as the next product expects it


def _selects_bytes(x: torch.Tensor) -> bool:
    """Whether kernels for ``x`` may have instructions of NVIDIA's, which the interpreter lacks."""
    return x.device.type == "cuda" and torch.version.cuda is not None


def _multiply(x: torch.Tensor, part: Blocks, bias: torch.Tensor | None, out: torch.Tensor, first: int) -> None:
    """Columns ``first`` and on of ``out``: ``x[rows, in]`` times a part of the weight."""
    own_bias = None if bias is None else bias[first : first + len(part.codes)]
    if len(x) in FEW and part.codes.shape[1] <= _MOST_GROUPS:
        _few_rows(x, part, own_bias, out[:, first:])
    else:
        _some_rows(x, part, own_bias, out[:, first:])


def _few_rows(x: torch.Tensor, part: Blocks, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    (size, groups), chain = part.scales.shape, chained(x.device)
    pad, (tile, warps) = triton.next_power_of_2(groups), FEW_LAUNCHES[part.bits]
    outputs = max(1, tile // (16 * pad))
    _few_rows_kernel[(triton.cdiv(size, outputs),)](
        x, part.codes, part.scales, part.least, bias, out, size, groups, out.stride(0),
        len(x), outputs, pad, part.bits, bias is not None, _selects_bytes(x), chain, num_warps=warps, launch_pdl=chain,
    )  # fmt: skip


def _some_rows(x: torch.Tensor, part: Blocks, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    (size, groups), rows, chain, launch = part.scales.shape, len(x), chained(x.device), LAUNCHES[part.bits]
    blocks, pad, per = triton.cdiv(size, launch.outputs), max(16, triton.next_power_of_2(rows)), GROUP[part.bits]
    splits = 1
    while blocks * splits < _PROGRAMS and groups * per >= 2 * _LEAST_SHARE * splits:
        splits *= 2
    share = triton.cdiv(triton.cdiv(groups, splits), launch.groups) * launch.groups
    splits = triton.cdiv(groups, share)
    partial, arrived = scratch(x.device, blocks * splits * launch.outputs * pad, blocks) if splits > 1 else (out, out)
    _product_kernel[(blocks, splits)](
        x, part.codes, part.scales, part.least, bias, out, partial, arrived,
        rows, size, groups, share, splits, out.stride(0),
        pad, launch.outputs, launch.groups, part.bits, splits > 1, bias is not None, _selects_bytes(x), chain,
        num_warps=launch.warps, num_stages=launch.stages, launch_pdl=chain,
    )  # fmt: skip


@triton.jit
def _widen_kernel(
    ids_ptr, codes_ptr, scales_ptr, least_ptr, out_ptr, rows, groups,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, HAS_IDS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    row = tl.load(ids_ptr + n, n < rows, 0) if HAS_IDS else tl.where(n < rows, n, 0)
    live = (n < rows)[:, None] & (group < groups)[None, :]
    own = row.to(tl.int64)[:, None] * groups + group[None, :]
    codes, scales, least = _load(codes_ptr, scales_ptr, least_ptr, own, live, BITS)
    per: tl.constexpr = 32 if BITS == 4 else 16
    at = (n.to(tl.int64)[:, None] * groups + group[None, :])[:, :, None] * per + tl.arange(0, 16)[None, None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, _values(codes, scales, least, BITS, False, NVIDIA).to(dtype), live[:, :, None])
    if BITS == 4:
        tl.store(out_ptr + at + 16, _values(codes, scales, least, BITS, True, NVIDIA).to(dtype), live[:, :, None])


def widen(part: Blocks, dtype: torch.dtype, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The weight, or its rows ``ids``, in ``dtype``."""
    (size, groups), per = part.scales.shape, GROUP[part.bits]
    rows = size if ids is None else len(ids)
    out = torch.empty((rows, groups * per), dtype=dtype, device=part.codes.device)
    grid = (triton.cdiv(rows, 16), triton.cdiv(groups, 8))
    _widen_kernel[grid](
        ids, part.codes, part.scales, part.least, out, rows, groups,
        16, 8, part.bits, ids is not None, _selects_bytes(out),
    )  # fmt: skip
    return out


# --- GGUF's types -----------------------------------------------------------------------------------------------------


def pack_blocks(
    parts: Sequence[tuple[str, torch.Tensor]], bias: torch.Tensor | None, dtype: torch.dtype
) -> BlockLinear:
    """See `select.PackBlocks`. Scales that are products of two numbers in the file are rounded to float16."""
    return BlockLinear([TYPES[kind](blocks.view(len(blocks), -1, SIZES[kind])) for kind, blocks in parts], bias, dtype)


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None = None) -> BlockLinear | None:
    """The product of ``weight[out, in]`` rounded to int8 in groups of 16 inputs; None where they do not divide it."""
    if weight.dtype == torch.float32 or weight.shape[1] % GROUP[8]:
        return None
    groups = weight.view(len(weight), -1, GROUP[8]).float()
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (groups / scales.float().clamp_min(2.0**-24)[..., None]).round_().clamp_(-127, 127).to(torch.int8)
    return BlockLinear([Blocks(8, codes, scales, None)], bias, weight.dtype)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte ``at`` of each block: [out, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _q4_0(blocks: torch.Tensor) -> Blocks:
    scales = _half(blocks, 0)
    return Blocks(4, blocks[..., 2:].contiguous(), scales, -8 * scales)


def _q4_1(blocks: torch.Tensor) -> Blocks:
    return Blocks(4, blocks[..., 4:].contiguous(), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> Blocks:
    codes = blocks[..., 2:].contiguous().view(torch.int8)
    return Blocks(8, codes.view(len(blocks), -1, 16), _half(blocks, 0).repeat_interleave(2, 1), None)


def _q4_k(blocks: torch.Tensor) -> Blocks:
    """Eight groups of 32, each with a scale and a minimum of six bits (ggml's ``block_q4_K``)."""
    low, high, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat([low & 63, rest & 15 | low >> 2 & 48], -1)
    least = torch.cat([high & 63, rest >> 4 | high >> 2 & 48], -1)
    # 32 bytes hold two groups, one in their low halves and one in their high halves.
    octets = blocks[..., 16:].reshape(len(blocks), -1, 4, 1, 32)
    numbers = torch.cat([octets & 15, octets >> 4], 3)
    codes = numbers[..., :16] | numbers[..., 16:] << 4
    scales = (_half(blocks, 0)[..., None].float() * scales).half()
    least = (_half(blocks, 2)[..., None].float() * least).neg_().half()
    count = len(blocks)
    return Blocks(4, codes.reshape(count, -1, 16), scales.view(count, -1), least.view(count, -1))


def _q6_k(blocks: torch.Tensor) -> Blocks:
    """Sixteen groups of 16, each with a scale of eight bits (ggml's ``block_q6_K``)."""
    count = len(blocks)
    low = blocks[..., :128].reshape(count, -1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], 3).view(count, -1, 2, 4, 32)
    high = blocks[..., 128:192].reshape(count, -1, 2, 1, 32)
    high = torch.cat([high >> place & 3 for place in (0, 2, 4, 6)], 3)
    codes = (low | high << 4).view(torch.int8) - 32
    scales = _half(blocks, 208)[..., None].float() * blocks[..., 192:208].view(torch.int8)
    return Blocks(8, codes.reshape(count, -1, 16), scales.half().view(count, -1), None)


TYPES = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q6_K": _q6_k, "Q8_0": _q8_0}
SIZES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144, "Q6_K": 210, "Q8_0": 34}  # bytes of a block
