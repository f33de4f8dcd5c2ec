"""Mixtures of experts as Triton kernels; names and signatures of `kernels.reference`.

Nothing looks at what the router chose on the host, and what is launched depends on numbers of tokens and experts only,
so that a decode step can be captured. Of experts that no token chose nothing is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.metadata import Groups

_PAIRS = 1024  # of token and expert, that a program looks at together
_FEW = 16  # rows of an expert, on the average, up to which the small tile is the better one


@dataclass(frozen=True)
class Tile:
    """``rows`` of one expert by ``outputs`` of its weight, ``depth`` inputs at a time."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


_SMALL, _LARGE = Tile(16, 64, 128, 4, 4), Tile(128, 128, 64, 8, 3)
_EXACT = Tile(16, 32, 32, 4, 2)  # float32


@triton.jit(do_not_specialize=["pairs"])
def _group_kernel(
    experts_ptr, rows_ptr, places_ptr, starts_ptr, pairs, count,
    EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program places the pairs of one expert, whose number is the program's; the last one those of none."""
    own, i = tl.program_id(0), tl.arange(0, BLOCK)
    start = 0
    for first in range(0, pairs, BLOCK):
        expert = tl.load(experts_ptr + first + i, first + i < pairs, -1)
        start += tl.sum(((expert >= 0) & (expert < own)).to(tl.int32))
    tl.store(starts_ptr + own, start)
    for first in range(0, pairs, BLOCK):
        live = first + i < pairs
        expert = tl.load(experts_ptr + first + i, live, -1)
        if own < count:
            mine = live & (expert == own)
            place = start + tl.cumsum(mine.to(tl.int32)) - 1
            tl.store(places_ptr + first + i, place, mine)
            tl.store(rows_ptr + place, (first + i) // EACH, mine)
            start += tl.sum(mine.to(tl.int32))
        else:
            none = live & ((expert < 0) | (expert >= count))
            tl.store(places_ptr + first + i, tl.full([BLOCK], -1, tl.int32), none)


def group(experts: torch.Tensor, count: int) -> Groups:
    """See `reference.group`; rows of pairs without an expert are undefined."""
    (tokens, each), device = experts.shape, experts.device
    experts = experts.contiguous()
    rows = torch.empty(tokens * each, dtype=torch.int32, device=device)
    places = torch.empty((tokens, each), dtype=torch.int32, device=device)
    starts = torch.empty(count + 1, dtype=torch.int32, device=device)
    _group_kernel[(count + 1,)](experts, rows, places, starts, tokens * each, count, each, _PAIRS, num_warps=4)
    return Groups(rows, places, starts)


@triton.jit
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows_ptr, starts_ptr, x_stride, expert_stride, output_stride, input_stride,
    COUNT: tl.constexpr, PAD: tl.constexpr, SIZE: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, BY_TOKEN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A program multiplies a block of rows of one expert; blocks are numbered through all experts that have rows."""
    tiles: tl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    e = tl.arange(0, PAD)
    starts = tl.load(starts_ptr + e, e <= COUNT, 0)
    ends = tl.load(starts_ptr + e + 1, e < COUNT, 0)
    blocks = tl.where(e < COUNT, (ends - starts + ROWS - 1) // ROWS, 0)
    before = tl.cumsum(blocks) - blocks
    here = (before <= block) & (block < before + blocks)
    if tl.sum(here.to(tl.int32)) == 0:
        return
    expert = tl.sum(tl.where(here, e, 0)).to(tl.int64)
    row = tl.sum(tl.where(here, starts + (block - before) * ROWS, 0)) + tl.arange(0, ROWS)
    live = row < tl.sum(tl.where(here, ends, 0))
    source = tl.load(rows_ptr + row, live, 0) if BY_TOKEN else row
    n, k = tile * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, DEPTH)
    kept = n < OUT
    weight_at = weight_ptr + expert * expert_stride + tl.where(kept, n, 0)[:, None].to(tl.int64) * output_stride
    x_at = x_ptr + source[None, :].to(tl.int64) * x_stride
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for first in range(0, SIZE, DEPTH):
        if SIZE % DEPTH == 0:
            weight = tl.load(weight_at + (first + k)[None, :] * input_stride)
            x = tl.load(x_at + (first + k)[:, None], live[None, :], 0.0)
        else:
            inside = first + k < SIZE
            weight = tl.load(weight_at + (first + k)[None, :] * input_stride, inside[None, :], 0.0)
            x = tl.load(x_at + (first + k)[:, None], inside[:, None] & live[None, :], 0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * OUT + n, kept, 0.0).to(tl.float32)[:, None]
    at = out_ptr + row[None, :].to(tl.int64) * OUT + n[:, None]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), kept[:, None] & live[None, :])


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: Groups, *, by_token: bool
) -> torch.Tensor:
    """See `reference.grouped_linear`; ``weight`` may be a view with its last dimensions exchanged."""
    (count, out_size, size), pairs = weight.shape, len(groups.rows)
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    tile = _EXACT if x.dtype is torch.float32 else _SMALL if pairs <= _FEW * count else _LARGE
    out = torch.empty((pairs, out_size), dtype=x.dtype, device=x.device)
    blocks = pairs // tile.rows + min(count, pairs)  # at most: every expert has one that is not full
    _linear_kernel[(blocks * triton.cdiv(out_size, tile.outputs),)](
        x, weight, bias, out, groups.rows, groups.starts, x.stride(0), *weight.stride(),
        count, triton.next_power_of_2(count + 1), size, out_size, tile.rows, tile.outputs, tile.depth, by_token,
        bias is not None, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def _combine_kernel(
    x_ptr, weights_ptr, places_ptr, out_ptr, SIZE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(EACH):
        place = tl.load(places_ptr + token * EACH + number)
        if place >= 0:
            weight = tl.load(weights_ptr + token * EACH + number).to(tl.float32)
            total += weight * tl.load(x_ptr + place.to(tl.int64) * SIZE + i, i < SIZE, 0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * SIZE + i, total.to(out_ptr.dtype.element_ty), i < SIZE)


def combine(x: torch.Tensor, weights: torch.Tensor, groups: Groups) -> torch.Tensor:
    """See `reference.combine`."""
    (tokens, each), size = groups.places.shape, x.shape[1]
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(size))
    _combine_kernel[(tokens, triton.cdiv(size, block))](
        x.contiguous(), weights.contiguous(), groups.places, out, size, each, block, num_warps=4
    )
    return out
