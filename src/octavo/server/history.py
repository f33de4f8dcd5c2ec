"""The requests of the last minutes, for the dashboard: how long each waited and how fast it was answered."""

from __future__ import annotations

import time
from collections import deque
from itertools import count, islice

import msgspec

from octavo.frontend.outputs import RequestState
from octavo.types import RequestOutput

KEPT = 512  # requests that have ended


class Span(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request. Times are seconds since the server's start; ``number`` counts requests in the order they ended."""

    id: str
    number: int = 0
    arrived: float
    first_token: float | None = None
    ended: float | None = None
    prompt_tokens: int
    cached_tokens: int = 0
    output_tokens: int = 0
    reason: str = ""


class History:
    """Filled by whoever answers requests, from one event loop."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._numbers = count(1)
        self._ended: deque[Span] = deque(maxlen=KEPT)
        self._running: dict[int, RequestState] = {}

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def started(self, state: RequestState) -> None:
        """``state`` is being answered from now on."""
        self._running[id(state)] = state

    def ended(self, state: RequestState, result: RequestOutput, reason: str) -> None:
        """It is no longer, with ``result``; ``reason`` is why."""
        self._running.pop(id(state), None)
        span = self._span(state, sum(len(output.token_ids) for output in result.outputs))
        span.number, span.reason = next(self._numbers), reason
        span.ended = span.ended or self.now()
        self._ended.append(span)

    def running(self) -> list[Span]:
        """Those that are being answered, the oldest first, no more than `KEPT`."""
        return [self._span(state, state.generated) for state in islice(self._running.values(), KEPT)]

    def after(self, number: int) -> list[Span]:
        """Those that ended after the one with ``number``, as far as they are kept."""
        return [span for span in self._ended if span.number > number]

    def _span(self, state: RequestState, tokens: int) -> Span:
        times = state.metrics
        first, ended = times.first_token_time, times.finished_time
        return Span(
            id=state.prepared.id,
            arrived=times.arrival_time - self._began,
            first_token=None if first is None else first - self._began,
            ended=None if ended is None else ended - self._began,
            prompt_tokens=len(state.prepared.prompt_token_ids),
            cached_tokens=state.num_cached_tokens,
            output_tokens=tokens,
        )
