"""Sampling of all rows of a step at once, with the operators of `kernels.select.RowSampling`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels import sampling as kernels
from octavo.kernels.sampling import Setting
from octavo.kernels.select import Ops, RowSampling
from octavo.runtime.base import TokenMask
from octavo.runtime.penalties import upload
from octavo.runtime.sampling_rows import SampleItem, SamplingRows

_COPIED = [field for field in Setting if field not in (Setting.KEY0, Setting.KEY1, Setting.PLACE)]


class _Batch(NamedTuple):
    """Some rows, and what does not change from step to step: ``packed`` as of `kernels.sampling.Setting`."""

    rows: list[int]
    packed: npt.NDArray[np.int32]
    seeds: npt.NDArray[np.uint64]  # mixed
    penalised: bool
    listed: bool  # some have a top_k
    raced: bool  # some have a top_p or min_p, and no top_k
    by_hand: bool  # edited by more than penalties


class BatchSampler:
    """``operators`` are those of ``ops`` that work row by row."""

    def __init__(self, rows: SamplingRows, ops: Ops, operators: RowSampling) -> None:
        self._rows = rows
        self._ops = ops
        self._operators = operators
        self._batch: _Batch | None = None

    def forget(self) -> None:
        """To be called when a row gets other settings."""
        self._batch = None

    def sample(
        self,
        logits: torch.Tensor,
        items: list[SampleItem],
        best: torch.Tensor | None,
        mask: TokenMask | None,
        sent: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(outcome as of `kernels.sampling.greedy`, the settings of the rows on the device: what was ``sent``, if it
        was and says nothing of a mask)."""
        batch = self._batch_of([row for row, _ in items])
        if sent is None or mask is not None:
            settings = upload(self._settings(batch, items, mask), self._rows.device)
        else:
            settings = sent.view(len(Setting), len(items))
        bits = settings if mask is None else self._operators.send(mask.all_bits(), self._rows.device)
        x = logits
        if batch.by_hand:
            x = logits.to(torch.float32, copy=True)
            self._rows.edit_(x, items)
        outcome = self._operators.draw(x, settings, bits, self._rows.penalties.seen, batch.listed, batch.raced)
        if batch.by_hand:  # what is not finite may have been edited away
            raw = self._ops.greedy(logits) if best is None else best
            outcome *= raw[1:, : len(items)]
        return outcome, settings

    def settings(self, items: list[SampleItem]) -> npt.NDArray[np.int32]:
        """Of ``items`` without a mask, as of `kernels.sampling.Setting`."""
        return self._settings(self._batch_of([row for row, _ in items]), items, None)

    def _batch_of(self, rows: list[int]) -> _Batch:
        """What is the same in each step over ``rows``; found once, since steps are often over the same."""
        if self._batch is None or self._batch.rows != rows:
            of = self._rows.parameters[rows]
            packed = np.full((len(Setting), len(rows)), -1, np.int32)
            for field in _COPIED:
                packed[field] = of[field.name.lower()].view(np.int32)
            listed = of["top_k"] > 0
            raced = ~listed & ((of["top_p"] < 1) | (of["min_p"] > 0))
            states = [self._rows[row] for row in rows]
            by_hand = any(state.is_edited_by_hand() for state in states)
            self._batch = _Batch(
                rows,
                packed,
                kernels.mix64(of["seed"]),
                any(state.slot is not None for state in states),
                bool(listed.any()),
                bool(raced.any()),
                by_hand,
            )
        return self._batch

    def _settings(self, batch: _Batch, items: list[SampleItem], mask: TokenMask | None) -> npt.NDArray[np.int32]:
        """As of `kernels.sampling.Setting`."""
        packed = batch.packed.copy()
        positions = np.array([position for _, position in items], np.uint64)
        packed[:2] = kernels.noise_keys_of(batch.seeds, positions).T
        if mask is not None:
            packed[Setting.PLACE, mask.items] = np.arange(len(mask.items))
        return packed

    def record(self, tokens: torch.Tensor, items: list[SampleItem], settings: torch.Tensor) -> None:
        """Takes the sampled tokens into penalty counts and tails; ``settings`` are what `sample` returned."""
        batch = self._batch or self._batch_of([row for row, _ in items])
        if batch.by_hand:
            self._rows.shift_tails(tokens, items)
        if batch.penalised:
            self._rows.penalties.append_rows(self._operators, tokens, settings)
