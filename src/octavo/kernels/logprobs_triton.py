"""Log-probabilities in Triton: of a token, with its rank, and of the likeliest, after a survey (`survey_triton`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.pdl import release, wait
from octavo.kernels.race_triton import best_of, order
from octavo.kernels.survey_triton import (
    BLOCK_SIZE,
    BOUND,
    GROUP_SIZE,
    MOST_LISTED,
    RANK,
    TOP,
    WARPS,
    arrives_last,
    enlist,
    listed_of,
    scratch_of,
    total_of,
)


@triton.jit(do_not_specialize=["count", "MOST"], do_not_specialize_on_alignment=["token_ptr"])
def _likeliest_kernel(
    x_ptr, token_ptr, floats_ptr, group_ptr, rows_ptr, value_ptr, id_ptr, out_ptr, arrived_ptr,
    stride, count, SIZE, MOST,
    BLOCKS: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Of each row, as ``out_ptr[S, 2 + 2 MOST]`` in bits: a token's log-probability and rank; the ``MOST`` likeliest,
    the lowest of equals first; their log-probabilities."""
    row, block = tl.program_id(0), tl.program_id(1)
    groups: tl.constexpr = BLOCK // GROUP
    release(CHAINED)
    wait(CHAINED)
    x_ptr += row.to(tl.int64) * stride
    own = tl.load(x_ptr + tl.load(token_ptr + row)).to(tl.float32)
    bound = tl.load(rows_ptr + count * BOUND + row)
    group = block * groups + tl.arange(0, groups)
    peaks = tl.load(group_ptr + row * BLOCKS * groups + group)
    reaching = (peaks > own) | (order(peaks) >= bound)
    if tl.max(reaching.to(tl.int32)) > 0:
        at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(x_ptr + at, (at < SIZE) & reaching[:, None], float("-inf")).to(tl.float32)
        tl.atomic_add(rows_ptr + count * RANK + row, tl.sum((x > own).to(tl.int32)), sem="relaxed")
        enlist(x, at, bound, row, count, rows_ptr, value_ptr, id_ptr, LISTED)
    if arrives_last(arrived_ptr, row, BLOCKS):
        top = tl.load(rows_ptr + count * TOP + row).to(tl.float32, bitcast=True)
        total = top + tl.log(total_of(floats_ptr, row, count, top, 1.0, BLOCKS, PAD)).to(tl.float32)
        out_ptr += row * (2 + 2 * MOST)
        tl.store(out_ptr, (own - total).to(tl.int32, bitcast=True))
        tl.store(out_ptr + 1, tl.load(rows_ptr + count * RANK + row, cache_modifier=".cg") + 1)
        found, values, ids = listed_of(rows_ptr, value_ptr, id_ptr, row, count, LISTED)
        listed = (found >= MOST) & (found <= LISTED)
        last, last_id = float("inf"), -1
        for place in range(MOST):
            if listed:
                left = (values < last) | ((values == last) & (ids > last_id))
                best, winner = best_of(tl.where(left, values, float("-inf")), tl.where(left, ids, 0x7FFFFFFF))
            else:
                best, winner = _next(x_ptr, SIZE, last, last_id, LISTED)
            last, last_id = best, winner
            tl.store(out_ptr + 2 + place, winner)
            tl.store(out_ptr + 2 + MOST + place, (best - total).to(tl.int32, bitcast=True))


@triton.jit
def _next(x_ptr, SIZE, last, last_id, BLOCK: tl.constexpr):
    """(logit, token) of the likeliest after ``last`` and ``last_id``."""
    bests, tokens = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, at < SIZE, float("-inf")).to(tl.float32)
        left = (at < SIZE) & ((x < last) | ((x == last) & (at > last_id)))
        better = left & ((x > bests) | (tokens == 0x7FFFFFFF))
        tokens = tl.where(better, at, tokens)
        bests = tl.where(better, x, bests)
    return best_of(bests, tokens)


def logprobs(x: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """See `sampling.packed_logprobs`; of equal tokens the lowest come first."""
    scratch = scratch_of(x.device, *x.shape)
    count = min(count, scratch.size)
    out = torch.empty((scratch.count, 2 + 2 * count), dtype=torch.int32, device=x.device)
    scratch.survey(x, None, out, count if count <= scratch.groups else 0)
    _likeliest_kernel[scratch.grid](
        x, tokens, scratch.floats, scratch.group, scratch.rows, scratch.values, scratch.ids, out, scratch.arrived,
        x.stride(0), scratch.count, scratch.size, count, scratch.blocks, scratch.pad, BLOCK_SIZE, GROUP_SIZE,
        MOST_LISTED, scratch.chain, num_warps=WARPS, launch_pdl=scratch.chain,
    )  # fmt: skip
    return out
