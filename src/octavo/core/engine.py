"""The engine core: a scheduler, a worker, and the loop body that joins them. Speaks token ids only."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from octavo.config import EngineConfig
from octavo.errors import OutOfMemory
from octavo.log import get_logger
from octavo.runtime.base import Pending, Progress, WorkerBase
from octavo.sched.scheduler import Scheduler, SchedulerLimits
from octavo.types import EngineInfo, Request, Stats, TokenOutput

T = TypeVar("T")


def _silent(phase: str, share: float) -> None:
    pass


class EngineCore:
    """Construction loads the model and allocates the cache; then `add`, `abort` and `step` from one thread.

    With ``overlap`` (by default where the worker gains by it) a step is scheduled and launched before the tokens of the
    one before are read, so that the host's work hides behind the device's. Without (a CPU, where both are the same
    processor) each step is read at once.
    """

    def __init__(
        self, config: EngineConfig, worker: WorkerBase, *, overlap: bool | None = None, progress: Progress = _silent
    ) -> None:
        self._worker = worker
        self._max_waiting = config.limits.max_waiting
        self._pending: deque[Pending] = deque()
        self.phases: dict[str, float] = {}  # seconds of each part of the start, for `octavo bench startup`
        model = self._timed("config", lambda: worker.init(config))
        # Launched steps that may stay unread.
        self._depth = int(worker.overlaps if overlap is None else overlap)
        self._timed("weights", lambda: worker.load(progress))
        num_pages, max_len = self._timed("cache", worker.plan_memory)
        limits = SchedulerLimits(
            max_rows=config.limits.max_num_seqs,
            max_tokens=config.limits.max_num_batched_tokens,
            max_len=max_len,
            page_size=int(config.memory.block_size),
            num_pages=num_pages,
            prefix_caching=config.memory.enable_prefix_caching,
        )
        if num_pages * limits.page_size < max_len:
            raise OutOfMemory(
                f"The KV cache holds {num_pages} pages of {limits.page_size} tokens, "
                f"less than one sequence of max_model_len, which is {max_len}.",
                "Lower --max-model-len or raise --kv-cache-memory-bytes.",
            )
        self.info = EngineInfo(
            max_model_len=max_len,
            num_pages=num_pages,
            page_size=limits.page_size,
            vocab_size=model.vocab_size,
            hash_key=secrets.token_bytes(32),
            dtype=model.dtype,
            device=worker.device,
            max_num_seqs=limits.max_rows,
            max_num_batched_tokens=limits.max_tokens,
            prefix_caching=limits.prefix_caching,
        )
        self.model_config = model
        self.scheduler = Scheduler(limits, self.info.hash_key)

    def add(self, request: Request) -> TokenOutput | None:
        """Queues a request; returns its terminal message at once if it is refused."""
        if self.scheduler.num_waiting >= self._max_waiting:
            return _refusal(request, f"{self._max_waiting} requests are waiting, the limit. Retry later.", 503)
        if request.id in self.scheduler:
            return _refusal(request, f"A request with id {request.id!r} is running. Use another id.", 400)
        length = len(request.token_ids) // 4
        if not 0 < length < self.info.max_model_len:
            limit = self.info.max_model_len
            return _refusal(request, f"The prompt has {length} tokens, outside [1, {limit - 1}]. Shorten it.", 400)
        self.scheduler.add(request)
        return None

    def abort(self, ids: list[str]) -> list[TokenOutput]:
        """Ends requests and frees their pages; ids that are not known are ignored."""
        return self.scheduler.abort(ids)

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work()

    def step(self) -> list[TokenOutput]:
        """Launches the next step, if there is one, and reads back the oldest that is due."""
        plan = self.scheduler.schedule()
        if plan is not None:
            try:
                self._worker.step(plan)
                self._pending.append(self._worker.sample())
            except MemoryError as error:
                return self._shed(error)
        if self._pending and (plan is None or len(self._pending) > self._depth):
            return self.scheduler.commit(self._pending.popleft().result())
        return []

    def stats(self) -> Stats:
        """Gauges and counters of the scheduler."""
        return self.scheduler.stats()

    def reset_prefix_cache(self) -> bool:
        """Forgets every reusable page; always possible."""
        self.scheduler.reset_prefix_cache()
        return True

    def close(self) -> None:
        """Drops the model and the cache."""
        self._pending.clear()
        del self._worker

    def _shed(self, error: MemoryError) -> list[TokenOutput]:
        """Out of memory in a step: its requests fail, later ones are served."""
        self._pending.clear()
        get_logger().error("out of memory in a step: %s", error)
        return self.scheduler.fail_running("The engine ran out of memory in this step. Send less at once.", 503)

    def _timed(self, name: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        value = call()
        self.phases[name] = time.perf_counter() - start
        return value


def _refusal(request: Request, error: str, status: int) -> TokenOutput:
    return TokenOutput(id=request.id, finish_reason="error", error=error, status=status)
