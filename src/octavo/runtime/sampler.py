"""Sampling of a step.

Order, as in vLLM: log-probabilities of the unmodified logits; masks of grammars; allowed_token_ids, bad_words,
min_tokens, logit_bias, penalties; temperature; min_p, top_k, top_p; the draw. (bad_words look at prompt and output; in
vLLM at output alone.)
A batch of greedy rows is one argmax. Else, where the operators have `RowSampling`, all rows go through them at once
(`sample_batch`); without it rows are grouped by what they need (`sample_groups`). Whatever the next sample of a row
depends on stays on the device, so the next step may be launched before the tokens of this one are known on the host.
"""

from __future__ import annotations

import numpy as np
import torch

from octavo.kernels import sampling as kernels
from octavo.kernels.select import REFERENCE, Ops
from octavo.runtime.base import TokenMask
from octavo.runtime.sample_batch import BatchSampler
from octavo.runtime.sample_groups import GroupSampler, taken
from octavo.runtime.sampled import LogprobGroup, Sampled, token_logprobs
from octavo.runtime.sampling_rows import SampleItem, SamplingRows
from octavo.runtime.tables import NONE, Ints
from octavo.types import Sampling, TokenLogprobs

_MAX_ELEMENTS = 1 << 24  # logits worked on at once; top_p takes most memory on CUDA, 50 bytes for each: 800 MiB


class Sampler:
    """Samples for the rows of a worker. Logits are ``[S, vocab_size]`` on ``device`` and never written to."""

    def __init__(self, vocab_size: int, device: torch.device, ops: Ops = REFERENCE) -> None:
        self._ops = ops
        self._most = max(1, _MAX_ELEMENTS // vocab_size)  # rows worked on at once
        self._rows = SamplingRows(vocab_size, device, by_rows=ops.row_sampling is not None)
        self._groups = GroupSampler(self._rows, self._most)
        self._batch = None if ops.row_sampling is None else BatchSampler(self._rows, ops, ops.row_sampling)

    def start(self, row: int, tokens: list[int], prompt_len: int, sampling: Sampling) -> None:
        """A sequence enters ``row``; after a preemption ``tokens`` goes on behind the prompt with its own output."""
        self.end(row)
        self._rows.start(row, tokens, prompt_len, sampling)

    def end(self, row: int) -> None:
        """``row`` is free; no effect if it already was."""
        self._rows.end(row)
        if self._batch is not None:
            self._batch.forget()

    def warm_up(self, dtype: torch.dtype) -> None:
        """Launches what a request may ask for, on logits of ``dtype``, so that none waits for a compiler."""
        if self._batch is None:
            return
        logits = torch.zeros(2, self._rows.vocab, dtype=dtype, device=self._rows.device)
        items = [SampleItem(0, 1), SampleItem(1, 1)]
        bits = np.full((2, -(-self._rows.vocab // 32)), -1, np.int32)
        self.start(1, [0], 1, Sampling(max_tokens=1, top_p=0.5))
        for bias in ({}, {0: 1.0}):  # with it, logits are copied in float32
            self.start(0, [0], 1, Sampling(max_tokens=1, top_k=2, presence_penalty=0.1, logprobs=2, logit_bias=bias))
            self.sample(logits, items, None, TokenMask.of([0, 1], bits)).finish()
        for row in (0, 1):
            self.end(row)

    def settings(self, items: list[SampleItem]) -> Ints:
        """What `sample` will read of ``items`` on the device, flat, so that it can be sent before the logits are
        computed; empty if that is nothing."""
        if self._batch is None or self.is_greedy(items):
            return NONE
        return self._batch.settings(items).reshape(-1)

    def sample(
        self,
        logits: torch.Tensor,
        items: list[SampleItem],
        best: torch.Tensor | None = None,
        mask: TokenMask | None = None,
        settings: torch.Tensor | None = None,
    ) -> Sampled:
        """Samples one token for each row of ``logits[S, V]``; ``items[i]`` says for whom row i is.

        ``best``: what `Ops.greedy` returns for these logits (and maybe more rows), where the step has found it already;
        then ``logits`` are read only if `looks_at_logits`. ``mask`` counts in ``items``. ``settings`` are those of the
        method `settings`, if they were sent to the device.
        """
        read: torch.Tensor | None = None
        if mask is None and self.is_greedy(items):
            outcome = self._ops.greedy(logits) if best is None else best
        elif self._batch is not None:
            outcome, read = self._batch.sample(logits, items, best, mask, settings)
        else:
            outcome = self._groups.sample(logits, items, mask)
        tokens = outcome[0, : len(items)]
        if self._rows.with_history:
            self._record(tokens, items, read)
        logprobs = self._logprobs(logits, tokens, items) if self._rows.with_logprobs else []
        return Sampled(outcome, tokens, logprobs)

    def is_greedy(self, items: list[SampleItem]) -> bool:
        """Whether all ``items`` take the greatest of their unedited logits."""
        return self._rows.are_greedy(items)

    def looks_at_logits(self, items: list[SampleItem], mask: TokenMask | None) -> bool:
        """Whether `sample` needs more of them than the greedy choice."""
        return mask is not None or not self.is_greedy(items) or any(row in self._rows.with_logprobs for row, _ in items)

    def prompt_logprobs(self, logits: torch.Tensor, targets: list[int], count: int) -> list[TokenLogprobs]:
        """Of ``targets[i]`` under ``logits[i]``, with the ``count`` likeliest; waits for the device."""
        found: list[TokenLogprobs] = []
        for first in range(0, len(targets), self._most):
            part = targets[first : first + self._most]
            packed = self._logprobs_of(logits[first : first + self._most], self._rows.ids(part).int(), count)
            found += token_logprobs(part, [count] * len(part), packed)
        return found

    def _record(self, tokens: torch.Tensor, items: list[SampleItem], settings: torch.Tensor | None) -> None:
        """Takes the sampled tokens into penalty counts and tails."""
        if self._batch is not None and settings is not None:
            self._batch.record(tokens, items, settings)
        else:
            self._rows.shift_tails(tokens, items)
            self._rows.count(tokens, items)

    def _logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, items: list[SampleItem]) -> list[LogprobGroup]:
        wanted = [i for i, (row, _) in enumerate(items) if row in self._rows.with_logprobs]
        groups = []
        for first in range(0, len(wanted), self._most):
            part = wanted[first : first + self._most]
            counts = [self._rows[items[i].row].sampling.logprobs or 0 for i in part]
            x, own = taken(logits, part), taken(tokens, part)
            groups.append(LogprobGroup(part, counts, self._logprobs_of(x, own, max(counts))))
        return groups

    def _logprobs_of(self, logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
        rows = self._ops.row_sampling
        return (kernels.packed_logprobs if rows is None else rows.logprobs)(logits, tokens, count)


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

    def settings(self, items: list[SampleItem]) -> Ints:
        return NONE

    def prompt_logprobs(self, logits: torch.Tensor, targets: list[int], count: int) -> list[TokenLogprobs]:
        return []
