"""`EngineClient` over ZeroMQ: a table of pending requests, and one callback that reads what the engine core sends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec
import zmq

from octavo.errors import EngineDead, OctavoError, RequestError
from octavo.frontend.client import EngineState
from octavo.frontend.core_process import Core, decode_output
from octavo.types import (
    MAX_MESSAGE_BYTES,
    Abort,
    CoreInput,
    CoreOutput,
    Dead,
    EngineInfo,
    Outputs,
    Ping,
    Pong,
    Request,
    ResetPrefixCache,
    Stats,
    Submit,
    TokenOutput,
)

HEARTBEAT_SECONDS = 30.0  # a loop that has not turned for so long is dead; a step on a CPU can take seconds
MAX_BURST = 16  # messages that are taken in before others in the loop get their turn


class _Inbox:
    """What came for one request and was not taken yet. ``dead``: nothing more will come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.dead = False
        self._loop = loop
        self._outputs: list[TokenOutput] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: TokenOutput) -> None:
        self._outputs.append(output)
        self._wake()

    def die(self) -> None:
        self.dead = True
        self._wake()

    async def take(self) -> list[TokenOutput]:
        """All of it, as soon as there is something; empty only if dead."""
        if not self._outputs and not self.dead:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._outputs = self._outputs, []
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class CoreClient:
    """See `EngineClient`. Make it inside a running event loop, from a `Core` that is ready.

    ``on_death`` is called once, in the loop, when the engine ends without having been told to.
    """

    def __init__(self, core: Core, info: EngineInfo, *, on_death: Callable[[OctavoError], None] | None = None) -> None:
        self.info = info
        self.stats = Stats(pages_total=info.num_pages)
        self._core = core
        self._on_death = on_death
        self._pending: dict[str, _Inbox] = {}
        self._pongs: dict[int, asyncio.Future[Pong]] = {}
        self._nonces = itertools.count(1)
        self._death: OctavoError | None = None
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._socket = core.socket
        self._reading = False
        self._loop.add_reader(self._socket.fileno(), self._wake)
        self._wake()
        core.watch(self._core_ended)

    def engines(self) -> list[EngineState]:
        """See `EngineClient.engines`."""
        return [EngineState(self._death is None, self.stats, "" if self._death is None else self._death.cause)]

    @property
    def load(self) -> int:
        """Requests that the engine has: those of this client, or more if it said so."""
        return max(len(self._pending), self.stats.running + self.stats.waiting)

    async def answers(self, seconds: float) -> bool:
        """Whether the engine's loop turns within ``seconds``, or is known to have ended."""
        since = time.monotonic()
        while self._death is None and not self._closing and time.monotonic() - since < seconds:
            with contextlib.suppress(EngineDead):
                await self.health()
                return True
        return self._death is not None or self._closing

    def kill(self) -> None:
        """Ends an engine that does not answer; `on_death` is called as for any other end."""
        self._core.kill()

    async def submit(self, request: Request) -> AsyncGenerator[list[TokenOutput], None]:
        """See `EngineClient.submit`."""
        if request.id in self._pending:
            raise RequestError(f"a request with id {request.id!r} is running.", "Use another id.", param="request_id")
        inbox = self._pending[request.id] = _Inbox(self._loop)
        try:
            self._send(Submit([request]))
        except OctavoError:
            del self._pending[request.id]
            raise
        return self._batches(inbox)

    async def abort(self, ids: Sequence[str]) -> None:
        """See `EngineClient.abort`."""
        known = [id for id in ids if id in self._pending]
        if known:
            with contextlib.suppress(EngineDead):  # then they have ended already
                self._send(Abort(known))

    async def health(self) -> Stats:
        """See `EngineClient.health`."""
        nonce = next(self._nonces)
        return (await self._ask(Ping(nonce), nonce)).stats

    async def reset_prefix_cache(self) -> None:
        """See `EngineClient.reset_prefix_cache`."""
        nonce = next(self._nonces)
        await self._ask(ResetPrefixCache(nonce), nonce)

    async def close(self) -> None:
        """Ends the core process; what is still pending ends with ``finish_reason="abort"``."""
        if self._closing:
            return
        self._closing = True
        for id in list(self._pending):
            self._deliver(TokenOutput(id=id, finish_reason="abort"))
        self._loop.remove_reader(self._socket.fileno())
        self._core.unwatch()
        await asyncio.to_thread(self._core.stop)

    async def _batches(self, inbox: _Inbox) -> AsyncGenerator[list[TokenOutput], None]:
        while batch := await inbox.take():
            yield batch
            if batch[-1].finish_reason is not None:
                return
        raise self._error()

    def _send(self, message: CoreInput) -> None:
        if self._death is not None or self._closing:
            raise self._error()
        data = msgspec.msgpack.encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise RequestError(f"the request takes {len(data)} bytes, over {MAX_MESSAGE_BYTES}.", "Send less at once.")
        self._socket.send(data, zmq.NOBLOCK)
        self._wake()  # sending can use up the notice that something has come

    async def _ask(self, message: Ping | ResetPrefixCache, nonce: int) -> Pong:
        answer = self._pongs[nonce] = self._loop.create_future()
        try:
            self._send(message)
            return await asyncio.wait_for(answer, HEARTBEAT_SECONDS)
        except TimeoutError:
            raise EngineDead(
                f"the engine has not answered for {HEARTBEAT_SECONDS:.0f} s.", "Restart it if this goes on."
            ) from None
        finally:
            del self._pongs[nonce]

    def _wake(self) -> None:
        """Reads in the next turn of the loop. The descriptor tells of changes only, so all must be read each time."""
        if not self._reading:
            self._reading = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        """All that has come, so that a busy loop hands over several steps at once; but others must get their turn."""
        self._reading = False
        if self._closing:
            return
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_BURST):
                self._take(decode_output(self._socket.recv(zmq.NOBLOCK)))
            self._wake()

    def _take(self, message: CoreOutput) -> None:
        if isinstance(message, Outputs):
            self.stats = message.stats or self.stats
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, Pong):
            self.stats = message.stats
            answer = self._pongs.get(message.nonce)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, Dead):
            self._die(message.error())

    def _deliver(self, output: TokenOutput) -> None:
        inbox = self._pending.get(output.id)
        if inbox is None:
            return
        if output.finish_reason is not None:
            del self._pending[output.id]
        inbox.put(output)

    def _core_ended(self) -> None:
        """Perhaps in another thread; the delay lets a last `Dead` message, which knows more, come first."""

        def later() -> None:
            self._loop.call_later(self._core.last_words_ms() / 1000, lambda: self._die(self._core.death()))

        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(later)

    def _die(self, error: OctavoError) -> None:
        if self._death is not None or self._closing:
            return
        self._death = error
        pending, self._pending = self._pending, {}
        for inbox in pending.values():
            inbox.die()
        for answer in self._pongs.values():
            if not answer.done():
                answer.set_exception(self._error())
        if self._on_death is not None:
            self._on_death(error)

    def _error(self) -> EngineDead:
        if self._death is None:
            return EngineDead("the engine is shutting down.", "Send the request to another server.")
        return EngineDead(self._death.cause, self._death.remedy)
