"""Structured output: grammars are compiled and masks of tokens filled with llguidance, which only this file knows.

    open(id, spec) ──compile lane──> compiled ──> Constraint: mask of the first token ready
                                                     │
    token committed ── advance(id, token) ── ended?  │ no: fast lane fills the next mask while the forward runs
                                                     ▼
                                             mask ready ──> sample

Grammars come from strangers. Their text is bounded (`structured`), llguidance's own limits bound what one call may
take in memory and time, and the stack of the threads that compile is large: llguidance follows references between
rules by recursion, and a chain of a few thousand of them overflows the usual stack, which would kill the process. What
turns out slow is moved to a lane of its own: the engine never waits for it (`EngineCore` puts such requests aside).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.core.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.log import get_logger
from octavo.structured import GrammarSpec

CACHE_BYTES = 128 << 20  # of compiled grammars, estimated
COMPILE_SECONDS = 10.0  # a grammar that takes longer, its first mask included, is refused
GRACE_SECONDS = 0.05  # the longest that a step waits for masks
_STACK_BYTES = 512 << 20  # virtual; a level of recursion takes below 8 kB, and `MAX_GRAMMAR_BYTES` holds 16,384
_COMPILE_THREADS = 2
_FILL_THREADS = 4
_FILL_LEAST = 8  # masks that are worth another thread
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # about 2 kB each
    "max_grammar_size": 250_000,
    "verbose_errors": False,
}


class _Lane:
    """Threads that take jobs in order; started with the first one."""

    def __init__(self, name: str, threads: int, stack: int = 0) -> None:
        self._name, self._count, self._stack = name, threads, stack
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = False

    def put(self, job: Callable[[], None]) -> None:
        if not self._started:
            self._start()
        self._jobs.put(job)

    def close(self) -> None:
        for _ in range(self._count if self._started else 0):
            self._jobs.put(None)

    def _start(self) -> None:
        before = threading.stack_size(self._stack)
        try:
            for i in range(self._count):
                threading.Thread(target=self._run, name=f"{self._name}-{i}", daemon=True).start()
        finally:
            threading.stack_size(before)
        self._started = True

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # what it refers to can be large


class Grammar:
    """A compiled grammar. ``size`` estimates its bytes; ``slow``: one of its masks took longer than a step may wait."""

    def __init__(self, matcher: Any, mask: npt.NDArray[np.int32], size: int, *, slow: bool) -> None:
        self.matcher = matcher
        self.mask = mask
        self.size = size
        self.slow = slow


class Constraint:
    """One sequence inside its grammar. ``mask`` (int32, bit v % 32 of word v // 32: token v) counts while ``ready``.

    ``finished``: no token can follow. ``error`` says what llguidance gave up on. One thread at a time works on it: a
    lane while it is not ready, else the engine's.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.mask = grammar.mask
        self.ready = True
        self.finished = False
        self.error = ""
        self._matcher: Any = None  # made when it is first needed: a copy may have to wait for a slow mask
        self._buffer: npt.NDArray[np.int32] | None = None
        self._address = 0

    def accept(self, token: int) -> None:
        """The sequence goes on with ``token``."""
        if self._matcher is None:
            self._matcher = self.grammar.matcher.deep_copy()
        self._matcher.consume_token(token)
        self._look()

    def fill(self) -> None:
        """Computes the mask of the next token, after `accept`."""
        if self._buffer is None:
            self._buffer = np.empty_like(self.grammar.mask)
            self._address = self._buffer.ctypes.data
        start = time.perf_counter()
        self._matcher.unsafe_compute_mask_ptr(self._address, self._buffer.nbytes)
        self.mask = self._buffer
        self._look()
        if time.perf_counter() - start > GRACE_SECONDS:
            self.grammar.slow = True

    def _look(self) -> None:
        if self._matcher.is_stopped():
            self.finished = True
            if self._matcher.is_error():
                self.error = _brief(self._matcher.get_error())


class Grammars:
    """The constraints of an engine's sequences, by request id. All methods are called from the engine's thread."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        self.live: dict[str, Constraint] = {}
        self._compiler = _Compiler(load)
        self._cache = _Cache(CACHE_BYTES)
        self._building: dict[GrammarSpec, list[str]] = {}
        self._built: queue.SimpleQueue[tuple[GrammarSpec, Grammar | str]] = queue.SimpleQueue()
        self._news = threading.Condition()
        self._compile_lane = _Lane("octavo-grammar", _COMPILE_THREADS, _STACK_BYTES)
        self._fast_lane = _Lane("octavo-mask", _FILL_THREADS)
        self._slow_lane = _Lane("octavo-mask-slow", 1)

    def open(self, id: str, spec: GrammarSpec) -> str | None:
        """Starts to compile, unless it is known; returns why it is refused if that is known too.

        The constraint is in ``live`` now or after `opened` names the id.
        """
        found = self._cache.get(spec)
        if isinstance(found, str):
            return found
        if found is not None:
            self.live[id] = Constraint(found)
        elif spec in self._building:
            self._building[spec].append(id)
        else:
            try:
                self._compile_lane.put(lambda: self._build(spec))
            except RuntimeError as error:  # no address space for the threads' stacks
                return f"Grammars cannot be compiled on this machine: {error}."
            self._building[spec] = [id]
        return None

    def opened(self) -> list[tuple[str, str]]:
        """(id, "" or why its grammar is refused) of requests whose grammar was compiled since the last call."""
        done = []
        while not self._built.empty():
            spec, result = self._built.get()
            self._cache.put(spec, result)
            for id in self._building.pop(spec):
                if isinstance(result, Grammar):
                    self.live[id] = Constraint(result)
                done.append((id, result if isinstance(result, str) else ""))
        return done

    def close(self, id: str) -> None:
        """The request has ended."""
        self.live.pop(id, None)

    def advance(self, tokens: Sequence[tuple[str, int]]) -> None:
        """(id, token) of each constraint that goes on with a token; the next masks are on their way then.

        Constraints that finished or failed are ready at once and need no mask; those of slow grammars are not even
        looked at here.
        """
        batch = []
        for id, token in tokens:
            one = self.live[id]
            if one.grammar.slow:
                one.ready = False
                self._slow_lane.put(lambda one=one, token=token: self._fill([one], token))  # type: ignore[misc]
                continue
            one.accept(token)
            if not one.finished:
                one.ready = False
                batch.append(one)
        lanes = min(_FILL_THREADS, -(-len(batch) // _FILL_LEAST))
        for i in range(lanes):
            self._fast_lane.put(lambda part=batch[i::lanes]: self._fill(part))  # type: ignore[misc]

    def settle(self, ids: Sequence[str]) -> None:
        """Waits until the constraints of ``ids`` are ready, slow ones excepted, for `GRACE_SECONDS` at most."""
        due = [one for id in ids if not (one := self.live[id]).ready and not one.grammar.slow]
        if not due:
            return
        with self._news:
            self._news.wait_for(lambda: all(one.ready or one.grammar.slow for one in due), GRACE_SECONDS)
        for one in due:
            if not one.ready:
                one.grammar.slow = True

    def wait(self, seconds: float) -> None:
        """Waits until a grammar is compiled or a mask filled, or ``seconds`` are over."""
        with self._news:
            if self._built.empty():
                self._news.wait(seconds)

    def stop(self) -> None:
        """Ends the threads, each after the job it is at."""
        for lane in (self._compile_lane, self._fast_lane, self._slow_lane):
            lane.close()

    def _build(self, spec: GrammarSpec) -> None:
        self._built.put((spec, self._compiler.compile(spec)))
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


class _Compiler:
    """Makes `Grammar`s; used by several threads. The vocabulary is loaded with the first one."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._words = 0

    def compile(self, spec: GrammarSpec) -> Grammar | str:
        """The grammar, or why there is none."""
        try:
            with self._lock:
                if self._tokenizer is None:
                    self._set_up(self._load())
            return self._compile(spec)
        except OctavoError as error:
            return str(error)
        except BaseException as error:  # a panic of llguidance is no Exception; this thread must go on
            get_logger().exception("a grammar could not be compiled")
            return f"The grammar could not be compiled: {type(error).__name__}."

    def _set_up(self, vocabulary: Vocabulary) -> None:
        import llguidance

        # Without a token that ends a text, one is made up outside of the logits: it is allowed and never sampled.
        size = len(vocabulary.tokens)
        ends = vocabulary.ends or [size]
        extra = [] if vocabulary.ends else [b"<end>"]
        made = llguidance.TokenizerWrapper(_Encoder(vocabulary, [*vocabulary.tokens, *extra], ends))
        self._tokenizer = llguidance.LLTokenizer(made, eos_token=ends)
        self._words = -(-(size + len(extra)) // 32)

    def _compile(self, spec: GrammarSpec) -> Grammar | str:
        import llguidance

        start = time.perf_counter()
        try:
            text = _source(spec)
        except (ValueError, RecursionError) as error:
            return f"The grammar is refused: {_brief(str(error))}."
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():
            return f"The grammar is refused: {_brief(matcher.get_error())}."
        begin = time.perf_counter()
        first = matcher.deep_copy()
        mask = np.frombuffer(first.compute_bitmask(), np.int32)[: self._words]
        now = time.perf_counter()
        if first.is_error():
            return f"The grammar is refused: {_brief(first.get_error())}."
        if now - start > COMPILE_SECONDS:
            return f"The grammar took {now - start:.1f} s to compile, more than {COMPILE_SECONDS:g} s. Simplify it."
        size = _BASE_BYTES + _BYTES_PER_CHARACTER * len(spec.text) + mask.nbytes
        return Grammar(matcher, mask, size, slow=now - begin > GRACE_SECONDS)


_BASE_BYTES = 64 << 10  # measured over many schemas; the lexer's states grow with use
_BYTES_PER_CHARACTER = 400


class _Encoder:
    """What llguidance wants of a tokenizer. ``encode`` of text that follows other text: no space is put before it."""

    def __init__(self, vocabulary: Vocabulary, tokens: list[bytes], ends: list[int]) -> None:
        self._encode = vocabulary.tokenizer.encode
        self._anchor = self._encode("\n", add_special_tokens=False)
        self.tokens = tokens
        self.special_token_ids = sorted({*vocabulary.special, *ends})
        self.eos_token_id = ends[0]
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode()
        ids = self._encode("\n" + text, add_special_tokens=False)
        count = len(self._anchor)
        if ids[:count] == self._anchor:
            return ids[count:]
        return self._encode(text, add_special_tokens=False)


def _source(spec: GrammarSpec) -> str:
    """What `LLMatcher` takes; raises `ValueError` or `RecursionError` for GBNF that cannot be read."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if spec.kind == "json_schema":
        made = LLMatcher.grammar_from_json_schema(spec.text)
    elif spec.kind == "regex":
        made = LLMatcher.grammar_from_regex(spec.text)
    elif spec.kind == "lark":
        made = LLMatcher.grammar_from_lark(spec.text)
    else:
        try:
            made = LLMatcher.grammar_from_lark(gbnf_to_lark(spec.text))
        except RecursionError:
            raise
        except Exception as error:  # it raises nothing narrower for a rule that is missing
            raise ValueError(f"it is no GBNF: {error}") from None
    return str(made)


def _brief(message: str) -> str:
    """The part of llguidance's message that is for people."""
    text = message.split("<state>")[0].replace("<non-verbose/>", "")
    return " ".join(text.split())[:300].rstrip(". ")


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
