"""From logits to tokens: functions on tensors without state, the same on CPU and CUDA, none of which waits for CUDA.

Shapes: S items of a batch, V the vocabulary. Everything after the edits works on probabilities (`probabilities`), and
every filter is a threshold: a token stays if its probability reaches it, so equal tokens stay or go together and the
result depends on no sorting order.

**Noise.** A token is drawn by the exponential race: with E(v) independent and exponentially distributed,
``argmax p(v) / E(v)`` is v with probability p(v). (This is the Gumbel-max trick with one logarithm less.) E(v) is a
function of the request's seed, the token's position in its sequence and v alone, hence a draw does not depend on what
else is in the batch, on the row or on the device. See `noise_keys` and `exponential`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_native_argmax: Callable[[torch.Tensor], torch.Tensor] | None
_native_greedy: Callable[[torch.Tensor], torch.Tensor | None] | None
_native_sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None] | None
_native_logprobs: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor | None] | None
try:
    from octavo.kernels.cpu import argmax as _native_argmax
    from octavo.kernels.cpu import greedy as _native_greedy
    from octavo.kernels.cpu import logprobs as _native_logprobs
    from octavo.kernels.cpu import sample as _native_sample
except ImportError:  # no C++ extension
    _native_argmax = _native_greedy = _native_logprobs = _native_sample = None

_LEAD = 256  # so many of the likeliest tokens are looked at before the whole vocabulary is, on CPU
_BLOCK = 256  # of `argmax`
_WIDEST_TOPK = 2048  # above it a sort is faster than topk
_CPU_ELEMENTS = 1 << 16  # noise is made for so many elements at a time, which stay in the second-level cache
_NEG_INF = float("-inf")


# --- argmax -----------------------------------------------------------------------------------------------------------


def argmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index (int64) and value of the greatest of each row of ``x[S, V]``; the lowest index of equals; NaN wins."""
    if _native_argmax is not None and not x.is_cuda:
        index = _native_argmax(x)
        return index, x.gather(1, index.unsqueeze(1)).squeeze(1)
    if x.is_cuda or x.shape[1] <= 2 * _BLOCK:
        index = x.argmax(-1)
        return index, x.gather(1, index.unsqueeze(1)).squeeze(1)
    # On CPU torch vectorises amax but not argmax: find the block first (about ten times faster at V = 49,152).
    size = x.shape[1]
    whole = size - size % _BLOCK
    peaks = x[:, :whole].unflatten(1, (-1, _BLOCK)).amax(-1)
    if whole < size:
        peaks = torch.cat((peaks, x[:, whole:].amax(-1, keepdim=True)), dim=1)
    start = peaks.argmax(-1, keepdim=True) * _BLOCK
    index = (start + torch.arange(_BLOCK, device=x.device)).clamp_(max=size - 1)
    block = x.gather(1, index)
    best = block.argmax(-1, keepdim=True)
    return index.gather(1, best).squeeze(1), block.gather(1, best).squeeze(1)


class VocabPart(NamedTuple):
    """The tokens from ``first`` on, and what puts the ``x[S, N]`` of all parts side by side: ``[S, parts * N]``."""

    first: int
    gather: Callable[[torch.Tensor], torch.Tensor]


WHOLE = VocabPart(0, lambda x: x)


def greedy(logits: torch.Tensor, part: VocabPart = WHOLE) -> torch.Tensor:
    """int32 ``[2, S]`` of ``logits[S, V]``: the token of the greatest logit (the lowest of equals), and 1 if that logit
    is finite; else 0 and 0. Of logits that are a ``part``, equally many in each: the choice among all parts."""
    if part is WHOLE and _native_greedy is not None and not logits.is_cuda:
        found = _native_greedy(logits)
        if found is not None:
            return found
    token, peak = argmax(logits)
    if part is not WHOLE:
        tokens = part.gather((token + part.first).unsqueeze(1))
        best, peak = argmax(part.gather(peak.float().unsqueeze(1)))
        token = tokens.gather(1, best.unsqueeze(1)).squeeze(1)
    finite = peak.abs() < float("inf")
    return torch.stack((token * finite, finite)).int()


# --- edits of logits --------------------------------------------------------------------------------------------------


def keep_only_(row: torch.Tensor, ids: torch.Tensor) -> None:
    """Masks all of ``row[V]`` but ``ids``."""
    kept = row[ids]
    row.fill_(_NEG_INF)
    row[ids] = kept


def allowed_bias(bits: torch.Tensor, vocab: int) -> torch.Tensor:
    """0 for tokens that ``bits`` allow, -inf for others: float32 ``[R, vocab]``, the caller's own.

    ``bits`` is int32 ``[R, at least ceil(vocab / 32)]``: bit v % 32 of word v // 32 is for token v. To be added to
    logits: on CPU that is ten times faster than filling under a mask.
    """
    octets = bits.view(torch.uint8).int()
    return torch.nn.functional.embedding(octets, _octet_bias(bits.device)).flatten(1)[:, :vocab]


@functools.cache
def _octet_bias(device: torch.device) -> torch.Tensor:
    """``[256, 8]``: of each octet, 0 where its bit is set, else -inf."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    return torch.zeros(256, 8, device=device).masked_fill_(bits == 0, _NEG_INF)


def ban_completions_(row: torch.Tensor, prefixes: torch.Tensor, last: torch.Tensor, tail: torch.Tensor) -> None:
    """Masks ``last[i]`` in ``row[V]`` where ``prefixes[i]`` equals ``tail``.

    ``tail[P]`` are the last tokens of the sequence; ``prefixes[N, P]`` are aligned right, and -1 matches any token.
    """
    matches = ((prefixes == tail) | (prefixes == -1)).all(-1)
    # Added, not assigned: two of the words may end in the same token, and only one of them match.
    row.index_add_(0, last, torch.zeros(last.shape, device=row.device).masked_fill_(matches, _NEG_INF))


def penalise(
    logits: torch.Tensor,
    counts: torch.Tensor,
    prompt: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """The three penalties on the float32 ``logits[S, K]`` of some K tokens.

    ``counts[S, K]``: how often each was generated; ``prompt[S, K]``: whether it is in the prompt; the others
    ``[S, 1]``. Repetition (of prompt and output) divides positive logits and multiplies negative ones; presence is
    subtracted once and frequency once for each time a token was generated. As in vLLM.
    """
    generated = counts > 0
    factor = torch.where(prompt | generated, repetition, 1.0)
    out = torch.where(logits > 0, logits / factor, logits * factor)
    return out.sub_(frequency * counts).sub_(presence * generated)


# --- noise ------------------------------------------------------------------------------------------------------------


def noise_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """``mix(mix(seed) + position)`` as two 32-bit words ``[S, 2]``; mix is the finaliser of splitmix64.

    mix is a bijection: positions of one seed never share a key. (Steele, Lea, Flood: Fast splittable pseudorandom
    number generators, OOPSLA 2014.)
    """
    return noise_keys_of(mix64(seeds), positions)


def noise_keys_of(mixed_seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """`noise_keys` of seeds that went through `mix64` already."""
    return mix64(mixed_seeds + positions).view(np.int32).reshape(-1, 2)


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def exponential(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Exponentially distributed float32 for each of the token ids ``ids[1 or S, K]`` (int32) under ``keys[S, 2]``.

    The hash, in int32 arithmetic that wraps, ``>>`` shifting in zeros::

        h = v * 0x9E3779B1 + key0
        h = (h ^ h >> 16) * 0x7FEB352D + key1
        h = (h ^ h >> 15) * 0x846CA68B
        h = h ^ h >> 16                          this shift copies the sign bit: bit 31 becomes 0

    (a multiplicative step by the golden ratio, then the finaliser "lowbias32" of C. Wellons' hash prospector, keyed
    before each round). Then E = -log(1 - u) with u = h / 2^31 inside (0, 1): fine-grained where E is small, which is
    where the race is decided.
    """
    h = ids * -0x61C8864F + keys[:, :1]
    h = (h ^ ((h >> 16) & 0xFFFF)).mul_(0x7FEB352D).add_(keys[:, 1:])
    h = (h ^ ((h >> 15) & 0x1FFFF)).mul_(-0x7B935975)
    h ^= h >> 16
    # The factor is a little below 2^-31, so that u cannot round to 1 and E stays finite.
    return h.float().mul_(-(2.0**-31) * (1 - 2.0**-23)).sub_(2.0**-32).log1p_().neg_()


def draw(weights: torch.Tensor, keys: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Draws from each row of ``weights[S, K]`` (at least 0, not all 0, any sum): token ids, int64 ``[S]``.

    ``ids[S, K]`` are the token ids of the columns; None stands for 0, 1, 2, …
    """
    count, size = weights.shape
    step = count if weights.is_cuda else max(1, _CPU_ELEMENTS // size)
    every = torch.arange(size, dtype=torch.int32, device=weights.device).unsqueeze(0)
    tokens = []
    for rows in (slice(i, i + step) for i in range(0, count, step)):
        if ids is None:
            tokens.append(argmax(weights[rows] / exponential(keys[rows], every))[0])
        else:
            scores = weights[rows] / exponential(keys[rows], ids[rows].int())
            winners = scores == scores.amax(-1, keepdim=True)
            tokens.append(ids[rows].masked_fill(~winners, torch.iinfo(ids.dtype).max).amin(-1))
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


# --- filters ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Filters:
    """min_p, then top_k, then top_p of S rows."""

    top_k: torch.Tensor  # int32 [S, 1]; 0: no limit
    top_p: torch.Tensor  # float32 [S, 1]; 1: no limit
    min_p: torch.Tensor  # float32 [S, 1]; 0: no limit
    width: int  # so many of a row's greatest probabilities decide all its filters: V with a top_p and no top_k

    def __getitem__(self, rows: torch.Tensor) -> Filters:
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows], self.width)


def probabilities(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """``softmax(logits[S, V] / temperature[S, 1])`` in float32."""
    return torch.softmax(logits.float() / temperature, dim=-1)


def draw_filtered(probs: torch.Tensor, keys: torch.Tensor, filters: Filters) -> torch.Tensor:
    """As `draw` from those tokens of ``probs[S, V]`` (rows sum to 1) that pass ``filters``.

    Of a row of NaN the result means nothing.
    """
    if probs.is_cuda:  # looking at the outcome of a shortcut would wait for the device
        return draw(_filter(probs, filters), keys)
    lead, ids = probs.topk(min(_LEAD, probs.shape[1]))
    floor, threshold = _thresholds(lead, lead, filters)
    tokens = draw(lead.masked_fill(lead < threshold, 0.0), keys, ids)
    # The lead was enough if nothing outside it can reach the threshold and the mass under top_p was known.
    least = lead[:, -1:]
    enough = (threshold > least) & ((floor > least) | (floor == 0) | (filters.top_p >= 1))
    settled = enough | (least == 0) | lead[:, :1].isnan()
    rest = (~settled).squeeze(1).nonzero().squeeze(1)
    if lead.shape[1] < probs.shape[1] and rest.numel():
        tokens[rest] = draw(_filter(probs[rest], filters[rest]), keys[rest])
    return tokens


def _filter(probs: torch.Tensor, filters: Filters) -> torch.Tensor:
    """``probs`` with 0 where a token does not pass."""
    limit = _sorted_thresholds(probs, filters) if probs.is_cuda else _row_thresholds(probs, filters)
    return probs.masked_fill(probs < limit, 0.0)


def _sorted_thresholds(probs: torch.Tensor, filters: Filters) -> torch.Tensor:
    """The least probability that passes, ``[S, 1]``: all rows at once, for which CUDA sorts fast enough."""
    if filters.width > min(_WIDEST_TOPK, probs.shape[1]):
        lead = probs.sort(-1, descending=True).values
    else:
        lead = probs.topk(filters.width).values
    return _thresholds(lead, probs, filters)[1]


def _row_thresholds(probs: torch.Tensor, filters: Filters) -> torch.Tensor:
    """As `_sorted_thresholds` without a sort, row by row: a tenth of the time on CPU."""
    settings = (part.squeeze(1).numpy() for part in (filters.top_k, filters.top_p, filters.min_p))
    limits = []
    for row, top_k, top_p, min_p in zip(probs.numpy(), *settings, strict=True):
        limit = row.max() * min_p
        if 0 < top_k < len(row):
            limit = max(limit, np.partition(row, -top_k)[-top_k])
        if top_p < 1:
            mass = row.sum(dtype=np.float64, where=row >= limit) if limit > 0 else 1.0
            limit = _nucleus_threshold(row, mass * top_p)
        limits.append(limit)
    return torch.from_numpy(np.array(limits, np.float32)).unsqueeze(1)


def _nucleus_threshold(row: npt.NDArray[np.float32], target: float) -> np.float32:
    """The least of the greatest of ``row[V]`` (at least 0) that together reach ``target``.

    The upper bits of a float that is at least 0 order it: they sort the values into bins of one 128th of an octave,
    and only the bin in which the sum reaches the target needs sorting.
    """
    bins = row.view(np.int32) >> 16
    masses = np.bincount(bins, weights=row)
    above = np.concatenate((masses[:0:-1].cumsum()[::-1], [0.0]))  # mass of all higher bins
    boundary = int(((above < target) & (masses > 0)).argmax())
    inside = np.sort(row[bins == boundary])[::-1]
    before = above[boundary] + inside.cumsum(dtype=np.float64) - inside
    return inside[max(0, int((before < target).sum()) - 1)]


def _thresholds(lead: torch.Tensor, support: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor]:
    """(threshold of min_p and top_k, threshold of all three), each ``[S, 1]``.

    ``lead[S, K]`` are the greatest probabilities in descending order; ``support[S, …]`` is where the mass of what
    min_p and top_k leave is summed. top_p keeps a token if those before it have less than top_p of that mass.
    Sums are in float64, so that neither the device nor the batch moves the boundary.
    """
    last = (filters.top_k.long() - 1).clamp_(0, lead.shape[1] - 1)
    kth = torch.where(filters.top_k > 0, lead.gather(1, last), 0.0)
    floor = torch.maximum(kth, filters.min_p * lead[:, :1])
    mass = support.masked_fill(support < floor, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    target = torch.where(floor > 0, mass, 1.0) * filters.top_p
    inside = lead.masked_fill(lead < floor, 0.0).double()
    before = inside.cumsum(-1).sub_(inside)
    kept = ((before < target) & (lead >= floor)).sum(-1, keepdim=True)
    nucleus = lead.gather(1, (kept - 1).clamp_(min=0))
    return floor, torch.where(filters.top_p < 1, nucleus, floor)


# --- rows with settings of their own ---------------------------------------------------------------------------------


class Setting(IntEnum):
    """Rows of the int32 ``settings[11, S]`` that operators which sample by rows take; floats by their bits.

    `sample_rows` takes the first `DRAWN_BY` of them.
    """

    KEY0 = 0  # of the noise, see `noise_keys`
    KEY1 = 1
    TOP_K = 2
    TEMPERATURE = 3
    TOP_P = 4
    MIN_P = 5
    PLACE = 6  # of the row's mask among the masks; -1: none
    SLOT = 7  # of the tokens it has seen, see `runtime.penalties`; -1: none
    REPETITION = 8
    PRESENCE = 9
    FREQUENCY = 10


DRAWN_BY = 6


def sample_rows(logits: torch.Tensor, settings: torch.Tensor) -> torch.Tensor | None:
    """As `greedy` where the temperature is 0; of other rows a token that is drawn from those which pass their filters.

    ``settings[6, S]`` are the first of `Setting`. The choice is that of `draw` and `draw_filtered` from
    `probabilities`, but for scores that rounding makes equal. None for logits that are not on the CPU, of another type
    than bfloat16 and float32, and without the C++ extension.
    """
    if _native_sample is None or logits.is_cuda:
        return None
    return _native_sample(logits, settings)


# --- log-probabilities ------------------------------------------------------------------------------------------------


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of ``tokens[S]`` under ``logits[S, V]``, and of the ``count`` likeliest: log-softmax in float32.

    Returns (logprob ``[S]``, rank ``[S]``: 1 + how many are likelier, ids ``[S, count]``, logprobs ``[S, count]``).
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    own = values.gather(1, tokens.long().unsqueeze(1))
    rank = (values > own).sum(-1) + 1
    top = values.topk(min(count, values.shape[1]))
    return own.squeeze(1), rank, top.indices, top.values


def packed_logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """`logprobs` in one int32 ``[S, 2 + 2 count]``, which is one copy to the host: own (its bits), rank, ids, values
    (their bits)."""
    if _native_logprobs is not None and not logits.is_cuda:
        found = _native_logprobs(logits, tokens, count)
        if found is not None:
            return found
    own, rank, ids, values = logprobs(logits, tokens, count)
    bits = own.unsqueeze(1).view(torch.int32), values.view(torch.int32)
    return torch.cat((bits[0], rank.int().unsqueeze(1), ids.int(), bits[1]), dim=1)
