"""Structured output: when grammars are compiled and masks of tokens filled, beside the steps of an engine.

    open(id, guide) ─compile lane──> compiled ──> Constraint: mask of the first token ready
                                                     │
    token committed ── advance(id, token) ── ended?  │ no: fast lane fills the next mask while the forward runs
                                                     ▼
                                             mask ready ──> sample

Compiling can take long, and is done by `compiler` on a thread of its own. A mask that turns out slow is moved to a lane
of its own: the engine never waits for it (`EngineCore` puts such requests aside).
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from octavo.core.compiler import Compiler
from octavo.core.constraint import GRACE_SECONDS, Constraint, Grammar
from octavo.core.matcher import STACK_BYTES
from octavo.core.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.log import get_logger
from octavo.structured import GrammarSpec, Guide

CACHE_BYTES = 128 << 20  # of compiled grammars, estimated
_FILL_THREADS = 4
_FILL_LEAST = 8  # masks that are worth another thread


class _Lane:
    """Threads that take jobs in order; started with the first one."""

    def __init__(self, name: str, threads: int, stack: int = 0) -> None:
        self._name, self._count, self._stack = name, threads, stack
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.started = False

    def put(self, job: Callable[[], None]) -> None:
        if not self.started:
            self._start()
        self._jobs.put(job)

    def close(self) -> None:
        for _ in range(self._count if self.started else 0):
            self._jobs.put(None)

    def _start(self) -> None:
        before = threading.stack_size(self._stack)
        try:
            for i in range(self._count):
                threading.Thread(target=self._run, name=f"{self._name}-{i}", daemon=True).start()
        finally:
            threading.stack_size(before)
        self.started = True

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # what it refers to can be large


@dataclass
class _Opening:
    """A request whose grammars are being compiled."""

    guide: Guide
    found: dict[GrammarSpec, Grammar | str]
    wanted: frozenset[GrammarSpec] = field(init=False)

    def __post_init__(self) -> None:
        self.wanted = frozenset(self.guide.specs())

    @property
    def complete(self) -> bool:
        return len(self.found) == len(self.wanted)


class Grammars:
    """The constraints of an engine's sequences, by request id. All methods are called from the engine's thread."""

    def __init__(self, load: Callable[[], Vocabulary], *, ahead: bool = True) -> None:
        """``ahead``: masks are filled while a forward runs on another device; else when they are asked for."""
        self.live: dict[str, Constraint] = {}
        self._ahead = ahead
        self._compiler = Compiler(load)
        self._cache = _Cache(CACHE_BYTES)
        self._opening: dict[str, _Opening] = {}
        self._building: set[GrammarSpec] = set()
        # What became of a grammar, and whether that is to be remembered.
        self._built: queue.SimpleQueue[tuple[GrammarSpec, Grammar | str, bool]] = queue.SimpleQueue()
        self._news = threading.Condition()
        self._compile_lane = _Lane("octavo-grammar", 1, STACK_BYTES)
        self._fast_lane = _Lane("octavo-mask", _FILL_THREADS)
        self._slow_lane = _Lane("octavo-mask-slow", 1)

    def open(self, id: str, guide: Guide) -> str | None:
        """Starts to compile what is not known; returns why the guide is refused if that is known.

        The constraint is in ``live`` now or after `opened` names the id.
        """
        specs = guide.specs()
        opening = _Opening(guide, {spec: known for spec in specs if (known := self._cache.get(spec)) is not None})
        for spec in specs:
            if spec in opening.found or spec in self._building:
                continue
            try:
                self._compile_lane.put(partial(self._build, spec))
            except RuntimeError as error:  # no address space for the threads' stacks
                return f"Grammars cannot be compiled on this machine: {error}."
            self._building.add(spec)
        if opening.complete:
            return self._start(id, opening) or None
        self._opening[id] = opening
        return None

    def opened(self) -> list[tuple[str, str]]:
        """(id, "" or why its guide is refused) of requests whose grammars were compiled since the last call."""
        while not self._built.empty():
            spec, result, lasting = self._built.get()
            self._building.remove(spec)
            if lasting:
                self._cache.put(spec, result)
            for opening in self._opening.values():
                if spec in opening.wanted:
                    opening.found[spec] = result
        complete = [id for id, opening in self._opening.items() if opening.complete]
        return [(id, self._start(id, self._opening.pop(id))) for id in complete]

    def close(self, id: str) -> None:
        """The request has ended."""
        self._opening.pop(id, None)
        self.live.pop(id, None)

    def advance(self, tokens: Sequence[tuple[str, int]]) -> None:
        """(id, token) of each constraint that goes on with a token; the next masks are on their way then.

        Constraints that finished, failed or stand in free text are ready at once and need no mask; those of slow
        grammars are not even looked at here.
        """
        batch = []
        for id, token in tokens:
            one = self.live[id]
            if one.slow:
                one.ready = False
                self._slow_lane.put(partial(self._fill, [one], token))
                continue
            one.accept(token)
            if one.stale and not one.finished:
                batch.append(one)
        if self._ahead:
            self._fill_soon(batch)

    def fill(self, ids: Sequence[str]) -> None:
        """Fills the masks of ``ids`` that are not known; those that take too long are not `Constraint.ready` then."""
        self._fill_soon([one for id in ids if (one := self.live[id]).stale and one.ready])
        self.settle(ids)

    def _fill_soon(self, batch: list[Constraint]) -> None:
        for one in batch:
            one.ready = False
        lanes = min(_FILL_THREADS, -(-len(batch) // _FILL_LEAST))
        for i in range(lanes):
            self._fast_lane.put(partial(self._fill, batch[i::lanes]))

    def settle(self, ids: Sequence[str]) -> None:
        """Waits until the constraints of ``ids`` are ready, slow ones excepted, for `GRACE_SECONDS` at most."""
        due = [one for id in ids if not (one := self.live[id]).ready and not one.slow]
        if not due:
            return
        with self._news:
            self._news.wait_for(lambda: all(one.ready or one.slow for one in due), GRACE_SECONDS)
        for one in due:
            if not one.ready:
                one.mark_slow()

    def wait(self, seconds: float) -> None:
        """Waits until a grammar is compiled or a mask filled, or ``seconds`` are over."""
        with self._news:
            if self._built.empty():
                self._news.wait(seconds)

    def stop(self) -> None:
        """Ends the threads, each after the job it is at; one that compiles is at its end soon."""
        self._compiler.kill()
        if self._compile_lane.started:
            self._compile_lane.put(self._compiler.close)
        for lane in (self._compile_lane, self._fast_lane, self._slow_lane):
            lane.close()

    def _start(self, id: str, opening: _Opening) -> str:
        """Puts the constraint of a request into ``live``; returns why not, if it is refused."""
        guide, found = opening.guide, opening.found
        refused = next((result for result in found.values() if isinstance(result, str)), "")
        if refused and guide.strict:
            return refused
        grammars = {spec: result for spec, result in found.items() if isinstance(result, Grammar)}
        self.live[id] = Constraint(guide, grammars, self._compiler.texts)
        return ""

    def _build(self, spec: GrammarSpec) -> None:
        try:
            self._built.put((spec, self._compiler.compile(spec), True))
        except OctavoError as error:
            self._built.put((spec, str(error), False))
        self._tell()

    def _fill(self, batch: Sequence[Constraint], token: int | None = None) -> None:
        for one in batch:
            try:
                if token is not None:
                    one.accept(token)
                if not one.finished:
                    one.fill()
            except BaseException as error:  # a panic of llguidance is no Exception; this thread must go on
                one.finished, one.error = True, f"llguidance failed: {type(error).__name__}"
                get_logger().exception("a mask could not be filled")
            one.ready = True
        self._tell()

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()


class _Cache:
    """Grammars and refusals by spec, the least recently used dropped beyond ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[GrammarSpec, Grammar | str] = OrderedDict()
        self.size = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, spec: GrammarSpec) -> Grammar | str | None:
        found = self._entries.get(spec)
        if found is not None:
            self._entries.move_to_end(spec)
        return found

    def put(self, spec: GrammarSpec, result: Grammar | str) -> None:
        self._entries[spec] = result
        self.size += _cost(spec, result)
        while self.size > self._limit and len(self._entries) > 1:
            old, dropped = self._entries.popitem(last=False)
            self.size -= _cost(old, dropped)


def _cost(spec: GrammarSpec, result: Grammar | str) -> int:
    return len(spec.text) + (result.size if isinstance(result, Grammar) else len(result)) + 512
