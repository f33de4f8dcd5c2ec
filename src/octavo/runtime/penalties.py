"""The tokens that penalised sequences have seen, kept on the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels import sampling as kernels
from octavo.kernels.select import RowSampling
from octavo.types import Sampling

Ints = npt.NDArray[np.int32]


class Penalties:
    """Tokens of the penalised rows, on the device. A row holds a slot of all three tables, which grow with the slots in
    use; a slot takes 5 bytes for each token of the vocabulary and 8 for each token of the longest sequence.

    Only tokens of the sequence can be penalised, so `apply` looks at those alone: a token that is in the history twice
    is given the same logit twice, and one that is only there as filling keeps its own.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # in the output
        self._prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._history = torch.zeros((0, 256), dtype=torch.int64, device=device)  # prompt, output, filling
        self._lengths: Ints = np.zeros(0, np.int32)
        self._free: list[int] = []

    def start(self, tokens: list[int], prompt_len: int) -> int:
        """Takes a slot for a sequence of these tokens."""
        if not self._free:
            self._add_slots()
        slot = self._free.pop()
        self._reserve(len(tokens))
        ids = upload(np.array(tokens, np.int64), self._counts.device)
        self._history[slot].zero_()[: len(tokens)] = ids
        self._lengths[slot] = len(tokens)
        self._prompt[slot].zero_().index_fill_(0, ids[:prompt_len], True)
        output = ids[prompt_len:]
        self._counts[slot].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        return slot

    def end(self, slot: int) -> None:
        self._free.append(slot)

    def lengths(self, slots: Ints) -> Ints:
        """How many tokens each of ``slots`` has; 0 for -1, which is none."""
        if not len(self._lengths):
            return np.zeros(len(slots), np.int32)
        return np.where(slots < 0, 0, self._lengths[slots])

    def append(self, slots: list[int], tokens: torch.Tensor) -> None:
        """``tokens[i]`` (int64) goes to the output of ``slots[i]``."""
        lengths = self._lengths[slots]
        self._reserve(int(lengths.max()) + 1)
        where, ends = upload(np.array([slots, lengths], np.int64), tokens.device)
        self._history[where, ends] = tokens
        self._counts.index_put_((where, tokens), torch.ones_like(tokens, dtype=torch.int32), accumulate=True)
        self._lengths[slots] += 1

    def append_rows(self, rows: RowSampling, slots: list[int], tokens: torch.Tensor, settings: torch.Tensor) -> None:
        """As `append` of the ``tokens[S]`` whose column of ``settings`` names a slot; ``slots`` are these."""
        self._reserve(int(self._lengths[slots].max()) + 1)
        rows.record_(tokens, settings, self._history, self._counts)
        self._lengths[slots] += 1

    def apply_rows_(self, rows: RowSampling, x: torch.Tensor, settings: torch.Tensor, longest: int) -> None:
        """As `apply_` of the rows whose column of ``settings`` names a slot; ``longest`` of their histories."""
        rows.penalise_(x, settings, self._history, self._counts, self._prompt, longest)

    def apply_(self, x: torch.Tensor, index: list[int], slots: list[int], of: list[Sampling]) -> None:
        """Penalises the rows ``index`` of the float32 ``x[S, V]`` for the sequences in ``slots``."""
        numbers = [
            [s.repetition_penalty for s in of],
            [s.presence_penalty for s in of],
            [s.frequency_penalty for s in of],
        ]
        repetition, presence, frequency = upload(np.array(numbers, np.float32), x.device).unsqueeze(-1)
        where, slot = upload(np.array([index, slots], np.int64), x.device).unsqueeze(-1)
        seen = self._history[slot.squeeze(1), : int(self._lengths[slots].max())]
        counts, prompt = self._counts[slot, seen], self._prompt[slot, seen]
        x[where, seen] = kernels.penalise(x[where, seen], counts, prompt, repetition, presence, frequency)

    def _reserve(self, length: int) -> None:
        slots, capacity = self._history.shape
        if length > capacity:
            more = max(length, 2 * capacity) - capacity
            self._history = torch.cat((self._history, self._history.new_zeros((slots, more))), dim=1)

    def _add_slots(self) -> None:
        old = len(self._lengths)
        new = max(4, old)
        self._counts, self._prompt, self._history = (
            torch.cat((table, table.new_zeros((new, table.shape[1]))))
            for table in (self._counts, self._prompt, self._history)
        )
        self._lengths = np.concatenate((self._lengths, np.zeros(new, np.int32)))
        self._free = list(range(old + new - 1, old - 1, -1))


def upload(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy on ``device`` that nothing waits for (on CPU the same memory)."""
    return torch.from_numpy(array).to(device, non_blocking=True)
