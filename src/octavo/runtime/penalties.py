"""The tokens that penalised sequences have seen, kept on the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels import sampling as kernels
from octavo.kernels.select import RowSampling
from octavo.types import Sampling

Ints = npt.NDArray[np.int32]

MOST = 0x7FFF  # times that a token is counted
_IN_PROMPT = -0x8000


class Penalties:
    """Tokens of the penalised rows, on the device. A row holds a slot, and tables grow with the slots in use.

    ``seen[slot, v]`` (int16) is how often token v was generated, up to `MOST`; its sign bit, whether v is in the
    prompt. Operators that sample by rows read it beside the logits. Without such (``listed``) there is a list of each
    sequence's tokens, too: only they can be penalised, so `apply_` looks at those alone. A token that is in it twice
    is given the same logit twice, and one that is only there as filling keeps its own.
    """

    def __init__(self, vocab_size: int, device: torch.device, *, listed: bool) -> None:
        self.seen = torch.zeros((0, vocab_size), dtype=torch.int16, device=device)
        self._listed = listed
        self._history = torch.zeros((0, 256), dtype=torch.int64, device=device)  # prompt, output, filling
        self._lengths: Ints = np.zeros(0, np.int32)
        self._free: list[int] = []

    def start(self, tokens: list[int], prompt_len: int) -> int:
        """Takes a slot for a sequence of these tokens."""
        if not self._free:
            self._add_slots()
        slot, ids = self._free.pop(), np.array(tokens, np.int64)
        row = self.seen[slot].zero_()
        row.index_fill_(0, upload(ids[:prompt_len], row.device), _IN_PROMPT)
        if prompt_len < len(tokens):
            output, counts = np.unique(ids[prompt_len:], return_counts=True)
            counts = np.minimum(counts, MOST).astype(np.int16)
            row.index_add_(0, upload(output, row.device), upload(counts, row.device))
        if self._listed:
            self._reserve(len(tokens))
            self._history[slot].zero_()[: len(tokens)] = upload(ids, row.device)
            self._lengths[slot] = len(tokens)
        return slot

    def end(self, slot: int) -> None:
        self._free.append(slot)

    def append(self, slots: list[int], tokens: torch.Tensor) -> None:
        """``tokens[i]`` (int64) goes to the output of ``slots[i]``, which has a list."""
        lengths = self._lengths[slots]
        self._reserve(int(lengths.max()) + 1)
        where, ends = upload(np.array([slots, lengths], np.int64), tokens.device)
        self._history[where, ends] = tokens
        seen = self.seen[where, tokens]
        self.seen[where, tokens] = seen + ((seen & MOST) < MOST).to(seen.dtype)
        self._lengths[slots] += 1

    def append_rows(self, rows: RowSampling, tokens: torch.Tensor, settings: torch.Tensor) -> None:
        """As `append` of the ``tokens[S]`` whose column of ``settings`` names a slot."""
        rows.record_(tokens, settings, self.seen)

    def apply_(self, x: torch.Tensor, index: list[int], slots: list[int], of: list[Sampling]) -> None:
        """Penalises the rows ``index`` of the float32 ``x[S, V]`` for the sequences in ``slots``, which have lists."""
        numbers = [
            [s.repetition_penalty for s in of],
            [s.presence_penalty for s in of],
            [s.frequency_penalty for s in of],
        ]
        repetition, presence, frequency = upload(np.array(numbers, np.float32), x.device).unsqueeze(-1)
        where, slot = upload(np.array([index, slots], np.int64), x.device).unsqueeze(-1)
        ids = self._history[slot.squeeze(1), : int(self._lengths[slots].max())]
        seen = self.seen[slot, ids]
        x[where, ids] = kernels.penalise(x[where, ids], seen & MOST, seen < 0, repetition, presence, frequency)

    def _reserve(self, length: int) -> None:
        slots, capacity = self._history.shape
        if length > capacity:
            more = max(length, 2 * capacity) - capacity
            self._history = torch.cat((self._history, self._history.new_zeros((slots, more))), dim=1)

    def _add_slots(self) -> None:
        old = len(self.seen)
        new = max(4, old)
        self.seen = torch.cat((self.seen, self.seen.new_zeros((new, self.seen.shape[1]))))
        if self._listed:
            self._history = torch.cat((self._history, self._history.new_zeros((new, self._history.shape[1]))))
            self._lengths = np.concatenate((self._lengths, np.zeros(new, np.int32)))
        self._free = list(range(old + new - 1, old - 1, -1))


def upload(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy on ``device`` that nothing waits for (on CPU the same memory)."""
    return torch.from_numpy(array).to(device, non_blocking=True)
