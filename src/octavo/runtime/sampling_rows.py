"""The rows of a sampler: the settings of the sequence in each, and what edits its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from octavo.kernels import sampling as kernels
from octavo.runtime.penalties import Penalties, upload
from octavo.types import Sampling

_GREEDY_BELOW = 1e-5  # a temperature under it is greedy: logits divided by it may overflow
_NOT_A_TOKEN = -2  # before a sequence's first token, in the tail that bad words look at


class SampleItem(NamedTuple):
    """One token to sample: of the sequence in ``row``, which has ``position`` tokens before it."""

    row: int
    position: int


class Mode(IntEnum):
    """How the token of a row is found."""

    GREEDY = 0
    DRAW = 1
    FILTERED = 2


@dataclass(slots=True)
class BadWords:
    """See `kernels.sampling.ban_completions_`."""

    prefixes: torch.Tensor
    last: torch.Tensor
    tail: torch.Tensor


@dataclass(slots=True)
class Row:
    """What is fixed while a sequence holds a row; ``edited`` is false once nothing is left to do to its logits."""

    sampling: Sampling
    prompt_len: int
    mode: Mode
    allowed: torch.Tensor | None = None
    bad_words: BadWords | None = None
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


class SamplingRows:
    """Who is in which row. ``parameters[row]`` are its settings as arrays want them.

    ``by_rows``: operators take rows with settings of their own, see `kernels.select.RowSampling`.
    """

    def __init__(self, vocab_size: int, device: torch.device, *, by_rows: bool) -> None:
        self.vocab = vocab_size
        self.device = device
        self.parameters = np.zeros(0, _PARAMETERS)
        self.penalties = Penalties(vocab_size, device, listed=not by_rows)
        self.with_logprobs: set[int] = set()
        self.with_history: set[int] = set()  # rows whose state takes in the sampled token
        self._rows: dict[int, Row] = {}
        self._demanding: set[int] = set()  # rows that are not plainly greedy

    def __getitem__(self, row: int) -> Row:
        return self._rows[row]

    def start(self, row: int, tokens: list[int], prompt_len: int, sampling: Sampling) -> None:
        """See `Sampler.start`; ``row`` is free."""
        state = Row(sampling, prompt_len, _mode(sampling))
        if sampling.allowed_token_ids:
            state.allowed = self.ids(sampling.allowed_token_ids)
        if sampling.bad_words:
            state.bad_words = self._bad_words(sampling.bad_words, tokens)
        if sampling.masked_until_min and len(tokens) - prompt_len < sampling.min_tokens:
            state.until_min = self.ids(sampling.masked_until_min)
        if sampling.logit_bias:
            values = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32).to(self.device)
            state.bias = (self.ids(list(sampling.logit_bias)), values)
        if sampling.penalised:
            state.slot = self.penalties.start(tokens, prompt_len)
        state.edited = state.is_edited()
        self._rows[row] = state
        if state.edited or state.mode is not Mode.GREEDY:
            self._demanding.add(row)
        if sampling.logprobs is not None:
            self.with_logprobs.add(row)
        if state.slot is not None or state.bad_words is not None:
            self.with_history.add(row)
        self._set_parameters(row, sampling)

    def end(self, row: int) -> None:
        """``row`` is free; no effect if it already was."""
        state = self._rows.pop(row, None)
        if state is not None and state.slot is not None:
            self.penalties.end(state.slot)
        self._demanding.discard(row)
        self.with_logprobs.discard(row)
        self.with_history.discard(row)

    def are_greedy(self, items: list[SampleItem]) -> bool:
        """Whether all ``items`` take the greatest of their unedited logits."""
        return not self._demanding or self._demanding.isdisjoint([row for row, _ in items])

    def edit_(self, x: torch.Tensor, items: list[SampleItem]) -> None:
        """Edits ``x[len(items), V]``, which is float32 and a copy, by all but penalties."""
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

    def penalise_(self, x: torch.Tensor, items: list[SampleItem]) -> None:
        """Penalties into ``x``, as `edit_` takes it."""
        places, slots = self._penalised(items)
        if slots:
            self.penalties.apply_(x, places, slots, [self._rows[items[i].row].sampling for i in places])

    def shift_tails(self, tokens: torch.Tensor, items: list[SampleItem]) -> None:
        """Takes the sampled tokens into what bad words look at."""
        for i, (row, _) in enumerate(items):
            if row in self.with_history and (words := self._rows[row].bad_words) is not None and words.tail.numel():
                words.tail = torch.cat((words.tail[1:], tokens[i : i + 1].long()))

    def count(self, tokens: torch.Tensor, items: list[SampleItem]) -> None:
        """Takes the sampled tokens into what penalties count."""
        places, slots = self._penalised(items)
        if slots:
            self.penalties.append(slots, tokens[self.ids(places)].long())

    def _penalised(self, items: list[SampleItem]) -> tuple[list[int], list[int]]:
        """(which of ``items`` are penalised, their slots of `Penalties`)."""
        held = [(i, self._rows[row].slot) for i, (row, _) in enumerate(items) if row in self.with_history]
        found = [(i, slot) for i, slot in held if slot is not None]
        return [i for i, _ in found], [slot for _, slot in found]

    def ids(self, ids: Sequence[int]) -> torch.Tensor:
        """int64 on the device."""
        return upload(np.array(ids, np.int64), self.device)

    def _set_parameters(self, row: int, sampling: Sampling) -> None:
        if row >= len(self.parameters):
            more = np.zeros(row + 1, _PARAMETERS)
            self.parameters = np.concatenate((self.parameters, more))
        top_k = sampling.top_k if 0 < sampling.top_k < self.vocab else 0
        filters = (top_k, sampling.temperature, sampling.top_p, sampling.min_p)
        if sampling.temperature < _GREEDY_BELOW:
            filters = (0, 0.0, 1.0, 0.0)
        slot = self._rows[row].slot
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self.parameters[row] = (sampling.seed % 2**64, *filters, -1 if slot is None else slot, *penalties)

    def _bad_words(self, words: Sequence[Sequence[int]], tokens: list[int]) -> BadWords:
        length = max(len(word) for word in words) - 1
        prefixes = [[-1] * (length + 1 - len(word)) + list(word[:-1]) for word in words]
        tail = ([_NOT_A_TOKEN] * length + tokens)[-length:] if length else []
        return BadWords(
            prefixes=self.ids([token for prefix in prefixes for token in prefix]).view(len(words), length),
            last=self.ids([word[-1] for word in words]),
            tail=self.ids(tail),
        )


def _mode(sampling: Sampling) -> Mode:
    if sampling.temperature < _GREEDY_BELOW:
        return Mode.GREEDY
    filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return Mode.FILTERED if filtered else Mode.DRAW
