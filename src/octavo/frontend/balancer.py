"""`EngineClient` over several engines: requests are shared out, and an engine that dies takes no other one along."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal, Self

from octavo.config import EngineConfig
from octavo.errors import EngineDead, OctavoError, Overloaded, RequestError
from octavo.frontend.client import EngineClient, EngineState
from octavo.frontend.fleet import Fleet, Processes, Slot, Source, connect
from octavo.frontend.routing import Router, router_for, together
from octavo.types import EngineInfo, Request, Stats, TokenOutput

MAX_STARTS = 2  # of one request: if it is what kills engines, it is not to kill them all
LATE_SECONDS = 1.0  # one long step must not make the whole server look ill
FRESH_SECONDS = 0.2  # how old the load of engines may be that other processes use too
RETRY_SECONDS = 2.0  # told to clients while no engine runs


async def own_engines(
    config: EngineConfig, worker: Literal["real", "stub"], *, log_level: str, addresses: list[str] | None = None
) -> Source:
    """Where the engines of a process come from that looks after them itself, or leaves that to Ray.

    ``addresses``: see `Processes`; on a Ray cluster they are what they are there.
    """
    hash_key = secrets.token_bytes(32)
    if config.parallel.distributed_executor_backend == "ray":
        from octavo.frontend.ray_engines import RayEngines

        return await RayEngines.start(config, worker, log_level=log_level, hash_key=hash_key)
    return Processes(config, worker, log_level=log_level, hash_key=hash_key, addresses=addresses)


async def open_engines(
    source: Source, size: int, *, shared: bool = False, on_death: Callable[[OctavoError], None] | None = None
) -> EngineClient:
    """A client of ``size`` engines of ``source`` once they are ready; raises what keeps one from starting.

    ``shared``: see `Balancer`. ``on_death`` is called once, in the event loop, when no engine is left.
    """
    if size == 1 and source.tries == 0:
        return await connect(await source.open(0), on_death=on_death)
    return await Balancer(source, size, shared=shared, on_death=on_death).start()


class _Flight:
    """A request under way. ``told``: its caller has had outputs, so it cannot begin anew."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.starts = 0
        self.told = False
        self.aborted = False


class Balancer:
    """See `EngineClient`. Make it inside a running event loop; it is usable after `start`.

    A request whose engine dies before it has answered anything is given to another one, once; later it gets the error.
    ``shared``: other processes use the same engines, so these are asked for their load.
    """

    info: EngineInfo

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        shared: bool = False,
        on_death: Callable[[OctavoError], None] | None = None,
    ) -> None:
        self._fleet = Fleet(source, size, on_down=self._down, on_end=on_death)
        self._shared = shared
        self._router = Router(0, 1)
        self._flights: weakref.WeakValueDictionary[str, _Flight] = weakref.WeakValueDictionary()
        self._asked = 0.0
        self._asking: asyncio.Future[list[Stats | BaseException]] | None = None

    async def start(self) -> Self:
        """Waits for all engines; raises what keeps one from starting."""
        await self._fleet.start()
        infos = [client.info for client in self._fleet.clients()]
        if not infos:
            await self._fleet.close()
            raise EngineDead("all engines ended as soon as they were ready.", "See the log above.")
        self._router = router_for(infos[0])
        self.info = together(infos)
        return self

    @property
    def stats(self) -> Stats:
        """The sum over the engines that run."""
        return Stats.sum([client.stats for client in self._fleet.clients()])

    def engines(self) -> list[EngineState]:
        """See `EngineClient.engines`."""
        return [
            EngineState(False, Stats(), slot.reason) if slot.client is None else EngineState(True, slot.client.stats)
            for slot in self._fleet.slots
        ]

    async def submit(self, request: Request) -> AsyncGenerator[list[TokenOutput], None]:
        """See `EngineClient.submit`. Raises `Overloaded` while no engine runs."""
        if request.id in self._flights:
            raise RequestError(f"a request with id {request.id!r} is running.", "Use another id.", param="request_id")
        flight = self._flights[request.id] = _Flight(request)
        return self._follow(flight, await self._begin(flight))

    async def abort(self, ids: Sequence[str]) -> None:
        """See `EngineClient.abort`."""
        for id in ids:
            flight = self._flights.get(id)
            if flight is not None:
                flight.aborted = True
        for client in self._fleet.clients():
            await client.abort(ids)

    async def health(self) -> Stats:
        """The sum over the engines, of which one must answer; raises `EngineDead` if none does.

        Those that let wait for more than `LATE_SECONDS` while others answered count with what they said last.
        """
        clients = self._fleet.clients()
        asked = [asyncio.ensure_future(client.health()) for client in clients]
        try:
            for first in asyncio.as_completed(asked):
                with contextlib.suppress(EngineDead):
                    await first
                    await asyncio.wait(asked, timeout=LATE_SECONDS)
                    return Stats.sum([client.stats for client in clients])
        finally:
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise EngineDead("no engine answers.", "They are being started again; see the server's log.")

    async def reset_prefix_cache(self) -> None:
        """See `EngineClient.reset_prefix_cache`."""
        self._router.forget()
        await asyncio.gather(*(client.reset_prefix_cache() for client in self._fleet.clients()))

    async def close(self) -> None:
        """Ends the engines, or leaves them if another process looks after them."""
        if self._asking is not None:
            self._asking.cancel()
        await self._fleet.close()

    async def _begin(self, flight: _Flight) -> AsyncGenerator[list[TokenOutput], None]:
        flight.starts += 1
        if self._shared:
            self._ask_for_loads()
        slots = self._fleet.slots
        loads = [slot.client.load if slot.client is not None else None for slot in slots]
        index = self._router.pick(flight.request.page_hashes, loads)
        client = slots[index].client if index is not None else None
        if client is None:
            raise Overloaded("no engine is running; they are being started again.", retry_after=RETRY_SECONDS)
        return await client.submit(flight.request)

    async def _follow(
        self, flight: _Flight, batches: AsyncGenerator[list[TokenOutput], None]
    ) -> AsyncGenerator[list[TokenOutput], None]:
        id = flight.request.id
        while True:
            try:
                async for batch in batches:
                    flight.told = True
                    if batch[-1].finish_reason is not None:
                        self._flights.pop(id, None)
                    yield batch
                return
            except EngineDead:
                if flight.told or flight.starts == MAX_STARTS:
                    raise
            if flight.aborted:
                yield [TokenOutput(id=id, finish_reason="abort")]
                return
            batches = await self._begin(flight)

    def _down(self, slot: Slot) -> None:
        self._router.forget(slot.index)

    def _ask_for_loads(self) -> None:
        """Without waiting for the answers: they are for the next request."""
        now = time.monotonic()
        if now - self._asked > FRESH_SECONDS and (self._asking is None or self._asking.done()):
            self._asked = now
            self._asking = asyncio.gather(*(c.health() for c in self._fleet.clients()), return_exceptions=True)
