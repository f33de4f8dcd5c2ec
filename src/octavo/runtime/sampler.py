"""Sampling of a step: which rows need which function of `kernels.sampling`, and the state that penalties need.

Order, as in vLLM: log-probabilities of the unmodified logits; masks of grammars; allowed_token_ids, bad_words,
min_tokens, logit_bias, penalties; temperature; min_p, top_k, top_p; the draw. (bad_words look at prompt and output; in
vLLM at output alone.)
A batch of greedy rows is one argmax. Else, where the operators have `RowSampling`, all rows go through them at once;
without it rows are grouped by what they need. Whatever the next sample of a row depends on stays on the device, so the
next step may be launched before the tokens of this one are known on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels import sampling as kernels
from octavo.kernels.select import REFERENCE, Ops, RowSampling
from octavo.runtime.base import TokenMask
from octavo.runtime.penalties import Penalties, upload
from octavo.types import Sampling, TokenLogprobs

_GREEDY_BELOW = 1e-5  # a temperature under it is greedy: logits divided by it may overflow
_MAX_ELEMENTS = 1 << 24  # logits worked on at once; top_p takes most memory on CUDA, 50 bytes for each: 800 MiB
_CACHED_ELEMENTS = 1 << 20  # edited at once on CPU: larger copies are memory that the system has to zero first
_FEW_OCTETS = 512  # of a mask with anything in them: fewer tokens than that, or so, are looked at one by one
_NOT_A_TOKEN = -2  # before a sequence's first token, in the tail that bad words look at


class SampleItem(NamedTuple):
    """One token to sample: of the sequence in ``row``, which has ``position`` tokens before it."""

    row: int
    position: int


class _Mode(IntEnum):
    GREEDY = 0
    DRAW = 1
    FILTERED = 2


@dataclass(slots=True)
class _BadWords:
    """See `kernels.sampling.ban_completions_`."""

    prefixes: torch.Tensor
    last: torch.Tensor
    tail: torch.Tensor


@dataclass(slots=True)
class _Row:
    """What is fixed while a sequence holds a row; ``edited`` is false once nothing is left to do to its logits."""

    sampling: Sampling
    prompt_len: int
    mode: _Mode
    allowed: torch.Tensor | None = None
    bad_words: _BadWords | None = None
    until_min: torch.Tensor | None = None
    bias: tuple[torch.Tensor, torch.Tensor] | None = None
    slot: int | None = None  # of `Penalties`
    edited: bool = False

    def is_edited(self) -> bool:
        return self.slot is not None or self.is_edited_by_hand()

    def is_edited_by_hand(self) -> bool:
        """By more than penalties."""
        return any(edit is not None for edit in (self.allowed, self.bad_words, self.until_min, self.bias))


_PARAMETERS = np.dtype(
    [
        ("seed", "u8"),
        ("top_k", "i4"),
        ("temperature", "f4"),  # 0 for greedy rows, which have no filters either
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("slot", "i4"),  # of `Penalties`, or -1
        ("repetition", "f4"),
        ("presence", "f4"),
        ("frequency", "f4"),
    ],
)


class _Batch(NamedTuple):
    """Some rows, and what does not change from step to step: ``packed`` as `kernels.sampling_triton` takes settings."""

    rows: list[int]
    packed: npt.NDArray[np.int32]
    seeds: npt.NDArray[np.uint64]
    slots: list[int]  # of `Penalties`
    listed: bool  # some have a top_k
    raced: bool  # some have a top_p or min_p, and no top_k
    edited: bool
    by_hand: bool  # edited by more than penalties


class _LogprobGroup(NamedTuple):
    items: list[int]
    counts: list[int]
    tensors: tuple[torch.Tensor, ...]  # as `kernels.sampling.logprobs` returns them


class _Drawing(NamedTuple):
    """How some items are drawn."""

    key: torch.Tensor  # int32 [S, 2]
    temperature: torch.Tensor  # float32 [S, 1]
    filters: kernels.Filters


class Sampled:
    """The tokens of one `Sampler.sample`. ``tokens`` is int32 ``[S]`` on the device, 0 for a bad item.

    ``outcome[2, S or more]`` is as `kernels.sampling.greedy` returns it.
    """

    def __init__(self, outcome: torch.Tensor, count: int, logprobs: list[_LogprobGroup]) -> None:
        self.tokens = outcome[0, :count]
        self._count = count
        # Copies are queued now: queued in `finish`, they would wait for a step that was launched in between.
        self._host = _to_host(outcome)
        self._logprobs = [g._replace(tensors=tuple(_to_host(t) for t in g.tensors)) for g in logprobs]
        self._copied: torch.cuda.Event | None = None
        if outcome.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def ready(self) -> bool:
        """Whether `finish` need not wait."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def finish(self) -> tuple[list[int], dict[int, TokenLogprobs], list[int]]:
        """Waits for the tokens; returns (token of each item, log-probabilities by item, bad items).

        An item is bad if a logit is NaN or +inf, or if no token is left to it; its token is 0, without
        log-probabilities.
        """
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._host[0, : self._count].tolist()
        finite: list[int] = self._host[1, : self._count].tolist()
        bad = [] if all(finite) else [item for item, ok in enumerate(finite) if not ok]
        found: dict[int, TokenLogprobs] = {}
        for group in self._logprobs:
            chosen = [tokens[item] for item in group.items]
            entries = _token_logprobs(chosen, group.counts, group.tensors)
            found.update((item, entry) for item, entry in zip(group.items, entries, strict=True) if finite[item])
        return tokens, found, bad


class Sampler:
    """Samples for the rows of a worker. Logits are ``[S, vocab_size]`` on ``device`` and never written to."""

    def __init__(self, vocab_size: int, device: torch.device, ops: Ops = REFERENCE) -> None:
        self._ops = ops
        self._vocab = vocab_size
        self._most = max(1, _MAX_ELEMENTS // vocab_size)  # rows worked on at once
        self._most_edited = self._most if device.type != "cpu" else max(1, _CACHED_ELEMENTS // vocab_size)
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._demanding: set[int] = set()  # rows that are not plainly greedy
        self._with_logprobs: set[int] = set()
        self._with_history: set[int] = set()  # rows whose state takes in the sampled token
        self._parameters = np.zeros(0, _PARAMETERS)
        self._batch: _Batch | None = None
        self._penalties = Penalties(vocab_size, device)

    def start(self, row: int, tokens: list[int], prompt_len: int, sampling: Sampling) -> None:
        """A sequence enters ``row``; after a preemption ``tokens`` goes on behind the prompt with its own output."""
        self.end(row)
        state = _Row(sampling, prompt_len, _mode(sampling))
        if sampling.allowed_token_ids:
            state.allowed = self._ids(sampling.allowed_token_ids)
        if sampling.bad_words:
            state.bad_words = self._bad_words(sampling.bad_words, tokens)
        if sampling.masked_until_min and len(tokens) - prompt_len < sampling.min_tokens:
            state.until_min = self._ids(sampling.masked_until_min)
        if sampling.logit_bias:
            values = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32).to(self._device)
            state.bias = (self._ids(list(sampling.logit_bias)), values)
        if sampling.penalised:
            state.slot = self._penalties.start(tokens, prompt_len)
        state.edited = state.is_edited()
        self._rows[row] = state
        if state.edited or state.mode is not _Mode.GREEDY:
            self._demanding.add(row)
        if sampling.logprobs is not None:
            self._with_logprobs.add(row)
        if state.slot is not None or state.bad_words is not None:
            self._with_history.add(row)
        self._set_parameters(row, sampling)

    def end(self, row: int) -> None:
        """``row`` is free; no effect if it already was."""
        self._batch = None
        state = self._rows.pop(row, None)
        if state is not None and state.slot is not None:
            self._penalties.end(state.slot)
        self._demanding.discard(row)
        self._with_logprobs.discard(row)
        self._with_history.discard(row)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Launches what a request may ask for, on logits of ``dtype``, so that none waits for a compiler."""
        if self._ops.row_sampling is None:
            return
        logits = torch.zeros(2, self._vocab, dtype=dtype, device=self._device)
        items = [SampleItem(0, 1), SampleItem(1, 1)]
        self.start(0, [0], 1, Sampling(max_tokens=1, top_k=2, presence_penalty=0.1, logprobs=2))
        self.start(1, [0], 1, Sampling(max_tokens=1, top_p=0.5))
        bits = np.full((2, -(-self._vocab // 32)), -1, np.int32)
        self.sample(logits, items, None, TokenMask.of([0, 1], bits)).finish()
        self.start(0, [0], 1, Sampling(max_tokens=1, top_k=2))
        self.sample(logits, items).finish()
        for row in (0, 1):
            self.end(row)

    def sample(
        self,
        logits: torch.Tensor,
        items: list[SampleItem],
        best: torch.Tensor | None = None,
        mask: TokenMask | None = None,
    ) -> Sampled:
        """Samples one token for each row of ``logits[S, V]``; ``items[i]`` says for whom row i is.

        ``best``: what `Ops.greedy` returns for these logits (and maybe more rows), where the step has found it already.
        ``mask`` counts in ``items``.
        """
        settings = None
        if mask is None and self.is_greedy(items):
            outcome = self._ops.greedy(logits) if best is None else best
        elif self._ops.row_sampling is not None:
            outcome, settings = self._sample_rows(self._ops.row_sampling, logits, items, best, mask)
        else:
            chosen, finite = self._sample_groups(logits, items, mask)
            outcome = torch.stack((chosen * finite, finite)).int()
        tokens = outcome[0, : len(items)]
        if self._with_history:
            self._record(tokens, items, settings)
        logprobs = self._logprobs(logits, tokens, items) if self._with_logprobs else []
        return Sampled(outcome, len(items), logprobs)

    def is_greedy(self, items: list[SampleItem]) -> bool:
        """Whether all ``items`` take the greatest of their unedited logits."""
        return not self._demanding or self._demanding.isdisjoint([row for row, _ in items])

    def prompt_logprobs(self, logits: torch.Tensor, targets: list[int], count: int) -> list[TokenLogprobs]:
        """Of ``targets[i]`` under ``logits[i]``, with the ``count`` likeliest; waits for the device."""
        found: list[TokenLogprobs] = []
        for first in range(0, len(targets), self._most):
            part = targets[first : first + self._most]
            tensors = self._logprobs_of(logits[first : first + self._most], self._ids(part).int(), count)
            found += _token_logprobs(part, [count] * len(part), tensors)
        return found

    # --- the parts of `sample` ---

    def _sample_rows(
        self,
        rows: RowSampling,
        logits: torch.Tensor,
        items: list[SampleItem],
        best: torch.Tensor | None,
        mask: TokenMask | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(outcome as of `kernels.sampling.greedy`, the settings of the rows on the device)."""
        batch = self._batch_of([row for row, _ in items])
        packed = self._settings(batch, items, mask)
        settings = upload(packed, self._device)
        x = logits
        if edited := batch.edited or mask is not None:
            bits = None if mask is None else rows.send(mask.all_bits(), self._device)
            x = rows.copy_masked(logits, settings, bits)
            if batch.by_hand:
                self._edit_(x, items)
            longest = int(packed[8].max())
            if longest > 0:
                self._penalties.apply_rows_(rows, x, settings, longest)
        outcome = rows.draw(x, settings, batch.listed, batch.raced)
        if edited:  # what is not finite may have been edited away
            raw = self._ops.greedy(logits) if best is None else best
            outcome *= raw[1:, : len(items)]
        return outcome, settings

    def _batch_of(self, rows: list[int]) -> _Batch:
        """What is the same in each step over ``rows``; found once, since steps are often over the same."""
        if self._batch is None or self._batch.rows != rows:
            of = self._parameters[rows]
            packed = np.full((12, len(rows)), -1, np.int32)
            packed[2], packed[7] = of["top_k"], of["slot"]
            floats = {3: "temperature", 4: "top_p", 5: "min_p", 9: "repetition", 10: "presence", 11: "frequency"}
            for at, name in floats.items():
                packed[at] = of[name].view(np.int32)
            listed = of["top_k"] > 0
            raced = ~listed & ((of["top_p"] < 1) | (of["min_p"] > 0))
            states = [self._rows[row] for row in rows]
            by_hand = any(state.is_edited_by_hand() for state in states)
            slots = [state.slot for state in states if state.slot is not None]
            self._batch = _Batch(
                rows,
                packed,
                of["seed"].copy(),
                slots,
                bool(listed.any()),
                bool(raced.any()),
                by_hand or bool(slots),
                by_hand,
            )
        return self._batch

    def _settings(self, batch: _Batch, items: list[SampleItem], mask: TokenMask | None) -> npt.NDArray[np.int32]:
        """As `kernels.sampling_triton` takes them."""
        packed = batch.packed.copy()
        positions = np.array([position for _, position in items], np.uint64)
        packed[:2] = kernels.noise_keys(batch.seeds, positions).T
        if mask is not None:
            packed[6, mask.items] = np.arange(len(mask.items))
        packed[8] = self._penalties.lengths(packed[7]) if batch.slots else 0
        return packed

    def _sample_groups(
        self, logits: torch.Tensor, items: list[SampleItem], mask: TokenMask | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token (int64) of each item, and whether its logits were finite, before and after edits.

        A model that is asked for JSON writes JSON: what an item samples without a mask is mostly what it may, and that
        is then what it samples with it, so most masks are never needed. But filters look at what a mask leaves.
        """
        chosen = torch.empty(len(items), dtype=torch.int64, device=logits.device)
        finite = torch.empty(len(items), dtype=torch.bool, device=logits.device)
        places = {} if mask is None else {item: at for at, item in enumerate(mask.items)}
        filtered = [i for i in places if self._rows[items[i].row].mode is _Mode.FILTERED]
        free = set(range(len(items))).difference(filtered)
        self._pick(logits, items, sorted(free), None, chosen, finite)
        if mask is not None:
            tokens = chosen.tolist()
            held = filtered + [i for i, at in places.items() if i in free and not mask.allows(at, tokens[i])]
            if held:
                bits = mask.bits([places[i] for i in held])
                rest = self._pick_few(logits, items, held, bits, chosen, finite)
                self._pick(logits, items, [held[at] for at in rest], bits[rest], chosen, finite)
        return chosen, finite

    def _pick_few(
        self,
        logits: torch.Tensor,
        items: list[SampleItem],
        held: list[int],
        bits: npt.NDArray[np.int32],
        chosen: torch.Tensor,
        finite: torch.Tensor,
    ) -> list[int]:
        """Samples those of ``held`` that may be one of few tokens, from these alone; returns the places of the others.

        They have been sampled without their masks before, so ``finite`` knows of their logits.
        """
        rest: list[int] = []
        few: dict[_Mode, list[tuple[int, npt.NDArray[np.int64]]]] = {}
        for at, i in enumerate(held):
            state = self._rows[items[i].row]
            ids = None if state.edited or state.mode is _Mode.FILTERED else _few_tokens(bits[at], self._vocab)
            if ids is None:
                rest.append(at)
            else:
                few.setdefault(state.mode, []).append((i, ids))
        for mode, members in few.items():
            table = np.full((len(members), max(len(ids) for _, ids in members)), -1)
            for place, (_, ids) in enumerate(members):
                table[place, : len(ids)] = ids
            index, tokens = self._ids([i for i, _ in members]), upload(table, self._device)
            x = logits[index.unsqueeze(1), tokens.clamp(min=0)].float().masked_fill_(tokens < 0, float("-inf"))
            if mode is _Mode.GREEDY:
                best, peak = kernels.argmax(x)
                chosen[index] = tokens.gather(1, best.unsqueeze(1)).squeeze(1)
            else:
                drawing, peak = self._drawing([items[i] for i, _ in members]), x.amax(-1)
                chosen[index] = kernels.draw(kernels.probabilities(x, drawing.temperature), drawing.key, tokens)
            finite[index] &= _is_finite(peak)
        return rest

    def _pick(
        self,
        logits: torch.Tensor,
        items: list[SampleItem],
        members: list[int],
        bits: npt.NDArray[np.int32] | None,
        chosen: torch.Tensor,
        finite: torch.Tensor,
    ) -> None:
        """Fills in ``chosen`` and ``finite`` of the ``items`` that ``members`` names, under masks if there are any."""
        groups: dict[tuple[bool, _Mode], list[int]] = {}
        for at, member in enumerate(members):
            state = self._rows[items[member].row]
            groups.setdefault((state.edited, state.mode), []).append(at)
        for (edited, mode), places in groups.items():
            most = self._most_edited if edited or bits is not None else self._most
            for first in range(0, len(places), most):
                part = places[first : first + most]
                rows = [members[at] for at in part]
                index, x = self._ids(rows), _taken(logits, rows)
                raw_peak = None
                if edited or bits is not None:
                    raw_peak = x.amax(-1)
                    x = self._masked(x, None if bits is None else bits[part])
                if edited:
                    self._edit_(x, [items[i] for i in rows])
                token, peak = self._choose(x, [items[i] for i in rows], mode)
                chosen[index] = token
                finite[index] = _is_finite(peak) if raw_peak is None else _is_finite(peak) & _is_finite(raw_peak)

    def _choose(self, x: torch.Tensor, items: list[SampleItem], mode: _Mode) -> tuple[torch.Tensor, torch.Tensor]:
        if mode is _Mode.GREEDY:
            return kernels.argmax(x)
        drawing = self._drawing(items)
        probs = kernels.probabilities(x, drawing.temperature)
        if mode is _Mode.DRAW:
            return kernels.draw(probs, drawing.key), x.amax(-1)
        return kernels.draw_filtered(probs, drawing.key, drawing.filters), x.amax(-1)

    def _drawing(self, items: list[SampleItem]) -> _Drawing:
        of = self._parameters[[item.row for item in items]]
        positions = np.array([item.position for item in items], np.uint64)
        keys = kernels.noise_keys(of["seed"], positions)
        numbers = np.stack((of["temperature"], of["top_p"], of["min_p"])).view(np.int32)
        packed = upload(np.concatenate((keys.T, of["top_k"][None], numbers)), self._device)  # one copy to the device
        key = packed[:2].T.contiguous()
        temperature, top_p, min_p = packed[3:].view(torch.float32).unsqueeze(-1)
        filters = kernels.Filters(packed[2].unsqueeze(-1), top_p, min_p, self._filter_width(of))
        return _Drawing(key, temperature, filters)

    def _filter_width(self, of: npt.NDArray[np.void]) -> int:
        if ((of["top_p"] < 1) & (of["top_k"] == 0)).any():
            return self._vocab
        return max(1, int(of["top_k"].max()))

    def _masked(self, x: torch.Tensor, bits: npt.NDArray[np.int32] | None) -> torch.Tensor:
        """A copy of ``x`` in float32, masked."""
        if bits is None:
            return x.to(torch.float32, copy=True)
        return kernels.allowed_bias(upload(bits, self._device), x.shape[1]).add_(x)

    def _edit_(self, x: torch.Tensor, items: list[SampleItem]) -> None:
        """Edits ``x[len(items), V]``, which is float32 and a copy."""
        penalised: list[int] = []
        slots: list[int] = []
        samplings: list[Sampling] = []
        for i, (row, position) in enumerate(items):
            state = self._rows[row]
            if state.allowed is not None:
                kernels.keep_only_(x[i], state.allowed)
            if (words := state.bad_words) is not None:
                kernels.ban_completions_(x[i], words.prefixes, words.last, words.tail)
            if state.until_min is not None:
                if position - state.prompt_len < state.sampling.min_tokens:
                    x[i].index_fill_(0, state.until_min, float("-inf"))
                else:
                    state.until_min = None
                    state.edited = state.is_edited()
            if state.bias is not None:
                x[i].index_add_(0, *state.bias)
            if state.slot is not None and self._ops.row_sampling is None:
                penalised.append(i)
                slots.append(state.slot)
                samplings.append(state.sampling)
        if penalised:
            self._penalties.apply_(x, penalised, slots, samplings)

    def _record(self, tokens: torch.Tensor, items: list[SampleItem], settings: torch.Tensor | None) -> None:
        """Takes the sampled tokens into penalty counts and tails."""
        rows = self._ops.row_sampling
        if rows is not None and settings is not None and self._batch is not None and not self._batch.by_hand:
            if self._batch.slots:
                self._penalties.append_rows(rows, self._batch.slots, tokens, settings)
            return
        slots: list[int] = []
        counted: list[int] = []
        for i, (row, _) in enumerate(items):
            if row not in self._with_history:
                continue
            state = self._rows[row]
            if (words := state.bad_words) is not None and words.tail.numel():
                words.tail = torch.cat((words.tail[1:], tokens[i : i + 1].long()))
            if state.slot is not None:
                slots.append(state.slot)
                counted.append(i)
        if slots and rows is not None and settings is not None:
            self._penalties.append_rows(rows, slots, tokens, settings)
        elif slots:
            self._penalties.append(slots, tokens[self._ids(counted)].long())

    def _logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, items: list[SampleItem]) -> list[_LogprobGroup]:
        wanted = [i for i, (row, _) in enumerate(items) if row in self._with_logprobs]
        groups = []
        for first in range(0, len(wanted), self._most):
            part = wanted[first : first + self._most]
            counts = [self._rows[items[i].row].sampling.logprobs or 0 for i in part]
            x, own = _taken(logits, part), _taken(tokens, part)
            groups.append(_LogprobGroup(part, counts, self._logprobs_of(x, own, max(counts))))
        return groups

    def _logprobs_of(self, logits: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        rows = self._ops.row_sampling
        return (kernels.logprobs if rows is None else rows.logprobs)(logits, tokens, count)

    # --- the parts of `start` ---

    def _set_parameters(self, row: int, sampling: Sampling) -> None:
        if row >= len(self._parameters):
            more = np.zeros(row + 1, _PARAMETERS)
            self._parameters = np.concatenate((self._parameters, more))
        top_k = sampling.top_k if 0 < sampling.top_k < self._vocab else 0
        filters = (top_k, sampling.temperature, sampling.top_p, sampling.min_p)
        if sampling.temperature < _GREEDY_BELOW:
            filters = (0, 0.0, 1.0, 0.0)
        slot = self._rows[row].slot
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._parameters[row] = (sampling.seed % 2**64, *filters, -1 if slot is None else slot, *penalties)

    def _bad_words(self, words: Sequence[Sequence[int]], tokens: list[int]) -> _BadWords:
        length = max(len(word) for word in words) - 1
        prefixes = [[-1] * (length + 1 - len(word)) + list(word[:-1]) for word in words]
        tail = ([_NOT_A_TOKEN] * length + tokens)[-length:] if length else []
        return _BadWords(
            prefixes=self._ids([token for prefix in prefixes for token in prefix]).view(len(words), length),
            last=self._ids([word[-1] for word in words]),
            tail=self._ids(tail),
        )

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return upload(np.array(ids, np.int64), self._device)


class NoSampler(Sampler):
    """For ranks that do not sample."""

    def __init__(self) -> None:
        pass

    def warm_up(self, dtype: torch.dtype) -> None:
        pass

    def start(self, row: int, tokens: list[int], prompt_len: int, sampling: Sampling) -> None:
        pass

    def end(self, row: int) -> None:
        pass

    def prompt_logprobs(self, logits: torch.Tensor, targets: list[int], count: int) -> list[TokenLogprobs]:
        return []


def _mode(sampling: Sampling) -> _Mode:
    if sampling.temperature < _GREEDY_BELOW:
        return _Mode.GREEDY
    filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return _Mode.FILTERED if filtered else _Mode.DRAW


def _few_tokens(bits: npt.NDArray[np.int32], vocab: int) -> npt.NDArray[np.int64] | None:
    """The tokens of a mask in order; None if they are many or none."""
    octets = bits.view(np.uint8)
    filled = np.flatnonzero(octets)
    if not 0 < len(filled) <= _FEW_OCTETS:
        return None
    at, bit = np.nonzero(np.unpackbits(octets[filled], bitorder="little").reshape(-1, 8))
    ids = filled[at] * 8 + bit
    ids = ids[ids < vocab]  # the end of a text can be a token that was made up
    return ids if len(ids) else None


def _is_finite(peaks: torch.Tensor) -> torch.Tensor:
    """Of the greatest logit of each row: not NaN, +inf (wrong logits) or -inf (all masked)."""
    return peaks.abs() < float("inf")


def _taken(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """``x[rows]`` of ascending rows, without a copy where they are next to each other."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return x[rows[0] : rows[-1] + 1]
    return x[upload(np.array(rows, np.int64), x.device)]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor


def _token_logprobs(
    tokens: list[int],
    counts: list[int],
    tensors: tuple[torch.Tensor, ...],
) -> list[TokenLogprobs]:
    """One `TokenLogprobs` for each of ``tokens`` from what `kernels.sampling.logprobs` returned."""
    own, ranks, ids, values = (tensor.tolist() for tensor in tensors)
    return [
        TokenLogprobs(token, own[i], ranks[i], ids[i][:count], values[i][:count])
        for i, (token, count) in enumerate(zip(tokens, counts, strict=True))
    ]
