"""The engine core: a scheduler, a worker, and the loop body that joins them. Speaks token ids only."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from octavo.config import EngineConfig
from octavo.core.grammar import Grammars
from octavo.core.vocabulary import Vocabulary, load_vocabulary
from octavo.errors import OutOfMemory
from octavo.log import get_logger
from octavo.runtime.base import Pending, TokenMask, WorkerBase
from octavo.sched.scheduler import Scheduler, SchedulerLimits
from octavo.types import EngineInfo, Request, Stats, TokenOutput

T = TypeVar("T")
_IDLE_SECONDS = 0.005  # how long a step without work waits for a grammar


class EngineCore:
    """Construction loads the model and allocates the cache; then `add`, `abort` and `step` from one thread.

    With ``overlap`` (by default where the worker gains by it) a step is scheduled and launched before the tokens of the
    one before are read, so that the host's work hides behind the device's. Without (a CPU, where both are the same
    processor), and always with speculation, each step is read at once.

    A request with a grammar waits outside of the scheduler until that is compiled. In a step with such requests the
    tokens of the step before are read between forward and sampling, since masks depend on them. A request whose mask
    takes long is put aside (`Scheduler.defer`) until it is there.
    """

    def __init__(
        self,
        config: EngineConfig,
        worker: WorkerBase,
        *,
        overlap: bool | None = None,
        vocabulary: Callable[[], Vocabulary] | None = None,
        hash_key: bytes | None = None,
        phases: Mapping[str, float] | None = None,
    ) -> None:
        self._worker = worker
        self._max_waiting = config.limits.max_waiting
        self._pending: deque[Pending] = deque()
        self._phases = dict(phases or {})  # see `EngineInfo`
        model = self._timed("config", lambda: worker.init(config))
        self._timed("weights", worker.load)
        limits = _limits(config, worker, *self._timed("warm-up", worker.plan_memory))
        # Launched steps that may stay unread: none where a step depends on how many tokens of the last one hold.
        overlaps = worker.overlaps if overlap is None else overlap
        self._depth = int(overlaps and limits.speculation is None)
        self.info = EngineInfo(
            max_model_len=limits.max_len,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            vocab_size=model.vocab_size,
            hash_key=hash_key or secrets.token_bytes(32),
            dtype=model.dtype,
            device=worker.device,
            max_num_seqs=limits.max_rows,
            max_num_batched_tokens=limits.max_tokens,
            max_logprobs=config.limits.max_logprobs,
            prefix_caching=limits.prefix_caching,
            weight_bytes=worker.step_bytes,
            kv_bytes=model.kv_bytes_per_token,
            bandwidth=worker.bandwidth,
            phases=self._phases,
        )
        self.model_config = model
        self.scheduler = Scheduler(limits, self.info.hash_key)
        self._grammars = Grammars(vocabulary or (lambda: load_vocabulary(config, model)), ahead=self._depth > 0)
        self._compiling: dict[str, Request] = {}
        self._deferred: set[str] = set()
        self._busy = 0.0

    def add(self, request: Request) -> TokenOutput | None:
        """Queues a request; returns its terminal message at once if it is refused."""
        if self.scheduler.num_waiting + len(self._compiling) >= self._max_waiting:
            return _refusal(request, f"{self._max_waiting} requests are waiting, the limit. Retry later.", 503)
        if request.id in self.scheduler or request.id in self._compiling:
            return _refusal(request, f"A request with id {request.id!r} is running. Use another id.", 400)
        pools = request.sampling.pooling is not None
        if pools == self.model_config.has_head:
            does, other = ("generates text", "pooling") if self.model_config.has_head else ("embeds", "generate")
            return _refusal(request, f"This engine {does}. Start one with --runner {other}.", 400)
        length, limit = len(request.token_ids) // 4, self.info.max_model_len - (not pools)
        if not 0 < length <= limit:
            return _refusal(request, f"The prompt has {length} tokens, outside [1, {limit}]. Shorten it.", 400)
        if request.sampling.guide is not None:
            refused = self._grammars.open(request.id, request.sampling.guide)
            if refused is not None:
                return _refusal(request, refused, 400)
            if request.id not in self._grammars.live:
                self._compiling[request.id] = request
                return None
        self.scheduler.add(request)
        return None

    def abort(self, ids: list[str]) -> list[TokenOutput]:
        """Ends requests and frees their pages; ids that are not known are ignored."""
        unstarted = [id for id in dict.fromkeys(ids) if self._compiling.pop(id, None) is not None]
        outputs = [TokenOutput(id=id, finish_reason="abort") for id in unstarted]
        for id in ids:
            self._grammars.close(id)
        return outputs + self.scheduler.abort(ids)

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work() or bool(self._compiling)

    def step(self) -> list[TokenOutput]:
        """Launches the next step, if there is one, and reads back the oldest that is due."""
        start = time.perf_counter()
        outputs = self._step()
        self._busy += time.perf_counter() - start
        return outputs

    def _step(self) -> list[TokenOutput]:
        outputs = self._admit_compiled() if self._compiling or self._deferred else []
        plan = self.scheduler.schedule()
        if plan is not None:
            try:
                self._worker.step(plan)
                held = self._held(outputs) if self._grammars.live else {}
                late: set[str] = set()
                self._pending.append(self._worker.sample(self._mask(held, late)))
                outputs += self._put_aside(held, late)
            except MemoryError as error:
                return outputs + self._shed(error)
        elif (self._compiling or self._deferred) and not self._pending and not outputs:
            self._grammars.wait(_IDLE_SECONDS)
        if self._pending and (plan is None or len(self._pending) > self._depth):
            outputs += self._commit()
        return outputs

    def stats(self) -> Stats:
        """Gauges and counters of the scheduler; a request whose grammar is being compiled is waiting."""
        stats = self.scheduler.stats()
        waiting = stats.waiting + len(self._compiling)
        return msgspec.structs.replace(stats, waiting=waiting, busy_seconds=self._busy)

    def reset_prefix_cache(self) -> None:
        """Forgets every reusable page."""
        self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Drops the model and the cache."""
        self._pending.clear()
        self._grammars.stop()
        self._worker.close()
        del self._worker

    # --- grammars ---------------------------------------------------------------------------------------------------

    def _admit_compiled(self) -> list[TokenOutput]:
        """Hands over requests whose grammar is compiled, or refuses them; resumes deferred ones whose mask is there."""
        refusals = []
        for id, refused in self._grammars.opened():
            request = self._compiling.pop(id, None)
            if request is None:  # aborted meanwhile
                self._grammars.close(id)
            elif refused:
                refusals.append(_refusal(request, refused, 400))
            else:
                self.scheduler.add(request)
        for id in list(self._deferred):
            constraint = self._grammars.live.get(id)
            if constraint is None or constraint.ready:
                self._deferred.remove(id)
                self.scheduler.resume(id)
        return refusals

    def _held(self, outputs: list[TokenOutput]) -> dict[int, str]:
        """Id by item of the latest plan's that a grammar holds. What comes to light on the way goes to ``outputs``."""
        if not self.scheduler.constrained():
            return {}
        while self._pending:
            outputs += self._commit()
        items = dict(self.scheduler.constrained())
        self._grammars.settle(list(items.values()))
        outputs += self._put_aside(items, {id for id in items.values() if not self._grammars.live[id].ready})
        return {item: id for item, id in items.items() if (one := self._grammars.live.get(id)) and one.masks}

    def _put_aside(self, items: dict[int, str], late: set[str]) -> list[TokenOutput]:
        """Takes out of ``items``, and out of the latest plan, those whose mask is ``late`` or who are at an end."""
        outputs = []
        for item, id in list(items.items()):
            constraint = self._grammars.live[id]
            if id in late:
                self.scheduler.defer(item)
                self._deferred.add(id)
            elif constraint.finished:
                outputs.append(self._end(id))
            else:
                continue
            del items[item]
        return outputs

    def _mask(self, held: dict[int, str], late: set[str]) -> TokenMask | None:
        """What the latest plan may sample. Requests whose mask is not there in time get into ``late``: what they sample
        means nothing."""
        if not held:
            return None
        ids = list(held.values())
        constraints = [self._grammars.live[id] for id in ids]

        def bits(places: Sequence[int]) -> npt.NDArray[np.int32]:
            self._grammars.fill([ids[place] for place in places])
            late.update(ids[place] for place in places if not constraints[place].ready)
            return np.stack([constraints[place].mask for place in places])

        return TokenMask(list(held), lambda place, token: constraints[place].allows(token), bits)

    def _commit(self) -> list[TokenOutput]:
        """Reads the oldest step; constraints take in its tokens."""
        outputs = self.scheduler.commit(self._pending.popleft().result())
        if not self._grammars.live:
            return outputs
        live = self._grammars.live
        self._grammars.advance(
            [(output.id, output.token_ids[-1]) for output in outputs if output.token_ids and output.id in live]
        )
        checked: list[TokenOutput] = []
        for output in outputs:
            constraint = live.get(output.id)
            if constraint is None:
                checked.append(output)
            elif not constraint.finished or output.finish_reason in ("stop", "error"):
                checked.append(output)
                if output.finish_reason is not None:
                    self._grammars.close(output.id)
            else:
                # In a message of its own: the token that a "stop" comes with is not part of the text.
                checked.append(msgspec.structs.replace(output, finish_reason=None))
                checked.append(self._end(output.id, cached=output.cached))
        return checked

    def _end(self, id: str, *, cached: int = 0) -> TokenOutput:
        """The last message of a request whose grammar lets nothing follow, or failed."""
        error = self._grammars.live[id].error
        self._grammars.close(id)
        self.scheduler.end(id)
        if error:
            error = f"The grammar cannot be followed: {error}."
            return TokenOutput(id=id, finish_reason="error", error=error, status=400)
        return TokenOutput(id=id, finish_reason="stop", cached=cached)

    def _shed(self, error: MemoryError) -> list[TokenOutput]:
        """Out of memory in a step: its requests fail, later ones are served."""
        self._pending.clear()
        outputs = self.scheduler.fail_running("The engine ran out of memory in this step. Send less at once.", 503)
        for output in outputs:
            self._grammars.close(output.id)
        get_logger().error("out of memory in a step: %s", error)
        return outputs

    def _timed(self, name: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        value = call()
        self._phases[name] = time.perf_counter() - start
        return value


def _limits(config: EngineConfig, worker: WorkerBase, num_pages: int, max_len: int) -> SchedulerLimits:
    """Raises `OutOfMemory` if the pages do not hold the longest sequence."""
    page_size = int(config.memory.block_size)
    if num_pages * page_size < max_len:
        raise OutOfMemory(
            f"The KV cache holds {num_pages} pages of {page_size} tokens, "
            f"less than one sequence of max_model_len, which is {max_len}.",
            "Lower --max-model-len or raise --kv-cache-memory-bytes.",
        )
    speculation = config.speculation.chosen()
    if config.memory.enable_prefix_caching and not worker.shares_prefixes:
        get_logger().info("prefix cache: off, since this model keeps more of a sequence than pages")
    if speculation is not None and not worker.shares_prefixes:
        get_logger().info("speculation: off, since this model keeps more of a sequence than pages, which stays")
    return SchedulerLimits(
        max_rows=worker.max_rows,
        max_tokens=config.limits.max_num_batched_tokens,
        max_len=max_len,
        page_size=page_size,
        num_pages=num_pages,
        prefix_caching=config.memory.enable_prefix_caching and worker.shares_prefixes,
        enough_tokens=worker.enough_tokens,
        speculation=speculation if worker.shares_prefixes else None,
        draft_tokens=min(worker.draft_tokens, config.limits.max_num_batched_tokens),
    )


def _refusal(request: Request, error: str, status: int) -> TokenOutput:
    return TokenOutput(id=request.id, finish_reason="error", error=error, status=status)
