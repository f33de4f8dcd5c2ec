"""Steps of a model that embeds: hidden states after the last norm, pooled on the device, in the place of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octavo.platforms.base import HostCopy
from octavo.runtime.base import TokenMask
from octavo.runtime.graphs import PromptGraphs
from octavo.runtime.runner import Runner, RunnerLimits
from octavo.types import Pooling, StepPlan, StepResult

LEAST_NORM = 1e-12  # as in torch's normalize


@dataclass(frozen=True, slots=True)
class Pooled:
    """The embeddings of a step on their way to the host: ``copy`` is float32 ``[len(poolings), C]``."""

    poolings: list[Pooling]  # of the items that reach the end of their prompts
    copy: HostCopy

    def ready(self) -> bool:
        """See `runtime.base.Pending`."""
        return self.copy.ready()

    def result(self) -> StepResult:
        """See `runtime.base.Pending`."""
        found = self.copy.wait().numpy()
        finite = np.isfinite(found).all(1)
        made = map(_finished, found, self.poolings)
        return StepResult(tokens=[], embeddings=list(made), bad=np.flatnonzero(~finite).tolist())


def _finished(vector: npt.NDArray[np.float32], pooling: Pooling) -> bytes:
    part = vector[: pooling.dimensions]
    if pooling.normalize:
        part = part / np.float32(max(float(np.linalg.norm(part)), LEAST_NORM))
    return part.tobytes()


class PoolingRunner(Runner):
    """What of a prompt's chunk the next one has to know is kept for its row, in float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._poolings: dict[int, Pooling] = {}
        self._held: dict[int, torch.Tensor] = {}  # row -> [C]: the sum of the hidden states so far, or the first one
        super().__init__(*args, **kwargs)

    def _prepare(self, limits: RunnerLimits, graphs: bool) -> None:
        if graphs and self._model.capturable and self._group.size == 1:
            on = (self._model, self._cache, self._tables, self._platform, limits.max_rows)
            with torch.inference_mode():
                self._prompt_graphs = PromptGraphs(*on, limits.max_tokens)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> None:
        """Launches the forward of ``plan`` and the pooling."""
        for row in plan.ended:
            self._model.release(row)
            self._held.pop(row, None)
        for start in plan.starts:
            if start.sampling.pooling is not None:
                self._poolings[start.row] = start.sampling.pooling
        self._plan = plan
        every = any(self._poolings[row].kind != "last" for row in plan.rows)
        hidden, _ = self._hidden(plan, every=every)
        self._pooled = self._pool(plan, hidden) if every else hidden.float()

    def _pool(self, plan: StepPlan, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` of every token of ``plan`` to ``[S, C]`` of the items that reach the end of their prompts."""
        found, start = [hidden.new_zeros(0, hidden.shape[1], dtype=torch.float32)], 0
        for row, count, computed, ends in zip(plan.rows, plan.counts, plan.computed, plan.samples, strict=True):
            chunk, kind, held = hidden[start : start + count], self._poolings[row].kind, self._held.pop(row, None)
            start += count
            if kind == "mean":
                held = chunk.sum(0, dtype=torch.float32) + (0 if held is None else held)
            elif held is None:
                held = chunk[0 if kind == "cls" else -1].to(torch.float32, copy=True)
            if ends:
                found.append((held / (computed + count) if kind == "mean" else held).unsqueeze(0))
            elif kind != "last":
                self._held[row] = held
        return torch.cat(found)

    @torch.inference_mode()
    def sample(self, mask: TokenMask | None = None) -> Pooled:
        """The embeddings of the last `step`; there is nothing to sample."""
        ending = [row for row, ends in zip(self._plan.rows, self._plan.samples, strict=True) if ends]
        return Pooled([self._poolings[row] for row in ending], self._platform.to_host(self._pooled))
