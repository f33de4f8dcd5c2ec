"""Sampling in Triton: the tokens of `kernels.sampling`, each row with its own settings, in a few passes without a sort.

A row of logits is cut into blocks, and a block into groups. `_survey_kernel` finds of each block the greatest logit,
the mass and the winner of the race (see `kernels.sampling`), of each group the greatest logit; the last of a row's
programs to arrive joins them. The rest depends on the row's settings:

- no filter: the winner of all blocks is the token;
- top_k: the k-th greatest of the groups is at most the k-th greatest of the row, and few tokens reach it. They are
  listed, and thresholds and race are exact on the list;
- top_p or min_p alone: the winner of the race is the token if it passes the filter, which the mass above it decides.
  Otherwise neither it nor a less likely token passes, and the race goes on among the likelier ones; in expectation
  it takes 1 - log(top_p) rounds. `ROUNDS` of them are by all programs together, the others by one.

Masks and penalties are applied wherever logits are read (`race_triton.edited`); the logits stay as they are. Masses are
summed in float32 within a block and in float64 over blocks. Nothing depends on other rows of the batch.
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
    contest,
    edited,
    exact,
    exact_of_list,
    float_of,
    floor_of,
    inverse_of,
    order,
    score_of,
    shift_of,
    weight_of,
)

ROUNDS = 2
_BLOCK, _GROUP, _WARPS = 2048, 128, 4
_LISTED = 1024  # tokens at most that are listed of a row; others are looked at in the row itself, so many at once

# Parts of the float32 scratch [5, S, blocks]: the greatest logit, the mass, the greatest score, the mass above the
# token that is judged, the mass that min_p leaves.
PEAK, MASS, SCORE, ABOVE, FLOOR = (tl.constexpr(part) for part in range(5))
# Rows of the int32 scratch [5, S]: the token that the next round judges, -1 if there is none; the bound of the list,
# how many reach it; how many tokens are above the one whose rank is asked for; the bits of the greatest logit.
STATE, BOUND, LISTING, RANK, TOP = (tl.constexpr(row) for row in range(5))


@triton.jit
def _part(floats, part: tl.constexpr, row, count, BLOCKS: tl.constexpr, PAD: tl.constexpr, other):
    """A row's numbers of all blocks, which other programs of the launch may have written."""
    block = tl.arange(0, PAD)
    return tl.load(floats + (count * part + row) * BLOCKS + block, block < BLOCKS, other, cache_modifier=".cg")


@triton.jit
def _winner(floats, tokens_ptr, row, count, shift, BLOCKS: tl.constexpr, PAD: tl.constexpr):
    """The token of the greatest score of all blocks, each of them shifted, the lowest of equals."""
    block = tl.arange(0, PAD)
    tokens = tl.load(tokens_ptr + row * BLOCKS + block, block < BLOCKS, 0x7FFFFFFF, cache_modifier=".cg")
    _best, token = best_of(_part(floats, SCORE, row, count, BLOCKS, PAD, float("-inf")) + shift, tokens)
    return token


@triton.jit
def _total(floats, row, count, top, inverse, BLOCKS: tl.constexpr, PAD: tl.constexpr):
    """The mass of the row, in weights relative to its greatest logit."""
    peaks = _part(floats, PEAK, row, count, BLOCKS, PAD, float("-inf"))
    masses = _part(floats, MASS, row, count, BLOCKS, PAD, 0.0)
    return tl.sum(masses.to(tl.float64) * weight_of(peaks, top, inverse).to(tl.float64))


@triton.jit
def _arrives_last(arrived_ptr, row, BLOCKS: tl.constexpr):
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
    if _arrives_last(arrived_ptr, row, BLOCKS):
        top = tl.max(_part(floats_ptr, PEAK, row, count, BLOCKS, PAD, float("-inf")))
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
                    shift = shift_of(_part(floats_ptr, PEAK, row, count, BLOCKS, PAD, float("-inf")), top, inverse)
                token = _winner(floats_ptr, tokens_ptr, row, count, shift, BLOCKS, PAD)
            tl.store(out_ptr + row, token)
            tl.store(out_ptr + count + row, finite.to(tl.int32))
            tl.store(rows_ptr + count * STATE + row, tl.where(finite & filtered & (limit == 0), token, -1))


@triton.jit
def _list(
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
def _listed(rows_ptr, value_ptr, id_ptr, row, count, LISTED: tl.constexpr):
    """(how many reach the bound, values, tokens) of a row's list."""
    found = tl.load(rows_ptr + count * LISTING + row, cache_modifier=".cg")
    at = tl.arange(0, LISTED)
    x = tl.load(value_ptr + row * LISTED + at, at < found, float("-inf"), cache_modifier=".cg")
    ids = tl.load(id_ptr + row * LISTED + at, at < found, 0, cache_modifier=".cg")
    return found, x, ids


@triton.jit(
    do_not_specialize=["count", "words"],
    do_not_specialize_on_alignment=["settings_ptr", "bits_ptr", "seen_ptr", "out_ptr"],
)
def _select_kernel(
    x_ptr, settings_ptr, bits_ptr, seen_ptr, group_ptr, rows_ptr, value_ptr, id_ptr, out_ptr, arrived_ptr,
    stride, count, words, SIZE,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr, CARD: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists what a row's top_k may keep; the last program decides by the list."""
    row, block = tl.program_id(0), tl.program_id(1)
    groups: tl.constexpr = BLOCK // GROUP
    release(CHAINED)
    wait(CHAINED)
    top_k = tl.load(settings_ptr + count * TOP_K + row)
    top = tl.load(rows_ptr + count * TOP + row).to(tl.float32, bitcast=True)
    if (top_k > 0) & (tl.abs(top) < float("inf")):
        x_ptr += row.to(tl.int64) * stride
        bound = tl.load(rows_ptr + count * BOUND + row)
        group = block * groups + tl.arange(0, groups)
        reaching = order(tl.load(group_ptr + row * BLOCKS * groups + group)) >= bound
        if tl.max(reaching.to(tl.int32)) > 0:
            at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            live = (at < SIZE) & reaching[:, None]
            x = edited(x_ptr, settings_ptr, bits_ptr, seen_ptr, row, count, words, SIZE, at, live)
            _list(tl.where(live, x, float("-inf")), at, bound, row, count, rows_ptr, value_ptr, id_ptr, LISTED)
        if _arrives_last(arrived_ptr, row, BLOCKS):
            inverse = inverse_of(float_of(settings_ptr, TEMPERATURE, count, row))
            top_p, floor = float_of(settings_ptr, TOP_P, count, row), float_of(settings_ptr, MIN_P, count, row)
            floor = floor_of(top, inverse, floor)
            key0, key1 = tl.load(settings_ptr + count * KEY0 + row), tl.load(settings_ptr + count * KEY1 + row)
            found, x, ids = _listed(rows_ptr, value_ptr, id_ptr, row, count, LISTED)
            if found <= LISTED:
                token = exact_of_list(x, ids, bound, key0, key1, top_k, top_p, floor, top, inverse, CARD)
            else:
                token = exact(
                    x_ptr, settings_ptr, bits_ptr, seen_ptr, row, count, words, SIZE, key0, key1, top_k, top_p, floor,
                    top, inverse, LISTED, CARD,
                )  # fmt: skip
            tl.store(out_ptr + row, token)


@triton.jit(
    do_not_specialize=["count", "words"],
    do_not_specialize_on_alignment=["settings_ptr", "bits_ptr", "seen_ptr", "out_ptr"],
)
def _round_kernel(
    x_ptr, settings_ptr, bits_ptr, seen_ptr, floats_ptr, tokens_ptr, rows_ptr, out_ptr, arrived_ptr,
    stride, count, words, SIZE, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCKS: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CARD: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Judges the token of each row's state, and finds who is next; the last program of the ``LAST`` round goes on
    alone until one passes."""
    row, block = tl.program_id(0), tl.program_id(1)
    release(CHAINED)
    wait(CHAINED)
    state = tl.load(rows_ptr + count * STATE + row)
    if state >= 0:
        x_ptr += row.to(tl.int64) * stride
        place, part = row * BLOCKS + block, count * BLOCKS
        top = tl.load(rows_ptr + count * TOP + row).to(tl.float32, bitcast=True)
        inverse = inverse_of(float_of(settings_ptr, TEMPERATURE, count, row))
        top_p, min_p = float_of(settings_ptr, TOP_P, count, row), float_of(settings_ptr, MIN_P, count, row)
        floor = floor_of(top, inverse, min_p)
        key0, key1 = tl.load(settings_ptr + count * KEY0 + row), tl.load(settings_ptr + count * KEY1 + row)
        pivot = edited(x_ptr, settings_ptr, bits_ptr, seen_ptr, row, count, words, SIZE, state, state >= 0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        x = edited(x_ptr, settings_ptr, bits_ptr, seen_ptr, row, count, words, SIZE, at, at < SIZE)
        weight = weight_of(x, top, inverse)
        tl.store(floats_ptr + part * ABOVE + place, tl.sum(tl.where(x > pivot, weight, 0.0)))
        if FIRST:
            tl.store(floats_ptr + part * FLOOR + place, tl.sum(tl.where(x >= floor, weight, 0.0)))
        score = tl.where((x > pivot) & (x >= floor), score_of(x, top, at, key0, key1, inverse, CARD), float("-inf"))
        best, token = best_of(score, at)
        tl.store(floats_ptr + part * SCORE + place, best)
        tl.store(tokens_ptr + place, token)
        if _arrives_last(arrived_ptr, row, BLOCKS):
            above = tl.sum(_part(floats_ptr, ABOVE, row, count, BLOCKS, PAD, 0.0).to(tl.float64))
            mass = tl.sum(_part(floats_ptr, FLOOR, row, count, BLOCKS, PAD, 0.0).to(tl.float64))
            if min_p <= 0.0:
                mass = _total(floats_ptr, row, count, top, inverse, BLOCKS, PAD)
            target = tl.where(top_p < 1.0, mass * top_p.to(tl.float64), float("inf"))
            passes = (above == 0.0) | ((pivot >= floor) & (above < target))
            if not passes:
                state = _winner(floats_ptr, tokens_ptr, row, count, 0.0, BLOCKS, PAD)
            if LAST:
                while not passes:
                    pivot = edited(x_ptr, settings_ptr, bits_ptr, seen_ptr, row, count, words, SIZE, state, state >= 0)
                    above, token = contest(
                        x_ptr, settings_ptr, bits_ptr, seen_ptr, row, count, words, SIZE, pivot, floor, key0, key1,
                        top, inverse, TILE, CARD,
                    )  # fmt: skip
                    passes = (above == 0.0) | ((pivot >= floor) & (above < target))
                    state = tl.where(passes, state, token)
            tl.store(out_ptr + row, state)
            tl.store(rows_ptr + count * STATE + row, tl.where(passes, -1, state))


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
        _list(x, at, bound, row, count, rows_ptr, value_ptr, id_ptr, LISTED)
    if _arrives_last(arrived_ptr, row, BLOCKS):
        top = tl.load(rows_ptr + count * TOP + row).to(tl.float32, bitcast=True)
        total = top + tl.log(_total(floats_ptr, row, count, top, 1.0, BLOCKS, PAD)).to(tl.float32)
        out_ptr += row * (2 + 2 * MOST)
        tl.store(out_ptr, (own - total).to(tl.int32, bitcast=True))
        tl.store(out_ptr + 1, tl.load(rows_ptr + count * RANK + row, cache_modifier=".cg") + 1)
        found, values, ids = _listed(rows_ptr, value_ptr, id_ptr, row, count, LISTED)
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


class _Scratch:
    """Memory of the launches over one batch, and the numbers of their grids. The next batch of the same shape may have
    it: its launches come later in the same stream."""

    def __init__(self, device: torch.device, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.blocks = triton.cdiv(self.size, _BLOCK)
        self.pad = triton.next_power_of_2(self.blocks)
        self.grid, self.groups = (self.count, self.blocks), self.blocks * (_BLOCK // _GROUP)
        self.floats = torch.empty((5, *self.grid), dtype=torch.float32, device=device)
        self.tokens = torch.empty(self.grid, dtype=torch.int32, device=device)
        self.group = torch.empty((self.count, self.groups), dtype=torch.float32, device=device)
        self.rows = torch.empty((5, self.count), dtype=torch.int32, device=device)
        self.arrived = _counters(device)
        self.values = torch.empty((count, _LISTED), dtype=torch.float32, device=device)
        self.ids = torch.empty((count, _LISTED), dtype=torch.int32, device=device)
        self.card, self.chain = device.type == "cuda", chained(device)

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
            x.stride(0), self.count, bits.shape[1], limit, self.size, self.blocks, self.pad, _BLOCK, _GROUP,
            triton.next_power_of_2(self.groups), edits is None, self.card, self.chain,
            num_warps=_WARPS, launch_pdl=self.chain,
        )  # fmt: skip


@lru_cache(maxsize=4)
def _scratch(device: torch.device, count: int, size: int) -> _Scratch:
    return _Scratch(device, count, size)


@cache
def _counters(device: torch.device) -> torch.Tensor:
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def draw(
    x: torch.Tensor, settings: torch.Tensor, bits: torch.Tensor, seen: torch.Tensor, listed: bool, raced: bool
) -> torch.Tensor:
    """int32 ``[2, S]``: the token of each row of ``x[S, V]`` under its column of ``settings``, see `sampling.Setting`,
    and 1 if its greatest logit is finite; else 0 and 0.

    Settings name rows of ``bits``, see `sampling.allowed_bias`, and of ``seen``, see `runtime.penalties`. ``listed``:
    some row has a top_k; ``raced``: some row has a top_p or min_p and no top_k. A temperature of 0 is greedy: the
    lowest of the greatest logits.
    """
    scratch = _scratch(x.device, *x.shape)
    out = torch.empty((2, scratch.count), dtype=torch.int32, device=x.device)
    scratch.survey(x, (settings, bits, seen), out)
    words, card, chain = bits.shape[1], scratch.card, scratch.chain
    if listed:
        _select_kernel[scratch.grid](
            x, settings, bits, seen, scratch.group, scratch.rows, scratch.values, scratch.ids, out, scratch.arrived,
            x.stride(0), scratch.count, words, scratch.size, scratch.blocks, _BLOCK, _GROUP, _LISTED, card, chain,
            num_warps=_WARPS, launch_pdl=chain,
        )  # fmt: skip
    for number in range(ROUNDS) if raced else ():
        _round_kernel[scratch.grid](
            x, settings, bits, seen, scratch.floats, scratch.tokens, scratch.rows, out, scratch.arrived,
            x.stride(0), scratch.count, words, scratch.size, number == 0, number == ROUNDS - 1, scratch.blocks,
            scratch.pad, _BLOCK, _LISTED, card, chain, num_warps=_WARPS, maxnreg=64, launch_pdl=chain,
        )  # fmt: skip
    return out


def logprobs(x: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """See `sampling.packed_logprobs`; of equal tokens the lowest come first."""
    scratch = _scratch(x.device, *x.shape)
    count = min(count, scratch.size)
    out = torch.empty((scratch.count, 2 + 2 * count), dtype=torch.int32, device=x.device)
    scratch.survey(x, None, out, count if count <= scratch.groups else 0)
    _likeliest_kernel[scratch.grid](
        x, tokens, scratch.floats, scratch.group, scratch.rows, scratch.values, scratch.ids, out, scratch.arrived,
        x.stride(0), scratch.count, scratch.size, count, scratch.blocks, scratch.pad, _BLOCK, _GROUP, _LISTED,
        scratch.chain, num_warps=_WARPS, launch_pdl=scratch.chain,
    )  # fmt: skip
    return out
