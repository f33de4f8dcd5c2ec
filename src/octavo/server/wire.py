"""The HTTP connection: uvicorn's protocol with bounds on what a peer may send, and on how long it may do nothing."""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10  # request line and headers
HEAD_SECONDS = 30.0  # from the first byte of a head to its last
STALL_SECONDS = 60.0  # without a byte taken of those that wait for the client


class Protocol(HttpToolsProtocol):
    """Ends connections whose head is too long or takes too long, and those that take nothing of their answer.

    httptools would collect a head without end, and a client that stops reading would hold its connection for good.
    """

    _head_bytes = 0
    _in_head = True
    _head_timer: TimerHandle | None = None
    _stall_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        self._moves_again()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_timer is None:  # the connection has served a request before
                self._await_head()
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_is_there()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._head_is_there()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._moves_again()
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _head_is_there(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _moves_again(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _watch_stall(self, waiting: int) -> None:
        """Looks again later whether fewer bytes than ``waiting`` wait; a slow client is not one that has stopped."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left < waiting:
                self._watch_stall(left)
            else:
                self._give_up()

        self._stall_timer = self.loop.call_later(STALL_SECONDS, look)

    def _give_up(self) -> None:
        self.transport.abort()
