"""`EngineClient` over ZeroMQ: a table of pending requests and one task that reads what the engine core sends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
import zmq
import zmq.asyncio

from octavo.errors import EngineDead, OctavoError, RequestError
from octavo.frontend.core_process import LAST_WORDS_MS, CoreProcess, decode_output, error_of
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
RETRY_SECONDS = 0.01
_Queue = asyncio.Queue[TokenOutput | None]  # None: the engine died


class CoreClient:
    """See `EngineClient`. Make it inside a running event loop, from a `CoreProcess` that is ready.

    ``on_death`` is called once, in the loop, when the engine ends without having been told to.
    """

    def __init__(
        self, process: CoreProcess, info: EngineInfo, *, on_death: Callable[[OctavoError], None] | None = None
    ) -> None:
        self.info = info
        self.stats = Stats(pages_total=info.num_pages)
        self._process = process
        self._on_death = on_death
        self._pending: dict[str, _Queue] = {}
        self._pongs: dict[int, asyncio.Future[Pong]] = {}
        self._nonces = itertools.count(1)
        self._death: OctavoError | None = None
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._outputs = zmq.asyncio.Socket.shadow(process.outputs)
        self._reader = self._loop.create_task(self._read())
        process.watch(self._process_ended)

    async def submit(self, request: Request) -> AsyncIterator[TokenOutput]:
        """See `EngineClient.submit`."""
        if request.id in self._pending:
            raise RequestError(f"a request with id {request.id!r} is running.", "Use another id.", param="request_id")
        waiting: _Queue = asyncio.Queue()
        self._pending[request.id] = waiting
        try:
            await self._send(Submit([request]))
        except BaseException:
            self._pending.pop(request.id, None)
            raise
        return self._tokens(waiting)

    async def abort(self, ids: Sequence[str]) -> None:
        """See `EngineClient.abort`."""
        known = [id for id in ids if id in self._pending]
        if known:
            with contextlib.suppress(EngineDead):  # then they have ended already
                await self._send(Abort(known))

    async def health(self) -> Stats:
        """See `EngineClient.health`."""
        nonce = next(self._nonces)
        return (await self._ask(Ping(nonce), nonce)).stats

    async def reset_prefix_cache(self) -> bool:
        """See `EngineClient.reset_prefix_cache`."""
        nonce = next(self._nonces)
        return (await self._ask(ResetPrefixCache(nonce), nonce)).ok

    async def close(self) -> None:
        """Ends the core process; what is still pending ends with ``finish_reason="abort"``."""
        if self._closing:
            return
        self._closing = True
        for id in list(self._pending):
            self._deliver(TokenOutput(id=id, finish_reason="abort"))
        self._reader.cancel()
        await asyncio.to_thread(self._process.stop)

    async def _tokens(self, waiting: _Queue) -> AsyncIterator[TokenOutput]:
        while True:
            output = await waiting.get()
            if output is None:
                raise self._error()
            yield output
            if output.finish_reason is not None:
                return

    async def _send(self, message: CoreInput) -> None:
        """Never waits for room, only for the first connection of a core that has just become ready."""
        data = msgspec.msgpack.encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise RequestError(f"the request takes {len(data)} bytes, over {MAX_MESSAGE_BYTES}.", "Send less at once.")
        while True:
            if self._death is not None or self._closing:
                raise self._error()
            try:
                self._process.inputs.send(data, zmq.NOBLOCK)
                return
            except zmq.Again:
                await asyncio.sleep(RETRY_SECONDS)

    async def _ask(self, message: Ping | ResetPrefixCache, nonce: int) -> Pong:
        answer = self._pongs[nonce] = self._loop.create_future()
        try:
            await self._send(message)
            return await asyncio.wait_for(answer, HEARTBEAT_SECONDS)
        except TimeoutError:
            raise EngineDead(
                f"the engine has not answered for {HEARTBEAT_SECONDS:.0f} s.", "Restart it if this goes on."
            ) from None
        finally:
            del self._pongs[nonce]

    async def _read(self) -> None:
        while True:
            self._take(decode_output(await self._outputs.recv()))
            await asyncio.sleep(0)  # `recv` does not suspend while messages are waiting: others must get their turn

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
            self._die(error_of(message))

    def _deliver(self, output: TokenOutput) -> None:
        waiting = self._pending.get(output.id)
        if waiting is None:
            return
        if output.finish_reason is not None:
            del self._pending[output.id]
        waiting.put_nowait(output)

    def _process_ended(self) -> None:
        """In the watching thread; the delay lets a last `Dead` message, which knows more, come first."""

        def later() -> None:
            self._loop.call_later(LAST_WORDS_MS / 1000, lambda: self._die(self._process.death()))

        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(later)

    def _die(self, error: OctavoError) -> None:
        if self._death is not None or self._closing:
            return
        self._death = error
        pending, self._pending = self._pending, {}
        for waiting in pending.values():
            waiting.put_nowait(None)
        for answer in self._pongs.values():
            if not answer.done():
                answer.set_exception(self._error())
        if self._on_death is not None:
            self._on_death(error)

    def _error(self) -> EngineDead:
        if self._death is None:
            return EngineDead("the engine is shutting down.", "Send the request to another server.")
        return EngineDead(self._death.cause, self._death.remedy)
