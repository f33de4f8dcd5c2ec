"""What every request passes, whatever its path: an id, the key, the size limit, errors as JSON, one line of log.

It wraps the whole application, so a route added later is guarded too: only the paths in `PUBLIC` need no key.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import OctavoError
from octavo.log import get_logger
from octavo.server import errors
from octavo.server.keys import Keys

PAGES = frozenset({"/", "/dashboard"})  # of no content: what they show they ask for with the key
PUBLIC = frozenset({"/health", "/ping"}) | PAGES
ADMIN = frozenset({"/reset_prefix_cache", "/dashboard/data"})  # what concerns all users, or tells of them
QUIET = PUBLIC | {"/metrics", "/dashboard/data"}  # asked every few seconds by machines: not logged
MAX_BODY_BYTES = 32 * 2**20
BODY_SECONDS = 60.0  # for the next piece of a body to come
_ID = re.compile(rb"[!-~]{1,128}")  # what a client may call its request


class Guard:
    """ASGI middleware; see the module. What is answered belongs to the owner of the key, ``scope["owner"]``.

    With ``echo_ids`` the header x-request-id of an answer is the client's, if it sent one.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        max_body: int = MAX_BODY_BYTES,
        log_requests: bool = False,
        echo_ids: bool = False,
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body = max_body
        self._log = log_requests
        self._echo = echo_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self  # makes the router raise what it would answer in plain text
        exchange = _Exchange(scope, receive, send, self._max_body, _sent_id(scope) if self._echo else None)
        try:
            self._admit(scope)
            await self._app(scope, exchange.receive, exchange.send)
        except (errors.ClientGone, ClientDisconnect):
            exchange.status = 499
        except HTTPException as error:  # the router's: 404 or 405
            allow = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
            await exchange.fail(errors.no_route(scope["method"], scope["path"], allow))
        except OctavoError as error:
            await exchange.fail(error)
        except asyncio.CancelledError:  # uvicorn's, when the time for last answers is over
            await exchange.fail(errors.shutting_down())
        except Exception:
            await exchange.fail(errors.unexpected(exchange.id))
        if self._log and scope["path"] not in QUIET:
            exchange.log()

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        scope["owner"] = b""
        if self._keys.any and scope["path"] not in PUBLIC:
            owner = self._keys.owner(_key_of(headers))
            if owner is None:
                raise errors.bad_key()
            if scope["path"] in ADMIN and not self._keys.is_admin(owner):
                raise errors.not_admin(scope["path"])
            scope["owner"] = owner
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max_body:
            raise errors.too_large(self._max_body)


def _sent_id(scope: Scope) -> str | None:
    sent = dict(scope["headers"]).get(b"x-request-id", b"")
    return sent.decode() if _ID.fullmatch(sent) else None


def _key_of(headers: dict[bytes, bytes]) -> bytes:
    """The key that a request brings, as OpenAI's clients send it or as Anthropic's do; empty if there is none."""
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    return given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()


class _Exchange:
    """One request and its response: counts the body, adds the id to the headers, knows whether an error still can."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body: int, sent_id: str | None) -> None:
        own = scope["request_id"] = uuid.uuid4().hex  # inside: clients may send one twice
        self.id = sent_id or own
        self.status = 0
        self._scope, self._receive, self._send = scope, receive, send
        self._left = self._max_body = max_body
        self._whole = False
        self._began = time.perf_counter()

    async def receive(self) -> Message:
        if self._whole:  # what comes now is the end of the connection
            return await self._receive()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                message = await self._receive()
        except TimeoutError:
            raise errors.too_slow(BODY_SECONDS) from None
        if message["type"] == "http.request":
            self._whole = not message.get("more_body", False)
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise errors.too_large(self._max_body)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        await self._send(message)

    async def fail(self, error: OctavoError) -> None:
        """Answers with ``error``; after the first byte of another answer all that is left is to break off."""
        if self.status == 0:
            await errors.response_of(error, self._scope["path"], self.id)(self._scope, self._receive, self.send)
        else:
            get_logger().error("request %s broke off: %s", self.id, error)

    def log(self) -> None:
        took = time.perf_counter() - self._began
        get_logger().info("%s %s %d %.3fs %s", self._scope["method"], self._scope["path"], self.status, took, self.id)
