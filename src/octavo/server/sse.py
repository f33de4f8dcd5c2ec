"""Server-sent events, and the end of a request whose client has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.errors import OctavoError
from octavo.server import errors

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
_encode = msgspec.json.Encoder().encode


def event(chunk: msgspec.Struct) -> bytes:
    """One event of a stream."""
    return b"data: %b\n\n" % _encode(chunk)


def named_event(chunk: msgspec.Struct) -> bytes:
    """An event named by the tag of its struct, as Anthropic's streams and OpenAI's responses have them."""
    return b"event: %b\ndata: %b\n\n" % (str(chunk.__struct_config__.tag).encode(), _encode(chunk))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes; then raises `ClientGone`.

    The request's body must have been read: the next message after it is the disconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise errors.ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI response from an iterator of events.

    The status is sent with the first event: an error before it is an ordinary error response. A later one becomes the
    stream's last events, which ``broken`` makes.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], broken: Callable[[OctavoError], Iterable[bytes]]) -> None:
        self._events = events
        self._broken = broken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._write(scope["request_id"], send))

    async def _write(self, request_id: str, send: Send) -> None:
        started = False
        last = b""
        try:
            async with contextlib.aclosing(self._events) as events:
                async for chunk in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                        started = True
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except OctavoError as error:
            if not started:
                raise
            last = b"".join(self._broken(error))
        except Exception:
            if not started:
                raise
            last = b"".join(self._broken(errors.unexpected(request_id)))
        await send({"type": "http.response.body", "body": last, "more_body": False})
