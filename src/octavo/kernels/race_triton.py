"""Device functions of `kernels.sampling_triton`: logits under a row's edits, the noise of its race, its thresholds."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.sampling import Setting

KEY0, KEY1, TOP_K, TEMPERATURE, TOP_P, MIN_P, PLACE, SLOT, REPETITION, PRESENCE, FREQUENCY = (
    tl.constexpr(int(field)) for field in Setting
)
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LEAST: tl.constexpr = tl.constexpr(-0x80000000)


@triton.jit
def float_of(settings, field: tl.constexpr, count, row):
    return tl.load(settings + count * field + row).to(tl.float32, bitcast=True)


@triton.jit
def order(x):
    """An int32 that orders as the float32 ``x`` does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def edited(x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, at, live):
    """The float32 logits ``at`` of a row, -inf where its mask forbids a finite one, penalised; see `sampling`."""
    x = tl.load(x_ptr + at, live, float("-inf")).to(tl.float32)
    place = tl.load(settings + count * PLACE + row)
    if place >= 0:
        word = tl.load(bits_ptr + place.to(tl.int64) * words + at // 32, live, 0)
        banned = ((word >> (at % 32)) & 1) == 0
        x = tl.where(banned & (x < float("inf")), float("-inf"), x)
    slot = tl.load(settings + count * SLOT + row)
    if slot >= 0:
        seen = tl.load(seen_ptr + slot.to(tl.int64) * SIZE + at, live, 0).to(tl.int32)
        generated = seen & 0x7FFF
        factor = tl.where(seen != 0, float_of(settings, REPETITION, count, row), 1.0)
        x = tl.where(x > 0, x / factor, x * factor)
        x -= float_of(settings, FREQUENCY, count, row) * generated.to(tl.float32)
        x -= float_of(settings, PRESENCE, count, row) * (generated > 0).to(tl.float32)
    return x


@triton.jit
def inverse_of(temperature):
    """Of a greedy row, whose temperature is 0, that of 1."""
    return 1.0 / tl.where(temperature > 0.0, temperature, 1.0)


@triton.jit
def weight_of(x, top, inverse):
    """exp((x - top) / temperature); 0 for what is masked, also if all is."""
    return tl.where(x > float("-inf"), tl.exp((x - top) * inverse), 0.0)


@triton.jit
def floor_of(top, inverse, min_p):
    """The least logit that min_p lets through."""
    return tl.where(min_p > 0.0, top + tl.log(min_p) / inverse, float("-inf"))


@triton.jit
def _log2(x, CARD: tl.constexpr):
    """On a card by one instruction, a few units of the last place of a number near 1 off."""
    if CARD:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def score_of(x, top, token, key0, key1, inverse, CARD: tl.constexpr):
    """The base-2 logarithm of `weight_of` / E, with E of `sampling.exponential`; -inf for what is masked.

    E = -log(1 - u) is a series where 1 - u would lose the digits of u.
    """
    h = token * -0x61C8864F + key0
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D + key1
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975
    h = h ^ (h >> 16)
    u = h.to(tl.float32) * 4.656612318e-10 + 2.3283064365386963e-10
    series = u + u * u * (0.5 + u * (0.33333333 + u * (0.25 + u * (0.2 + u * 0.16666667))))
    noise = tl.where(u < 0.0625, series, _log2(1.0 - u, CARD) * -0.6931471805599453)
    return tl.where(x > float("-inf"), shift_of(x, top, inverse) - _log2(noise, CARD), float("-inf"))


@triton.jit
def shift_of(x, top, inverse):
    """The base-2 logarithm of exp((x - top) / temperature)."""
    return (x - top) * (inverse * _LOG2E)


@triton.jit
def best_of(scores, tokens):
    """(greatest score, the lowest token that has it)."""
    best = tl.max(scores)
    return best, tl.min(tl.where(scores == best, tokens, 0x7FFFFFFF))


@triton.jit
def bound_of(group_ptr, limit, GROUPS: tl.constexpr, PAD: tl.constexpr):
    """An order that ``limit`` of a row's groups reach, and hardly more."""
    group = tl.arange(0, PAD)
    peaks = tl.load(group_ptr + group, group < GROUPS, float("-inf"), cache_modifier=".cg")
    keys = order(peaks) >> 12
    low, high = -0x80000, 0x7FFFF
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        reached = tl.sum((keys >= middle).to(tl.int32)) >= limit
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low << 12


@triton.jit
def exact_of_list(x, token, least, key0, key1, top_k, top_p, floor, top, inverse, CARD: tl.constexpr):
    """The token that the filters and the race leave of values that a program holds, -inf where it has none; at least
    ``top_k`` of them have an order of ``least`` or more."""
    keys = order(x)
    low, high = least, order(top)
    while low < high:  # to the greatest order that top_k values reach
        middle = (low | high) - ((low ^ high) >> 1)
        reached = tl.sum((keys >= middle).to(tl.int32)) >= top_k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    bound = tl.maximum(order(floor), low)
    if top_p < 1.0:
        masses = tl.where(keys >= bound, weight_of(x, top, inverse), 0.0).to(tl.float64)
        target = tl.sum(masses) * top_p.to(tl.float64)
        low, high = bound, order(top)
        while low < high:  # to the least order above which there is less than the target
            middle = (low & high) + ((low ^ high) >> 1)
            enough = tl.sum(tl.where(keys > middle, masses, 0.0)) < target
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        bound = high
    score = tl.where(keys >= bound, score_of(x, top, token, key0, key1, inverse, CARD), float("-inf"))
    _best, winner = best_of(score, token)
    return winner


@triton.jit
def _reach(x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, bound, BLOCK: tl.constexpr):
    """How many logits of a row have an order of at least ``bound``."""
    found = 0
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = edited(x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, at, at < SIZE)
        found += tl.sum(((order(x) >= bound) & (at < SIZE)).to(tl.int32))
    return found


@triton.jit
def _mass_from(
    x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, bound, top, inverse, BLOCK: tl.constexpr
):  # fmt: skip
    """The mass of a row's logits with an order of at least ``bound``."""
    mass = tl.zeros([BLOCK], tl.float64)
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = edited(x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, at, at < SIZE)
        mass += tl.where(order(x) >= bound, weight_of(x, top, inverse), 0.0).to(tl.float64)
    return tl.sum(mass)


@triton.jit
def exact(
    x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, key0, key1, top_k, top_p, floor, top, inverse,
    BLOCK: tl.constexpr, CARD: tl.constexpr,
):  # fmt: skip
    """As `exact_of_list` of a whole row, which is read many times."""
    low, high = _LEAST, order(top)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        reached = _reach(x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, middle, BLOCK) >= top_k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    bound = tl.maximum(order(floor), low)
    if top_p < 1.0:
        mass = _mass_from(x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, bound, top, inverse, BLOCK)
        target = mass * top_p.to(tl.float64)
        low, high = bound, order(top)
        while low < high:
            middle = (low & high) + ((low ^ high) >> 1)
            mass = _mass_from(
                x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, middle + 1, top, inverse, BLOCK
            )  # fmt: skip
            high = tl.where(mass < target, middle, high)
            low = tl.where(mass < target, low, middle + 1)
        bound = high
    least = tl.full([BLOCK], float("-inf"), tl.float32)
    scores, tokens = least, tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = edited(x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, at, at < SIZE)
        score = tl.where(order(x) >= bound, score_of(x, top, at, key0, key1, inverse, CARD), float("-inf"))
        tokens = tl.where(score > scores, at, tokens)
        scores = tl.maximum(scores, score)
    _best, winner = best_of(scores, tokens)
    return winner


@triton.jit
def contest(
    x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, pivot, floor, key0, key1, top, inverse,
    BLOCK: tl.constexpr, CARD: tl.constexpr,
):  # fmt: skip
    """(mass above the logit ``pivot``, the winner of the race among what is above it and not below ``floor``)."""
    masses = tl.zeros([BLOCK], tl.float32)
    scores, tokens = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = edited(x_ptr, settings, bits_ptr, seen_ptr, row, count, words, SIZE, at, at < SIZE)
        masses += tl.where(x > pivot, weight_of(x, top, inverse), 0.0)
        score = tl.where((x > pivot) & (x >= floor), score_of(x, top, at, key0, key1, inverse, CARD), float("-inf"))
        tokens = tl.where(score > scores, at, tokens)
        scores = tl.maximum(scores, score)
    _best, winner = best_of(scores, tokens)
    return tl.sum(masses.to(tl.float64)), winner
