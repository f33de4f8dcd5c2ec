"""From a body to an answer, the same for every endpoint that generates text.

An `Endpoint` says how its body is read into an `Ask` and how its answer is written; everything between is here.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from octavo.errors import OctavoError
from octavo.frontend.inputs import Prepared
from octavo.frontend.outputs import Delta
from octavo.server.answers import json_response, now
from octavo.server.ask import Ask, Origin, prepare
from octavo.server.protocol import decode
from octavo.server.runs import Runs
from octavo.server.service import Service
from octavo.server.sse import EventStream, while_connected
from octavo.types import RequestOutput

Body = TypeVar("Body", bound=msgspec.Struct)


class Answer(Protocol):
    """Writes one answer: `whole`, or in events, which come from `piece` for each delta and then from `end`."""

    def whole(self, results: list[RequestOutput]) -> msgspec.Struct:
        """The answer from all that came, a result for each prompt."""
        ...

    def piece(self, number: int, delta: Delta) -> Iterable[bytes]:
        """What a delta of prompt ``number`` adds to the stream."""
        ...

    def end(self, results: list[RequestOutput]) -> Iterable[bytes]:
        """The last events of a stream that went well."""
        ...

    def broken(self, error: OctavoError) -> Iterable[bytes]:
        """The last events of a stream that did not."""
        ...


@dataclass(frozen=True)
class Job(Generic[Body]):
    """A request that is ready to run."""

    service: Service
    origin: Origin
    body: Body
    ask: Ask
    id: str
    prepared: list[Prepared]
    created: int = field(default_factory=now)


@dataclass(frozen=True)
class Endpoint(Generic[Body]):
    """``prefix`` begins the ids of its answers. ``read`` raises `RequestError` for what cannot be asked."""

    body: type[Body]
    prefix: str
    read: Callable[[Service, Body, Origin], Ask]
    answer: Callable[[Job[Body]], Answer]

    async def handle(self, service: Service, request: Request) -> ASGIApp:
        """Handles one HTTP request."""
        return await self.respond(await self.open(service, await request.body(), Origin.of(request)), request)

    async def open(self, service: Service, body: bytes, origin: Origin) -> Job[Body]:
        """Decodes and checks; raises `RequestError`."""
        read = decode(body, self.body)
        ask = self.read(service, read, origin)
        id = f"{self.prefix}{origin.id}"
        return Job(service, origin, read, ask, id, await prepare(service, ask, id, origin))

    async def respond(self, job: Job[Body], request: Request) -> ASGIApp:
        """Runs ``job`` and answers in the way that it asks for."""
        answer = self.answer(job)
        if job.ask.stream:
            return EventStream(_events(job, answer), answer.broken)
        whole = await while_connected(request.receive, _whole(job, answer))
        return json_response(whole)

    async def whole(self, job: Job[Body]) -> msgspec.Struct:
        """Runs ``job`` to its end."""
        return await _whole(job, self.answer(job))


async def _whole(job: Job[Any], answer: Answer) -> msgspec.Struct:
    return answer.whole(await Runs(job.service, job.prepared, job.origin.traceparent).finish())


async def _events(job: Job[Any], answer: Answer) -> AsyncGenerator[bytes, None]:
    runs = Runs(job.service, job.prepared, job.origin.traceparent)
    async with contextlib.aclosing(runs.batches()) as batches:
        async for number, deltas in batches:
            events = b"".join([event for delta in deltas for event in answer.piece(number, delta)])
            if events:
                yield events
    yield b"".join(answer.end(runs.results))
