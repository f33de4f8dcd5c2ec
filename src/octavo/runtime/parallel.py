"""Rank 0 of several that share a model: a `Worker` that tells the followers each of its steps before it makes them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from octavo.config import EngineConfig, ModelConfig
from octavo.errors import EngineDead, OctavoError, OutOfMemory
from octavo.log import get_logger
from octavo.parallel.group import LostPeer
from octavo.runtime.base import Pending, TokenMask
from octavo.runtime.executor import CLOSE_SECONDS, Executor, Init, Load, PlanMemory, Step, TakeTokens
from octavo.runtime.worker import MemoryErrors, Worker
from octavo.types import StepPlan, StepResult


@dataclass(slots=True)
class _Watched:
    """A step of all ranks between its launch and the reading of its tokens."""

    launched: Pending
    executor: Executor

    def ready(self) -> bool:
        return self.launched.ready()

    def result(self) -> StepResult:
        self.executor.watch_device(self.launched.ready)
        return self.launched.result()


class ParallelWorker:
    """See `runtime.base.WorkerBase`. What a rank fails of is raised by the call in progress, or else by the next one.

    Nothing can go on without one of the ranks, so running out of memory in a step ends the engine, too.
    ``on_death`` is told of a failure at once, from a thread of its own; by default nobody is.
    """

    overlaps = False
    device = ""
    enough_tokens: int | None = None
    draft_tokens = 0
    max_rows = 0
    shares_prefixes = True
    step_bytes = 0
    bandwidth = 0.0

    def __init__(self, *, on_death: Callable[[OctavoError], None] | None = None) -> None:
        self._on_death = on_death
        self._worker = Worker()
        self._executor: Executor | None = None
        self._end: Callable[[], object] | None = None

    def init(self, config: EngineConfig) -> ModelConfig:
        """Starts the followers first: they import while rank 0 finds, and maybe downloads, the files."""
        self._executor = Executor(config, on_death=self._on_death)
        self._end = weakref.finalize(self, _end, self._executor, self._worker)  # also at the interpreter's exit
        with self._failing_together():
            model = self._worker.init(config)
            self._executor.ask(Init())
        self.overlaps, self.enough_tokens = self._worker.overlaps, self._worker.enough_tokens
        ranks = config.parallel.tensor_parallel_size
        self.device = f"{self._worker.device}, {ranks} ranks"
        return model

    def load(self) -> None:
        """Each rank reads its own part."""
        executor = self._followers()
        with self._failing_together(), MemoryErrors():
            executor.wait()
            executor.ask(Load())
            self._worker.join(0, executor.folder)
            executor.on_failure = self._worker.group.abort
            self._worker.load()
            executor.wait()

    def plan_memory(self) -> tuple[int, int]:
        """All ranks have as many pages as the one with the least memory."""
        executor = self._followers()
        with self._failing_together(), MemoryErrors():
            executor.ask(PlanMemory())
            found = self._worker.plan_memory(announce=lambda: executor.tell(TakeTokens()))
            executor.wait()
        self.max_rows, self.shares_prefixes = self._worker.max_rows, self._worker.shares_prefixes
        self.draft_tokens = self._worker.draft_tokens
        self.step_bytes, self.bandwidth = self._worker.step_bytes, self._worker.bandwidth
        get_logger().info("ranks: %d, joined by %s", self._worker.group.size, self._worker.group.name)
        return found

    def step(self, plan: StepPlan) -> None:
        """The followers get the plan first, so that they start when rank 0 does."""
        with self._failing_together():
            self._followers().tell(Step(plan))
            self._worker.step(plan)

    def sample(self, mask: TokenMask | None = None) -> Pending:
        """Rank 0 samples; where the tokens are not what every rank finds itself, it broadcasts them."""
        with self._failing_together():
            return _Watched(self._worker.sample(mask), self._followers())

    def close(self) -> None:
        """Ends the followers."""
        self._executor = None
        if self._end is not None:
            self._end()

    def _followers(self) -> Executor:
        if self._executor is None:
            raise EngineDead("the ranks of this engine have been ended.", "Make a new one.")
        return self._executor

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Ends the followers where rank 0 fails, and finds out who it was where the ranks lost each other."""
        try:
            yield
        except LostPeer as error:
            reason = self._followers().reason(str(error).strip().splitlines()[0])
            self.close()
            raise reason from error
        except MemoryError as error:
            self.close()
            raise OutOfMemory(f"rank 0: ran out of memory: {error}", MEMORY_REMEDY) from None
        except BaseException:
            self.close()
            raise


def _end(executor: Executor, worker: Worker) -> None:
    executor.expect_end()
    # Rank 0 lets go first: while the system takes back what a killed process had, it may have to wait. After a failure
    # kernels may wait for a rank that is gone, and rank 0 would wait for them.
    if not executor.failed and _done_in_time(worker.wait_for_device) and not _done_in_time(worker.close):
        get_logger().warning("rank 0 takes long to let go of its device")
    executor.close()


def _done_in_time(call: Callable[[], None]) -> bool:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(CLOSE_SECONDS)
    return not thread.is_alive()


MEMORY_REMEDY = "Lower --max-num-batched-tokens or --gpu-memory-utilization."
