"""What the answers of both kinds of completion share: usage and timings where they are asked for, and their ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec

from octavo.errors import OctavoError
from octavo.server import errors
from octavo.server.answers import ChatChunk, Completion, Timings, Usage
from octavo.server.endpoint import Job
from octavo.server.protocol import Generation
from octavo.server.sse import DONE, event
from octavo.types import RequestOutput

Body = TypeVar("Body", bound=Generation)


class CompletionAnswer(Generic[Body]):
    """Part of an `endpoint.Answer`; `_chunk` is the subclass's."""

    def __init__(self, job: Job[Body]) -> None:
        self._job, self._body = job, job.body
        self._prompt_tokens = sum(len(one.prompt_token_ids) for one in job.prepared)
        self._made = 0  # tokens that were streamed
        self._tells_usage = job.body.continuous_usage

    def end(self, results: list[RequestOutput]) -> Iterable[bytes]:
        if self._body.include_usage or self._body.return_timings:
            last = self._chunk([], Usage.of(results) if self._body.include_usage else None)
            last.timings = self._timings(results)
            yield event(last)
        yield DONE

    def broken(self, error: OctavoError) -> Iterable[bytes]:
        return event(errors.body_of(error)), DONE

    def _chunk(self, choices: list[Any], usage: Usage | None = None) -> Completion | ChatChunk:
        raise NotImplementedError

    def _usage_after(self, tokens: int) -> Usage | None:
        """The usage once so many tokens more are sent, where every piece of the stream tells it."""
        if not self._tells_usage:
            return None
        self._made += tokens
        return Usage(self._prompt_tokens, self._made, self._prompt_tokens + self._made)

    def _timings(self, results: list[RequestOutput]) -> Timings | msgspec.UnsetType:
        return Timings.of(results) if self._body.return_timings else msgspec.UNSET
