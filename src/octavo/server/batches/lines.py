"""The lines of batch files, in OpenAI's format, and the work on them: for ``/v1/batches`` and ``octavo run-batch``."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from octavo.errors import OctavoError, Overloaded, RequestError
from octavo.server import errors
from octavo.server.endpoint import Endpoint, Origin
from octavo.server.service import Service

MAX_ID = 512  # characters of a custom_id
RETRY_SECONDS = 0.5  # while the engine takes no more requests


class Line(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One request. ``body`` is what would be sent to ``url``."""

    custom_id: str
    method: str = "POST"
    url: str
    body: msgspec.Raw


class LineResponse(msgspec.Struct, kw_only=True):
    """The HTTP response that the request would have had."""

    status_code: int
    request_id: str
    body: Any


class LineAnswer(msgspec.Struct, kw_only=True):
    """What became of a request; ``error`` is always null, as errors are HTTP errors in ``response``."""

    id: str
    custom_id: str
    response: LineResponse
    error: None = None

    @property
    def good(self) -> bool:
        return self.response.status_code == 200


class BadLine(Exception):
    """Line ``number`` is no request."""

    def __init__(self, number: int, error: RequestError) -> None:
        super().__init__(number)
        self.number, self.error = number, error


def read_lines(source: Iterable[bytes], endpoints: dict[str, Endpoint[Any]]) -> Iterator[tuple[int, Line]]:
    """(number from 1, line) of each line that is not empty; raises `BadLine`."""
    for number, text in enumerate(source, 1):
        if not text.strip():
            continue
        try:
            line = _read(text, endpoints)
        except RequestError as error:
            raise BadLine(number, error) from None
        yield number, line


def _read(text: bytes, endpoints: dict[str, Endpoint[Any]]) -> Line:
    try:
        line = msgspec.json.decode(text, type=Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the line is no request: {str(error)[:200]}.", "See docs/api.md, batches.") from None
    if not 0 < len(line.custom_id) <= MAX_ID:
        raise RequestError(f"custom_id has {len(line.custom_id)} characters.", f"Use 1 to {MAX_ID}.", param="custom_id")
    if line.method != "POST":
        raise RequestError(f"method is {line.method[:20]!r}.", "It must be POST.", param="method")
    if line.url not in endpoints:
        raise RequestError(f"url is {line.url[:100]!r}.", f"Use one of {', '.join(endpoints)}.", param="url")
    return line


async def answer_line(service: Service, line: Line, owner: bytes = b"", delay: int = 0) -> LineAnswer:
    """Runs one request to its end; never raises for what is wrong with it."""
    origin = Origin(secrets.token_hex(16), owner, delay)
    try:
        body: Any = await _run(service, line, origin)
        status = 200
    except OctavoError as error:
        body, status = errors.body_of(error), error.status
    except Exception:
        body, status = errors.body_of(errors.unexpected(origin.id)), 500
    response = LineResponse(status_code=status, request_id=origin.id, body=body)
    return LineAnswer(id=f"batch_req_{origin.id}", custom_id=line.custom_id, response=response)


async def work(
    service: Service,
    lines: Iterator[Line],
    done: Callable[[LineAnswer], None],
    *,
    owner: bytes = b"",
    delay: int = 0,
) -> None:
    """Answers ``lines``, so many at a time that the engine's batch is always full; each goes to ``done`` at its end."""

    async def worker() -> None:
        for line in lines:
            done(await answer_line(service, line, owner, delay))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(2 * service.llm.info.max_num_seqs):
            tasks.create_task(worker())


async def _run(service: Service, line: Line, origin: Origin) -> msgspec.Struct:
    endpoint = service.endpoints[line.url]
    while True:
        job = await endpoint.open(service, bytes(line.body), origin)
        if job.body.stream or getattr(job.body, "background", False):
            raise RequestError("a line of a batch asks for a stream or for the background.", "Leave it out.")
        try:
            return await endpoint.whole(job)
        except Overloaded:
            if service.closing:
                raise
            await asyncio.sleep(RETRY_SECONDS)
