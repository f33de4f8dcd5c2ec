"""The five calls between the engine core and a device: `worker.Worker` is real, `stub.StubWorker` for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from octavo.config import EngineConfig, ModelConfig
from octavo.types import StepPlan, StepResult


@dataclass(frozen=True)
class TokenMask:
    """Tokens that grammars allow to the plan's ``items``; items that are not named may sample any token.

    A place counts in ``items``. ``allows(place, token)`` is quick. ``bits(places)`` is int32 ``[len(places), at least
    ceil(vocabulary / 32)]``: bit v % 32 of word v // 32 is for token v. It may have to compute them.
    """

    items: list[int]
    allows: Callable[[int, int], bool]
    bits: Callable[[Sequence[int]], npt.NDArray[np.int32]]

    @classmethod
    def of(cls, items: list[int], bits: npt.NDArray[np.int32]) -> TokenMask:
        """From masks that are known."""
        return cls(
            items,
            lambda place, token: bool(bits[place, token // 32] >> token % 32 & 1),
            lambda places: bits if places == range(len(bits)) else bits[list(places)],
        )

    def all_bits(self) -> npt.NDArray[np.int32]:
        """`bits` of every item."""
        return self.bits(range(len(self.items)))


class Pending(Protocol):
    """Tokens that are being sampled, or embeddings that are being made."""

    def ready(self) -> bool:
        """Whether `result` need not wait."""
        ...

    def result(self) -> StepResult:
        """Waits for the device and returns the tokens of the step."""
        ...


class WorkerBase(Protocol):
    """Calls come in this order: init, load, plan_memory, then step and sample in turn.

    ``step(N+1)`` may be called before ``sample(N).result()``: the worker feeds a decoding row its own last token.
    Known after init: ``overlaps``, whether that gains anything; ``device``, which names the device for people; and
    ``enough_tokens`` of a step, of which more at once save no time (None: that is never so).
    Known after plan_memory: ``max_rows``, the sequences that there is room for at once, and ``shares_prefixes``: the
    model keeps nothing of a sequence but pages. ``draft_tokens`` of a step take little longer than one: no drafts are
    made beyond. ``step_bytes`` are the weights that a step reads and ``bandwidth`` the bytes a second of the device's
    memory, each 0 if not known.
    """

    overlaps: bool
    device: str
    enough_tokens: int | None
    draft_tokens: int
    max_rows: int
    shares_prefixes: bool
    step_bytes: int
    bandwidth: float

    def init(self, config: EngineConfig) -> ModelConfig:
        """Resolves and reads the model's config, picks device and dtype; nothing large is allocated."""
        ...

    def load(self) -> None:
        """Builds the model and reads its weights."""
        ...

    def plan_memory(self) -> tuple[int, int]:
        """Allocates the KV cache; returns (pages for the pool, longest sequence)."""
        ...

    def step(self, plan: StepPlan) -> None:
        """Launches the forward of ``plan`` up to the logits of the items that sample."""
        ...

    def sample(self, mask: TokenMask | None = None) -> Pending:
        """Launches sampling for the last `step`, under ``mask``."""
        ...

    def close(self) -> None:
        """Ends what the worker has started; may be called twice."""
        ...
