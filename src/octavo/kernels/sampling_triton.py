"""Sampling in Triton: the tokens of `kernels.sampling`, each row with its own settings, in a few passes without a sort.

A row of logits is cut into blocks, and a block into groups. `_survey_kernel` finds of each block the greatest logit,
the mass and the winner of the race (see `kernels.sampling`), of each group the greatest logit. The rest depends on the
row's settings:

- no filter: the winner of all blocks is the token;
- top_k: the k-th greatest of the groups is at most the k-th greatest of the row, and few tokens reach it. They are
  listed, and thresholds and race are exact on the list;
- top_p or min_p alone: the winner of the race is the token if it passes the filter, which the mass above it decides.
  Otherwise neither it nor a less likely token passes, and the race goes on among the likelier ones. That is repeated
  `ROUNDS` times by all programs together, and where it does not settle a row, one program finds its thresholds.

Masses are summed in float32 within a block and in float64 over blocks. Nothing depends on other rows of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.pdl import chained, release, wait

# Rows of the int32 ``settings[FIELDS, S]``; floats by their bits. No mask, no penalties: -1 as place, as slot.
KEY0, KEY1, TOP_K, TEMPERATURE, TOP_P, MIN_P, PLACE, SLOT, LENGTH, REPETITION, PRESENCE, FREQUENCY = range(12)
FIELDS = 12
ROUNDS = 6
_BLOCK, _GROUP = 4096, 128
_LISTED = 1024  # tokens at most that are listed of a row; others are looked at in the row itself
_LEAST = tl.constexpr(-0x80000000)


@triton.jit
def float_of(settings, field: tl.constexpr, count, row):
    return tl.load(settings + field * count + row).to(tl.float32, bitcast=True)


@triton.jit
def _order(x):
    """An int32 that orders as the float32 ``x`` does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _log1p(z):
    """Of -1 < z <= 0, to the last bit but one, which the fast logarithm is not (method of FreeBSD's e_logf.c)."""
    w = 1.0 + z
    lost = (z - (w - 1.0)) / w
    bits = w.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    s2 = s * s
    s4 = s2 * s2
    series = s4 * (0.40000972152 + s4 * 0.24279078841) + s2 * (0.66666662693 + s4 * 0.28498786688)
    half = 0.5 * f * f
    e = exponent.to(tl.float32)
    return e * 0.69313812256 - ((half - (s * (half + series) + (e * 9.0580006145e-06 + lost))) - f)


@triton.jit
def _exponential(token, key0, key1):
    """See `sampling.exponential`."""
    h = token * -0x61C8864F + key0
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D + key1
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975
    h = h ^ (h >> 16)
    return -_log1p(h.to(tl.float32) * -4.656612318e-10 - 2.3283064365386963e-10)


@triton.jit
def _weight(x, top, inverse):
    """exp((x - top) / temperature); 0 for what is masked, also if all is."""
    return tl.where(x > float("-inf"), tl.exp((x - top) * inverse), 0.0)


@triton.jit
def _inverse(temperature):
    """Of a greedy row, whose temperature is 0, that of 1."""
    return 1.0 / tl.where(temperature > 0.0, temperature, 1.0)


@triton.jit
def _top(peak_ptr, row, BLOCKS: tl.constexpr, PAD: tl.constexpr):
    """The greatest logit of the row."""
    block = tl.arange(0, PAD)
    return tl.max(tl.load(peak_ptr + row * BLOCKS + block, block < BLOCKS, float("-inf")))


@triton.jit
def _winner(score_ptr, at_ptr, row, BLOCKS: tl.constexpr, PAD: tl.constexpr):
    """(token, score) of the best of all blocks, the lowest token of equals; scores below 0 are of nobody."""
    block = tl.arange(0, PAD)
    scores = tl.load(score_ptr + row * BLOCKS + block, block < BLOCKS, -1.0)
    tokens = tl.load(at_ptr + row * BLOCKS + block, block < BLOCKS, 0)
    best = tl.max(scores)
    return tl.min(tl.where(scores == best, tokens, 0x7FFFFFFF)), best


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["mass_ptr", "score_ptr", "at_ptr"])
def _survey_kernel(
    x_ptr, settings_ptr, peak_ptr, mass_ptr, score_ptr, at_ptr, group_ptr, zeros_ptr, stride, count, SIZE,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, PLAIN: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """``PLAIN``: without settings, for log-probabilities; no race is run. ``zeros_ptr[2, count]`` becomes zeros."""
    row, block = tl.program_id(0), tl.program_id(1)
    release(CHAINED)
    wait(CHAINED)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row.to(tl.int64) * stride + at, at < SIZE, float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    place = row * BLOCKS + block
    top = tl.max(x)
    tl.store(peak_ptr + place, top)
    groups: tl.constexpr = BLOCK // GROUP
    tl.store(group_ptr + place * groups + tl.arange(0, groups), tl.max(tl.reshape(x, [groups, GROUP]), 1))
    if block == 0:
        tl.store(zeros_ptr + row, 0)
        tl.store(zeros_ptr + count + row, 0)
    temperature = 1.0
    if not PLAIN:
        temperature = float_of(settings_ptr, 3, count, row)
    weight = _weight(x, top, _inverse(temperature))
    tl.store(mass_ptr + place, tl.sum(weight))
    if not PLAIN:
        score = weight / _exponential(at, tl.load(settings_ptr + row), tl.load(settings_ptr + count + row))
        score = tl.where(temperature > 0.0, score, (x == top).to(tl.float32))
        best, index = tl.max(score, 0, return_indices=True)
        tl.store(score_ptr + place, best)
        tl.store(at_ptr + place, block * BLOCK + index)


@triton.jit
def _scaled_winner(peak_ptr, score_ptr, at_ptr, row, top, inverse, BLOCKS: tl.constexpr, PAD: tl.constexpr):
    """As `_winner` of a survey, whose scores are relative to the greatest logit of each block."""
    block = tl.arange(0, PAD)
    live = block < BLOCKS
    peaks = tl.load(peak_ptr + row * BLOCKS + block, live, float("-inf"))
    scores = tl.load(score_ptr + row * BLOCKS + block, live, 0.0) * _weight(peaks, top, inverse)
    scores = tl.where(live, scores, -1.0)
    tokens = tl.load(at_ptr + row * BLOCKS + block, live, 0)
    return tl.min(tl.where(scores == tl.max(scores), tokens, 0x7FFFFFFF))


@triton.jit
def _total(peak_ptr, mass_ptr, row, top, inverse, BLOCKS: tl.constexpr, PAD: tl.constexpr):
    """The mass of the row, in weights relative to its greatest logit."""
    block = tl.arange(0, PAD)
    live = block < BLOCKS
    peaks = tl.load(peak_ptr + row * BLOCKS + block, live, float("-inf"))
    masses = tl.load(mass_ptr + row * BLOCKS + block, live, 0.0)
    return tl.sum(masses.to(tl.float64) * _weight(peaks, top, inverse).to(tl.float64))


@triton.jit(do_not_specialize_on_alignment=["limit_ptr"])
def _bound_kernel(
    limit_ptr, group_ptr, bound_ptr, GROUPS: tl.constexpr, PAD: tl.constexpr, CHAINED: tl.constexpr
):  # fmt: skip
    """An order (see `_order`) that ``limit_ptr[row]`` groups of the row reach, and hardly more."""
    row = tl.program_id(0)
    release(CHAINED)
    wait(CHAINED)
    limit = tl.load(limit_ptr + row)
    group = tl.arange(0, PAD)
    keys = _order(tl.load(group_ptr + row * GROUPS + group, group < GROUPS, float("-inf"))) >> 12
    low, high = -0x80000, 0x7FFFF
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        reached = tl.sum((keys >= middle).to(tl.int32)) >= limit
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    tl.store(bound_ptr + row, low << 12)


@triton.jit(
    do_not_specialize=["count"], do_not_specialize_on_alignment=["limit_ptr", "token_ptr", "listed_ptr", "above_ptr"]
)
def _gather_kernel(
    x_ptr, limit_ptr, bound_ptr, token_ptr, listed_ptr, value_ptr, id_ptr, above_ptr, stride, count, SIZE,
    BLOCK: tl.constexpr, LISTED: tl.constexpr, RANKED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Lists the tokens of an order of at least ``bound_ptr[row]``, in any order, if ``limit_ptr[row]`` is not 0;
    ``RANKED``: counts those above the logit of ``token_ptr[row]`` too."""
    row, block = tl.program_id(0), tl.program_id(1)
    release(CHAINED)
    wait(CHAINED)
    limit = tl.load(limit_ptr + row)
    at = block * BLOCK + tl.arange(0, BLOCK)
    live = at < SIZE
    x_ptr += row.to(tl.int64) * stride
    if (limit > 0) | RANKED:
        x = tl.load(x_ptr + at, live, float("-inf")).to(tl.float32)
        if RANKED:
            own = tl.load(x_ptr + tl.load(token_ptr + row)).to(tl.float32)
            tl.atomic_add(above_ptr + row, tl.sum((x > own).to(tl.int32)))
        if limit > 0:
            low = tl.load(bound_ptr + row)
            passing = live & (_order(x) >= low) & (x > float("-inf"))
            found = tl.sum(passing.to(tl.int32))
            if found > 0:
                first = tl.atomic_add(listed_ptr + row, found)
                place = first + tl.cumsum(passing.to(tl.int32), 0) - 1
                kept = passing & (place < LISTED)
                tl.store(value_ptr + row * LISTED + place, x, kept)
                tl.store(id_ptr + row * LISTED + place, at, kept)


@triton.jit(
    do_not_specialize=["count", "number"],
    do_not_specialize_on_alignment=["mass_ptr", "score_ptr", "at_ptr", "above_ptr", "floor_ptr"],
)
def _round_kernel(
    x_ptr, settings_ptr, peak_ptr, mass_ptr, score_ptr, at_ptr, above_ptr, floor_ptr, state_ptr, stride, count,
    number, SIZE, FIRST: tl.constexpr, BLOCKS: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """One round of the race of rows with top_p or min_p and without top_k.

    Arrays have a part for each round, number 0 being the survey's. ``state_ptr[round, row]``: the token that the round
    judges, or -1 - the token that is settled.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    release(CHAINED)
    wait(CHAINED)
    top_p, min_p = float_of(settings_ptr, 4, count, row), float_of(settings_ptr, 5, count, row)
    filtered = (tl.load(settings_ptr + 2 * count + row) == 0) & ((top_p < 1.0) | (min_p > 0.0))
    top = _top(peak_ptr, row, BLOCKS, PAD)
    if filtered & (tl.abs(top) < float("inf")):
        x_ptr += row.to(tl.int64) * stride
        inverse = _inverse(float_of(settings_ptr, 3, count, row))
        floor = _floor(top, inverse, min_p)
        part = count * BLOCKS
        if FIRST:
            token = _scaled_winner(peak_ptr, score_ptr, at_ptr, row, top, inverse, BLOCKS, PAD)
            state = token
        else:
            state = _judged(
                x_ptr, peak_ptr, mass_ptr, above_ptr, floor_ptr, state_ptr, row, count, part, top, inverse, floor,
                top_p, min_p, number - 1, BLOCKS, PAD,
            )  # fmt: skip
            if state < -SIZE:  # the one judged did not pass
                state, _score = _winner(score_ptr + (number - 1) * part, at_ptr + (number - 1) * part, row, BLOCKS, PAD)
        if block == 0:
            tl.store(state_ptr + number * count + row, state)
        if state >= 0:
            pivot = tl.load(x_ptr + state).to(tl.float32)
            at = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, at < SIZE, float("-inf")).to(tl.float32)
            weight = _weight(x, top, inverse)
            place = number * part + row * BLOCKS + block
            tl.store(above_ptr + place, tl.sum(tl.where(x > pivot, weight, 0.0)))
            if FIRST:
                tl.store(floor_ptr + row * BLOCKS + block, tl.sum(tl.where(x >= floor, weight, 0.0)))
            score = weight / _exponential(at, tl.load(settings_ptr + row), tl.load(settings_ptr + count + row))
            score = tl.where((x > pivot) & (x >= floor), score, -1.0)
            best, index = tl.max(score, 0, return_indices=True)
            tl.store(score_ptr + place, best)
            tl.store(at_ptr + place, block * BLOCK + index)


@triton.jit
def _floor(top, inverse, min_p):
    """The least logit that min_p lets through."""
    return tl.where(min_p > 0.0, top + tl.log(min_p) / inverse, float("-inf"))


@triton.jit
def _judged(
    x_ptr, peak_ptr, mass_ptr, above_ptr, floor_ptr, state_ptr, row, count, part, top, inverse, floor, top_p, min_p,
    number, BLOCKS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """What round ``number`` found: -1 - the settled token, or the least int32 if the one it judged does not pass."""
    state = tl.load(state_ptr + number * count + row)
    if state >= 0:
        block = tl.arange(0, PAD)
        live = block < BLOCKS
        above = tl.sum(tl.load(above_ptr + number * part + row * BLOCKS + block, live, 0.0).to(tl.float64))
        mass = tl.sum(tl.load(floor_ptr + row * BLOCKS + block, live, 0.0).to(tl.float64))
        if min_p <= 0.0:
            mass = _total(peak_ptr, mass_ptr, row, top, inverse, BLOCKS, PAD)
        own = tl.load(x_ptr + state).to(tl.float32)
        passes = (own >= floor) & ((top_p >= 1.0) | (above < mass * top_p.to(tl.float64)))
        state = tl.where(passes, -1 - state, _LEAST)
    return state


@triton.jit
def _reach(value_ptr, count, bound, BLOCK: tl.constexpr):
    """How many values have an order of at least ``bound``."""
    found = 0
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        keys = _order(tl.load(value_ptr + at, at < count, float("-inf")).to(tl.float32))
        found += tl.sum(((keys >= bound) & (at < count)).to(tl.int32))
    return found


@triton.jit
def _mass_from(value_ptr, count, bound, top, inverse, BLOCK: tl.constexpr):
    """The mass of the values with an order of at least ``bound``."""
    mass = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(value_ptr + at, at < count, float("-inf")).to(tl.float32)
        mass += tl.where(_order(x) >= bound, _weight(x, top, inverse), 0.0).to(tl.float64)
    return tl.sum(mass)


@triton.jit
def _exact(value_ptr, count, key0, key1, top_k, top_p, floor, top, inverse, BLOCK: tl.constexpr):
    """The token that the filters and the race leave of a row's ``count`` values."""
    bound = _order(floor)
    if top_k > 0:
        low, high = _LEAST, _order(top)
        while low < high:  # to the greatest order that top_k values reach
            middle = (low | high) - ((low ^ high) >> 1)
            reached = _reach(value_ptr, count, middle, BLOCK) >= top_k
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle - 1)
        bound = tl.maximum(bound, low)
    if top_p < 1.0:
        target = _mass_from(value_ptr, count, bound, top, inverse, BLOCK) * top_p.to(tl.float64)
        low, high = bound, _order(top)
        while low < high:  # to the least order above which there is less than the target
            middle = (low & high) + ((low ^ high) >> 1)
            enough = _mass_from(value_ptr, count, middle + 1, top, inverse, BLOCK) < target
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        bound = high
    best, winner = -1.0, 0x7FFFFFFF
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        live = at < count
        x = tl.load(value_ptr + at, live, float("-inf")).to(tl.float32)
        score = _weight(x, top, inverse) / _exponential(at, key0, key1)
        score = tl.where(live & (_order(x) >= bound), score, -1.0)
        most = tl.max(score)
        token = tl.min(tl.where(score == most, at, 0x7FFFFFFF))
        winner = tl.where(most > best, token, winner)
        best = tl.maximum(best, most)
    return winner


@triton.jit
def _exact_of_list(x, token, least, key0, key1, top_k, top_p, floor, top, inverse):
    """As `_exact` of values and tokens that a program holds, -inf where it has none; at least top_k of them have an
    order of ``least`` or more."""
    keys = _order(x)
    low, high = least, _order(top)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        reached = tl.sum((keys >= middle).to(tl.int32)) >= top_k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    bound = tl.maximum(_order(floor), low)
    weight = _weight(x, top, inverse)
    if top_p < 1.0:
        masses = tl.where(keys >= bound, weight, 0.0).to(tl.float64)
        target = tl.sum(masses) * top_p.to(tl.float64)
        low, high = bound, _order(top)
        while low < high:
            middle = (low & high) + ((low ^ high) >> 1)
            enough = tl.sum(tl.where(keys > middle, masses, 0.0)) < target
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        bound = high
    score = tl.where((keys >= bound) & (x > float("-inf")), weight / _exponential(token, key0, key1), -1.0)
    return tl.min(tl.where(score == tl.max(score), token, 0x7FFFFFFF))


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["mass_ptr", "score_ptr", "at_ptr", "above_ptr", "floor_ptr", "listed_ptr"],
)
def _settle_kernel(
    x_ptr, settings_ptr, peak_ptr, mass_ptr, score_ptr, at_ptr, above_ptr, floor_ptr, state_ptr, listed_ptr, bound_ptr,
    value_ptr, id_ptr, out_ptr, stride, count, SIZE,
    ROUNDS: tl.constexpr, BLOCKS: tl.constexpr, PAD: tl.constexpr, LISTED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The token of each row, and whether its greatest logit is finite."""
    row = tl.program_id(0)
    release(CHAINED)
    wait(CHAINED)
    top_k, top_p = tl.load(settings_ptr + 2 * count + row), float_of(settings_ptr, 4, count, row)
    temperature, min_p = float_of(settings_ptr, 3, count, row), float_of(settings_ptr, 5, count, row)
    top = _top(peak_ptr, row, BLOCKS, PAD)
    finite = tl.abs(top) < float("inf")
    x_ptr += row.to(tl.int64) * stride
    token = 0
    if finite:
        inverse = _inverse(temperature)
        floor = _floor(top, inverse, min_p)
        key0, key1 = tl.load(settings_ptr + row), tl.load(settings_ptr + count + row)
        state = 0
        if top_k > 0:
            found = tl.load(listed_ptr + row)
            if (found > 0) & (found <= LISTED):
                at = tl.arange(0, LISTED)
                x = tl.load(value_ptr + row * LISTED + at, at < found, float("-inf"))
                ids = tl.load(id_ptr + row * LISTED + at, at < found, 0)
                least = tl.load(bound_ptr + row)
                token = _exact_of_list(x, ids, least, key0, key1, top_k, top_p, floor, top, inverse)
            else:
                token = _exact(x_ptr, SIZE, key0, key1, top_k, top_p, floor, top, inverse, LISTED)
        elif (top_p < 1.0) | (min_p > 0.0):
            state = _judged(
                x_ptr, peak_ptr, mass_ptr, above_ptr, floor_ptr, state_ptr, row, count, count * BLOCKS, top, inverse,
                floor, top_p, min_p, ROUNDS, BLOCKS, PAD,
            )  # fmt: skip
            token = -1 - state
            if state < -SIZE:
                token = _exact(x_ptr, SIZE, key0, key1, top_k, top_p, floor, top, inverse, LISTED)
        else:
            token = _scaled_winner(peak_ptr, score_ptr, at_ptr, row, top, inverse, BLOCKS, PAD)
    tl.store(out_ptr + row, token)
    tl.store(out_ptr + count + row, finite.to(tl.int32))


@triton.jit(
    do_not_specialize=["MOST"], do_not_specialize_on_alignment=["token_ptr", "mass_ptr", "listed_ptr", "above_ptr"]
)
def _likeliest_kernel(
    x_ptr, token_ptr, peak_ptr, mass_ptr, listed_ptr, value_ptr, id_ptr, above_ptr, own_ptr, rank_ptr, top_id_ptr,
    top_ptr, stride, SIZE, MOST, BLOCKS: tl.constexpr, PAD: tl.constexpr, LISTED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Log-probability and rank of a token, and of each row the ``MOST`` likeliest, the lowest of equals first."""
    row = tl.program_id(0)
    release(CHAINED)
    wait(CHAINED)
    top = _top(peak_ptr, row, BLOCKS, PAD)
    total = top + tl.log(_total(peak_ptr, mass_ptr, row, top, 1.0, BLOCKS, PAD)).to(tl.float32)
    x_ptr += row.to(tl.int64) * stride
    tl.store(own_ptr + row, tl.load(x_ptr + tl.load(token_ptr + row)).to(tl.float32) - total)
    tl.store(rank_ptr + row, tl.load(above_ptr + row) + 1)
    found = tl.load(listed_ptr + row)
    listed = (found >= MOST) & (found <= LISTED)
    count = tl.where(listed, found, SIZE)
    last, last_id = float("inf"), -1
    for place in range(MOST):
        best, winner = float("-inf"), 0x7FFFFFFF
        for first in range(0, count, LISTED):
            at = first + tl.arange(0, LISTED)
            live = at < count
            if listed:
                x = tl.load(value_ptr + row * LISTED + at, live, float("-inf"))
                token = tl.load(id_ptr + row * LISTED + at, live, 0)
            else:
                x = tl.load(x_ptr + at, live, float("-inf")).to(tl.float32)
                token = at
            left = live & ((x < last) | ((x == last) & (token > last_id)))
            most = tl.max(tl.where(left, x, float("-inf")))
            token = tl.min(tl.where(left & (x == most), token, 0x7FFFFFFF))
            winner = tl.where((most > best) | ((most == best) & (token < winner)), token, winner)
            best = tl.maximum(best, most)
        last, last_id = best, winner
        tl.store(top_id_ptr + row * MOST + place, winner)
        tl.store(top_ptr + row * MOST + place, best - total)


class _Survey:
    """What `_survey_kernel` leaves, and the numbers of its launch."""

    def __init__(self, x: torch.Tensor, settings: torch.Tensor | None, rounds: int = 0) -> None:
        count, self.size = x.shape
        self.blocks = triton.cdiv(self.size, _BLOCK)
        self.pad = triton.next_power_of_2(self.blocks)
        self.groups = self.blocks * (_BLOCK // _GROUP)
        floats = torch.empty((2 * rounds + 4, count, self.blocks), dtype=torch.float32, device=x.device)
        self.peak, self.mass, self.floor = floats[0], floats[1], floats[2]
        self.score, self.above = floats[3 : 4 + rounds], floats[3 + rounds :]  # number 0 of `above` is not used
        self.at = torch.empty((rounds + 1, count, self.blocks), dtype=torch.int32, device=x.device)
        self.group = torch.empty((count, self.groups), dtype=torch.float32, device=x.device)
        self.zeros = torch.empty((2, count), dtype=torch.int32, device=x.device)
        self.bound = torch.empty(count, dtype=torch.int32, device=x.device)
        self.chain = chained(x.device)
        _survey_kernel[(count, self.blocks)](
            x, settings, self.peak, self.mass, self.score, self.at, self.group, self.zeros, x.stride(0), count,
            self.size, self.blocks, _BLOCK, _GROUP, settings is None, self.chain, num_warps=8, launch_pdl=self.chain,
        )  # fmt: skip

    def gather(
        self, x: torch.Tensor, limits: torch.Tensor, tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and tokens that `_gather_kernel` lists; ``zeros`` then holds how many, and ranks."""
        values = torch.empty((len(x), _LISTED), dtype=torch.float32, device=x.device)
        ids = torch.empty((len(x), _LISTED), dtype=torch.int32, device=x.device)
        _bound_kernel[(len(x),)](
            limits, self.group, self.bound, self.groups, triton.next_power_of_2(self.groups), self.chain,
            num_warps=4, launch_pdl=self.chain,
        )  # fmt: skip
        _gather_kernel[(len(x), self.blocks)](
            x, limits, self.bound, tokens, self.zeros[0], values, ids, self.zeros[1], x.stride(0), len(x), self.size,
            _BLOCK, _LISTED, tokens is not None, self.chain, num_warps=8, launch_pdl=self.chain,
        )  # fmt: skip
        return values, ids


def draw(x: torch.Tensor, settings: torch.Tensor, listed: bool, raced: bool) -> torch.Tensor:
    """int32 ``[2, S]``: the token of each row of ``x[S, V]`` under its column of ``settings`` (on the device), and 1 if
    its greatest logit is finite; else 0 and 0.

    ``listed``: some row has a top_k; ``raced``: some row has a top_p or min_p and no top_k. A temperature of 0 is
    greedy: the lowest of the greatest logits.
    """
    survey = _Survey(x, settings, ROUNDS if raced else 0)
    count = len(x)
    values, ids = survey.group, survey.at  # of the same types as lists, so that one kernel serves
    if listed:
        values, ids = survey.gather(x, settings[TOP_K], None)
    state = torch.empty((ROUNDS + 1, count), dtype=torch.int32, device=x.device)
    for number in range(1, ROUNDS + 1) if raced else ():
        _round_kernel[(count, survey.blocks)](
            x, settings, survey.peak, survey.mass, survey.score, survey.at, survey.above, survey.floor, state,
            x.stride(0), count, number, survey.size, number == 1, survey.blocks, survey.pad, _BLOCK, survey.chain,
            num_warps=8, launch_pdl=survey.chain,
        )  # fmt: skip
    out = torch.empty((2, count), dtype=torch.int32, device=x.device)
    _settle_kernel[(count,)](
        x, settings, survey.peak, survey.mass, survey.score, survey.at, survey.above, survey.floor, state,
        survey.zeros, survey.bound, values, ids, out, x.stride(0), count, survey.size, ROUNDS, survey.blocks,
        survey.pad, _LISTED, survey.chain, num_warps=4, launch_pdl=survey.chain,
    )  # fmt: skip
    return out


def logprobs(
    x: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `sampling.logprobs`; of equal tokens the lowest come first."""
    survey = _Survey(x, None)
    count = min(count, survey.size)
    limit = count if count <= survey.groups else 0
    limits = torch.full((len(x),), limit, dtype=torch.int32, device=x.device)
    values, ids = survey.gather(x, limits, tokens)
    own = torch.empty(len(x), dtype=torch.float32, device=x.device)
    rank = torch.empty(len(x), dtype=torch.int32, device=x.device)
    top_ids = torch.empty((len(x), count), dtype=torch.int32, device=x.device)
    top = torch.empty((len(x), count), dtype=torch.float32, device=x.device)
    _likeliest_kernel[(len(x),)](
        x, tokens, survey.peak, survey.mass, survey.zeros[0], values, ids, survey.zeros[1], own, rank, top_ids, top,
        x.stride(0), survey.size, count, survey.blocks, survey.pad, _LISTED, survey.chain,
        num_warps=8, launch_pdl=survey.chain,
    )  # fmt: skip
    return own, rank, top_ids, top
