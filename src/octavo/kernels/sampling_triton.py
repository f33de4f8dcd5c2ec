"""Sampling in Triton: the tokens of `kernels.sampling`, each row with its own settings, in a few passes without a sort.

After the survey (`survey_triton`) the rest depends on the row's settings:

- no filter: the winner of all blocks is the token;
- top_k: the k-th greatest of the groups is at most the k-th greatest of the row, and few tokens reach it. They are
  listed, and thresholds and race are exact on the list;
- top_p or min_p alone: the winner of the race is the token if it passes the filter, which the mass above it decides.
  Otherwise neither it nor a less likely token passes, and the race goes on among the likelier ones; in expectation
  it takes 1 - log(top_p) rounds. `ROUNDS` of them are by all programs together, the others by one.

Masks and penalties are applied wherever logits are read (`race_triton.edited`); the logits stay as they are. Nothing
depends on other rows of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.pdl import release, wait
from octavo.kernels.race_triton import (
    KEY0,
    KEY1,
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    best_of,
    contest,
    edited,
    exact,
    exact_of_list,
    float_of,
    floor_of,
    inverse_of,
    order,
    score_of,
    weight_of,
)
from octavo.kernels.survey_triton import (
    ABOVE,
    BLOCK_SIZE,
    BOUND,
    FLOOR,
    GROUP_SIZE,
    MOST_LISTED,
    SCORE,
    STATE,
    TOP,
    WARPS,
    arrives_last,
    enlist,
    listed_of,
    part_of,
    scratch_of,
    total_of,
    winner_of,
)

ROUNDS = 2


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
            enlist(tl.where(live, x, float("-inf")), at, bound, row, count, rows_ptr, value_ptr, id_ptr, LISTED)
        if arrives_last(arrived_ptr, row, BLOCKS):
            inverse = inverse_of(float_of(settings_ptr, TEMPERATURE, count, row))
            top_p, floor = float_of(settings_ptr, TOP_P, count, row), float_of(settings_ptr, MIN_P, count, row)
            floor = floor_of(top, inverse, floor)
            key0, key1 = tl.load(settings_ptr + count * KEY0 + row), tl.load(settings_ptr + count * KEY1 + row)
            found, x, ids = listed_of(rows_ptr, value_ptr, id_ptr, row, count, LISTED)
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
        if arrives_last(arrived_ptr, row, BLOCKS):
            above = tl.sum(part_of(floats_ptr, ABOVE, row, count, BLOCKS, PAD, 0.0).to(tl.float64))
            mass = tl.sum(part_of(floats_ptr, FLOOR, row, count, BLOCKS, PAD, 0.0).to(tl.float64))
            if min_p <= 0.0:
                mass = total_of(floats_ptr, row, count, top, inverse, BLOCKS, PAD)
            target = tl.where(top_p < 1.0, mass * top_p.to(tl.float64), float("inf"))
            passes = (above == 0.0) | ((pivot >= floor) & (above < target))
            if not passes:
                state = winner_of(floats_ptr, tokens_ptr, row, count, 0.0, BLOCKS, PAD)
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


def draw(
    x: torch.Tensor, settings: torch.Tensor, bits: torch.Tensor, seen: torch.Tensor, listed: bool, raced: bool
) -> torch.Tensor:
    """int32 ``[2, S]``: the token of each row of ``x[S, V]`` under its column of ``settings``, see `sampling.Setting`,
    and 1 if its greatest logit is finite; else 0 and 0.

    Settings name rows of ``bits``, see `sampling.allowed_bias`, and of ``seen``, see `runtime.penalties`. ``listed``:
    some row has a top_k; ``raced``: some row has a top_p or min_p and no top_k. A temperature of 0 is greedy: the
    lowest of the greatest logits.
    """
    scratch = scratch_of(x.device, *x.shape)
    out = torch.empty((2, scratch.count), dtype=torch.int32, device=x.device)
    scratch.survey(x, (settings, bits, seen), out)
    words, card, chain = bits.shape[1], scratch.card, scratch.chain
    if listed:
        _select_kernel[scratch.grid](
            x, settings, bits, seen, scratch.group, scratch.rows, scratch.values, scratch.ids, out, scratch.arrived,
            x.stride(0), scratch.count, words, scratch.size, scratch.blocks, BLOCK_SIZE, GROUP_SIZE, MOST_LISTED, card,
            chain, num_warps=WARPS, launch_pdl=chain,
        )  # fmt: skip
    for number in range(ROUNDS) if raced else ():
        _round_kernel[scratch.grid](
            x, settings, bits, seen, scratch.floats, scratch.tokens, scratch.rows, out, scratch.arrived,
            x.stride(0), scratch.count, words, scratch.size, number == 0, number == ROUNDS - 1, scratch.blocks,
            scratch.pad, BLOCK_SIZE, MOST_LISTED, card, chain, num_warps=WARPS, maxnreg=64, launch_pdl=chain,
        )  # fmt: skip
    return out
