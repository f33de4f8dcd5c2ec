"""The first pass of `sampling_triton` and `logprobs_triton` over a batch of logits, and what its programs share.

A row of logits is cut into blocks, and a block into groups. A program finds of its block the greatest logit, the mass
and the winner of the race (see `kernels.sampling`), of each group the greatest logit; the last of a row's programs to
arrive joins them. At most so many groups as tokens are asked for, and hardly more, reach the bound that it finds: later
passes look into those alone. Masses are summed in float32 within a block and in float64 over blocks.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl

from octavo.kernels.pdl import chained, release, wait
from octavo.kernels.race_triton import (
    KEY0,
    KEY1,
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    best_of,
    bound_of,
    edited,
    float_of,
    inverse_of,
    order,
    score_of,
    shift_of,
    weight_of,
)

BLOCK_SIZE, GROUP_SIZE, WARPS = 2048, 128, 4
MOST_LISTED = 1024  # tokens that are listed of a row; others are looked at in the row itself, so many at once

# Parts of the float32 scratch [5, S, blocks]: the greatest logit, the mass, the greatest score, the mass above the
# token that is judged, the mass that min_p leaves.
PEAK, MASS, SCORE, ABOVE, FLOOR = (tl.constexpr(part) for part in range(5))
# Rows of the int32 scratch [5, S]: the token that the next round judges, -1 if there is none; the bound of the list,
# how many reach it; how many tokens are above the one whose rank is asked for; the bits of the greatest logit.
STATE, BOUND, LISTING, RANK, TOP = (tl.constexpr(row) for row in range(5))


@triton.jit
def part_of(floats, part: tl.constexpr, row, count, BLOCKS: tl.constexpr, PAD: tl.constexpr, other):
    """A row's numbers of all blocks, which other programs of the launch may have written."""
    block = tl.arange(0, PAD)
    return tl.load(floats + (count * part + row) * BLOCKS + block, block < BLOCKS, other, cache_modifier=".cg")


@triton.jit
def winner_of(floats, tokens_ptr, row, count, shift, BLOCKS: tl.constexpr, PAD: tl.constexpr):
    """The token of the greatest score of all blocks, each of them shifted, the lowest of equals."""
    block = tl.arange(0, PAD)
    tokens = tl.load(tokens_ptr + row * BLOCKS + block, block < BLOCKS, 0x7FFFFFFF, cache_modifier=".cg")
    _best, token = best_of(part_of(floats, SCORE, row, count, BLOCKS, PAD, float("-inf")) + shift, tokens)
    return token


@triton.jit
def total_of(floats, row, count, top, inverse, BLOCKS: tl.constexpr, PAD: tl.constexpr):
    """The mass of the row, in weights relative to its greatest logit."""
    peaks = part_of(floats, PEAK, row, count, BLOCKS, PAD, float("-inf"))
    masses = part_of(floats, MASS, row, count, BLOCKS, PAD, 0.0)
    return tl.sum(masses.to(tl.float64) * weight_of(peaks, top, inverse).to(tl.float64))


@triton.jit
def arrives_last(arrived_ptr, row, BLOCKS: tl.constexpr):
    """Whether all other programs of the row have written what they found."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == BLOCKS - 1
    if last:
        tl.store(arrived_ptr + row, 0)  # as the next launch expects it
    return last


@triton.jit(
    do_not_specialize=["count", "words", "limit"],
    do_not_specialize_on_alignment=["settings_ptr", "bits_ptr", "seen_ptr", "out_ptr"],
)
def _survey_kernel(
    x_ptr, settings_ptr, bits_ptr, seen_ptr, floats_ptr, tokens_ptr, group_ptr, rows_ptr, out_ptr, arrived_ptr,
    stride, count, words, limit, SIZE,
    BLOCKS: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS_PAD: tl.constexpr,
    PLAIN: tl.constexpr, CARD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """``PLAIN``: without settings, for log-probabilities of the ``limit`` likeliest; no race is run."""
    row, block = tl.program_id(0), tl.program_id(1)
    release(CHAINED)
    wait(CHAINED)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x_ptr += row.to(tl.int64) * stride
    if PLAIN:
        x = tl.load(x_ptr + at, at < SIZE, float("-inf")).to(tl.float32)
    else:
        x = edited(x_ptr, settings_ptr, bits_ptr, seen_ptr, row, count, words, SIZE, at, at < SIZE)
    x = tl.where(x != x, float("inf"), x)
    place, part = row * BLOCKS + block, count * BLOCKS
    groups: tl.constexpr = BLOCK // GROUP
    peaks = tl.max(tl.reshape(x, [groups, GROUP]), 1)
    top = tl.max(peaks)
    tl.store(floats_ptr + part * PEAK + place, top)
    tl.store(group_ptr + place * groups + tl.arange(0, groups), peaks)
    if PLAIN:
        tl.store(floats_ptr + part * MASS + place, tl.sum(weight_of(x, top, 1.0)))
    else:
        temperature, limit = (
            float_of(settings_ptr, TEMPERATURE, count, row),
            tl.load(settings_ptr + count * TOP_K + row),
        )
        filtered = (float_of(settings_ptr, TOP_P, count, row) < 1.0) | (float_of(settings_ptr, MIN_P, count, row) > 0.0)
        inverse = inverse_of(temperature)
        if filtered:
            tl.store(floats_ptr + part * MASS + place, tl.sum(weight_of(x, top, inverse)))
        if limit == 0:
            score = x
            if temperature > 0.0:
                key0, key1 = tl.load(settings_ptr + count * KEY0 + row), tl.load(settings_ptr + count * KEY1 + row)
                score = score_of(x, top, at, key0, key1, inverse, CARD)
            best, token = best_of(score, at)
            tl.store(floats_ptr + part * SCORE + place, best)
            tl.store(tokens_ptr + place, token)
    if arrives_last(arrived_ptr, row, BLOCKS):
        top = tl.max(part_of(floats_ptr, PEAK, row, count, BLOCKS, PAD, float("-inf")))
        finite = tl.abs(top) < float("inf")
        tl.store(rows_ptr + count * TOP + row, top.to(tl.int32, bitcast=True))
        tl.store(rows_ptr + count * LISTING + row, 0)
        tl.store(rows_ptr + count * RANK + row, 0)
        bound = 0x7FFFFFFF  # nothing is to be listed
        if limit > 0:
            bound = bound_of(group_ptr + row * BLOCKS * groups, limit, BLOCKS * groups, GROUPS_PAD)
        tl.store(rows_ptr + count * BOUND + row, bound)
        if not PLAIN:
            token = 0
            if finite & (limit == 0):
                shift = tl.zeros([PAD], tl.float32)
                if temperature > 0.0:  # scores are relative to the greatest logit of their block
                    shift = shift_of(part_of(floats_ptr, PEAK, row, count, BLOCKS, PAD, float("-inf")), top, inverse)
                token = winner_of(floats_ptr, tokens_ptr, row, count, shift, BLOCKS, PAD)
            tl.store(out_ptr + row, token)
            tl.store(out_ptr + count + row, finite.to(tl.int32))
            tl.store(rows_ptr + count * STATE + row, tl.where(finite & filtered & (limit == 0), token, -1))


@triton.jit
def enlist(
    x, at, bound, row, count, rows_ptr, value_ptr, id_ptr, LISTED: tl.constexpr
):  # fmt: skip
    """Adds the tokens ``at`` of logits ``x`` that reach ``bound`` to the row's list, in any order."""
    passing = (order(x) >= bound) & (x > float("-inf"))
    counter = rows_ptr + count * LISTING + row + tl.zeros_like(at)
    place = tl.atomic_add(counter, tl.full(at.shape, 1, tl.int32), passing, sem="relaxed")
    kept = passing & (place < LISTED)
    tl.store(value_ptr + row * LISTED + place, x, kept)
    tl.store(id_ptr + row * LISTED + place, at, kept)


@triton.jit
def listed_of(rows_ptr, value_ptr, id_ptr, row, count, LISTED: tl.constexpr):
    """(how many reach the bound, values, tokens) of a row's list."""
    found = tl.load(rows_ptr + count * LISTING + row, cache_modifier=".cg")
    at = tl.arange(0, LISTED)
    x = tl.load(value_ptr + row * LISTED + at, at < found, float("-inf"), cache_modifier=".cg")
    ids = tl.load(id_ptr + row * LISTED + at, at < found, 0, cache_modifier=".cg")
    return found, x, ids


class Scratch:
    """Memory of the launches over one batch, and the numbers of their grids. The next batch of the same shape may have
    it: its launches come later in the same stream."""

    def __init__(self, device: torch.device, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.blocks = triton.cdiv(self.size, BLOCK_SIZE)
        self.pad = triton.next_power_of_2(self.blocks)
        self.grid, self.groups = (self.count, self.blocks), self.blocks * (BLOCK_SIZE // GROUP_SIZE)
        self.floats = torch.empty((5, *self.grid), dtype=torch.float32, device=device)
        self.tokens = torch.empty(self.grid, dtype=torch.int32, device=device)
        self.group = torch.empty((self.count, self.groups), dtype=torch.float32, device=device)
        self.rows = torch.empty((5, self.count), dtype=torch.int32, device=device)
        self.arrived = _counters(device)
        self.values = torch.empty((count, MOST_LISTED), dtype=torch.float32, device=device)
        self.ids = torch.empty((count, MOST_LISTED), dtype=torch.int32, device=device)
        self.card, self.chain = is_card(device), chained(device)

    def survey(
        self,
        x: torch.Tensor,
        edits: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
        out: torch.Tensor,
        limit: int = 0,
    ) -> None:
        """``edits``: settings, bits and what was seen; None: without settings."""
        settings, bits, seen = edits or (self.rows, self.rows, self.rows)
        _survey_kernel[self.grid](
            x, settings, bits, seen, self.floats, self.tokens, self.group, self.rows, out, self.arrived,
            x.stride(0), self.count, bits.shape[1], limit, self.size, self.blocks, self.pad, BLOCK_SIZE, GROUP_SIZE,
            triton.next_power_of_2(self.groups), edits is None, self.card, self.chain,
            num_warps=WARPS, launch_pdl=self.chain,
        )  # fmt: skip


@lru_cache(maxsize=4)
def scratch_of(device: torch.device, count: int, size: int) -> Scratch:
    return Scratch(device, count, size)


def is_card(device: torch.device) -> bool:
    """Whether it has NVIDIA's instructions; Triton's interpreter has not."""
    return device.type == "cuda"


@cache
def _counters(device: torch.device) -> torch.Tensor:
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)
