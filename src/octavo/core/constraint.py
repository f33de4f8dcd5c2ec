"""Where one sequence stands in what its output must match.

    reasoning ── its end ──> text ── an opener ──> held ── complete ──> text …      (tool calls)
    reasoning ── its end ──────────────────────────> held ── complete ──> finished   (the whole answer)

Only ``held`` costs anything: there a matcher of llguidance says which tokens may come. Elsewhere any token may, and its
bytes are only looked through for the text that ends the state.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.core.matcher import brief
from octavo.structured import GrammarSpec, Guide

GRACE_SECONDS = 0.05  # the longest that a step waits for masks
WINDOW = 768  # bytes at the end of a text in which an opener, which is shorter, is looked for

Mask = npt.NDArray[np.int32]


class Grammar:
    """A compiled grammar. ``size`` estimates its bytes; ``slow``: one of its masks took longer than a step may wait.

    ``mask`` is that of its first token; ``tokenize`` turns bytes into any tokens that spell them.
    """

    def __init__(self, matcher: Any, mask: Mask, size: int, tokenize: Callable[[bytes], list[int]]) -> None:
        self.matcher = matcher
        self.mask = mask
        self.size = size
        self.tokenize = tokenize
        self.slow = False


class TokenTexts:
    """What a constraint needs to know of a vocabulary: the bytes of each token, and the id of a text that is one."""

    def __init__(self, tokens: Sequence[bytes], find: Callable[[str], int | None]) -> None:
        self.tokens = tokens
        self.find = find


class _State(Enum):
    START = 0  # reasoning or the answer may come
    REASONING = 1
    TEXT = 2
    HELD = 3


class Constraint:
    """One sequence inside its `Guide`. ``mask`` (int32, bit v % 32 of word v // 32: token v) counts while ``masks``.

    ``ready``: the mask is that of the next token. ``finished``: no token can follow. ``error`` says what llguidance
    gave up on. One thread at a time works on it: a lane while it is not ready, else the engine's.
    """

    def __init__(self, guide: Guide, grammars: Mapping[GrammarSpec, Grammar], texts: TokenTexts) -> None:
        """``grammars`` may lack some that only openers need; what they open is not held then."""
        self.ready = True
        self.finished = False
        self.error = ""
        self.stale = False  # the mask must be computed
        self._guide, self._grammars, self._texts = guide, grammars, texts
        self._openers = [(re.compile(opener.pattern.encode()), opener.bodies) for opener in guide.openers]
        self._end = re.compile(guide.reasoning_end.encode())
        self._seen = b""  # the end of the text that is not held
        self._matcher: Any = None
        self._buffer: Mask | None = None
        self._address = 0
        self._grammar: Grammar | None = None
        self.mask: Mask = _NO_MASK
        self._state = _State.TEXT
        self._begin()

    @property
    def masks(self) -> bool:
        """Whether the next token is restricted."""
        return self._grammar is not None

    @property
    def slow(self) -> bool:
        """Whether the next mask may take longer than a step can wait."""
        return self._grammar is not None and self._grammar.slow

    def mark_slow(self) -> None:
        """Whoever is in the same grammar is put aside while a mask is computed, from now on."""
        if self._grammar is not None:
            self._grammar.slow = True

    def accept(self, token: int) -> None:
        """The sequence goes on with ``token``."""
        if self._state is _State.START:
            self._start(token)
        elif self._state is _State.HELD:
            self._follow(token)
        elif token < len(self._texts.tokens):
            self._read(self._texts.tokens[token])

    def allows(self, token: int) -> bool:
        """Whether the next token may be ``token``; the mask need not be known."""
        if self.stale:
            return bool(self._matcher.validate_tokens([token]) == 1)
        return bool(self.mask[token // 32] >> token % 32 & 1)

    def fill(self) -> None:
        """Computes the mask of the next token if it is ``stale``."""
        grammar = self._grammar
        if not self.stale or grammar is None:
            return
        if self._buffer is None:
            self._buffer = np.empty_like(grammar.mask)
            self._address = self._buffer.ctypes.data
        start = time.perf_counter()
        self._matcher.unsafe_compute_mask_ptr(self._address, self._buffer.nbytes)
        self.mask, self.stale = self._buffer, False
        self._look()
        if time.perf_counter() - start > GRACE_SECONDS:
            grammar.slow = True

    # --- states -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        guide = self._guide
        if guide.reasoning_end and not guide.reasoning_start:
            self._state = _State.REASONING
            return
        if guide.whole is not None:
            self._hold(self._grammars[guide.whole])
        mark = self._texts.find(guide.reasoning_start) if guide.reasoning_start else None
        if mark is not None:
            self._state = _State.START
            if guide.whole is not None:
                self.mask = self.mask.copy()
                self.mask[mark // 32] |= np.int32(np.uint32(1 << mark % 32).view(np.int32))

    def _start(self, token: int) -> None:
        """The first token decides: it is the mark of reasoning, or part of the answer."""
        if token == self._texts.find(self._guide.reasoning_start):
            self._state, self._grammar, self._matcher = _State.REASONING, None, None
        elif self._guide.whole is not None:
            self._state = _State.HELD
            self._follow(token)
        elif self._texts.tokens[token].strip():
            self._state = _State.TEXT
            self._read(self._texts.tokens[token])

    def _read(self, text: bytes) -> None:
        self._seen = (self._seen + text)[-WINDOW:]
        if self._state is _State.REASONING:
            found = self._end.search(self._seen)
            if found is None:
                return
            self._seen = self._seen[found.end() :]
            if self._guide.whole is not None:
                rest = self._seen.lstrip()
                if not self._hold(self._grammars[self._guide.whole], rest):
                    self.finished, self.error = True, "what follows the reasoning in the same token does not fit"
                return
            self._state = _State.TEXT
        self._open()

    def _open(self) -> None:
        for pattern, bodies in self._openers:
            found = pattern.search(self._seen)
            if found is None:
                continue
            spec = bodies.get(found[1].decode() if pattern.groups else "")
            rest = self._seen[found.end() :]
            if spec is not None and spec in self._grammars and self._hold(self._grammars[spec], rest):
                return
            self._seen = rest

    def _hold(self, grammar: Grammar, rest: bytes = b"") -> bool:
        """From now on ``grammar`` holds; ``rest`` has come already. False, with no change, if that does not fit."""
        matcher = None
        if rest:
            matcher = grammar.matcher.deep_copy()
            tokens = grammar.tokenize(rest)
            if matcher.try_consume_tokens(tokens) < len(tokens):
                return False
        self._state, self._grammar, self._matcher, self._seen = _State.HELD, grammar, matcher, b""
        self.mask, self.stale = grammar.mask, bool(rest)
        if rest:
            self._look()
        return True

    def _follow(self, token: int) -> None:
        if self._grammar is None:
            return
        if self._matcher is None:  # a copy may have to wait for a slow mask, so it is made late
            self._matcher = self._grammar.matcher.deep_copy()
        self._matcher.consume_token(token)
        self.stale = True
        self._look()

    def _look(self) -> None:
        if not self._matcher.is_stopped():
            return
        if self._matcher.is_error():
            self.finished, self.error = True, brief(self._matcher.get_error())
        elif self._guide.whole is not None:
            self.finished = True
        else:
            self._state, self._grammar, self._matcher, self.stale = _State.TEXT, None, None, False


_NO_MASK: Mask = np.zeros(0, np.int32)
