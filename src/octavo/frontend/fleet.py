"""Engines that are kept running: each that ends is started again, after ever longer pauses and not without end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Literal, Protocol

from octavo.config import EngineConfig
from octavo.errors import EngineDead, OctavoError
from octavo.frontend.core_client import CoreClient
from octavo.frontend.core_process import Core, spawn
from octavo.frontend.devices import shares
from octavo.log import get_logger

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 30.0
PING_SECONDS = 10.0
HUNG_SECONDS = 120.0  # a step on a CPU can take many seconds
MAX_TRIES = 6  # starts in a row of what does not last
LASTING_SECONDS = 60.0  # what ran for so long has lasted


class Patience:
    """How long to wait before something that has ended is started again: ever longer, and at most ``tries`` times.

    ``tries`` counts from the last time that it lasted; None: without end.
    """

    def __init__(self, tries: int | None) -> None:
        self._limit = tries
        self._tries = 0
        self._since: float | None = None

    def started(self) -> None:
        """It runs now."""
        self._since = time.monotonic()

    def pause(self) -> float | None:
        """It has ended: the seconds to wait, None to give up."""
        if self._since is not None and time.monotonic() - self._since > LASTING_SECONDS:
            self._tries = 0
        self._since = None
        if self._limit is not None and self._tries >= self._limit:
            return None
        self._tries += 1
        return min(FIRST_PAUSE_SECONDS * 2.0 ** min(self._tries - 1, 16), LONGEST_PAUSE_SECONDS)


class Source(Protocol):
    """Where engines come from."""

    owned: bool  # whether engines that do not answer are to be ended here
    tries: int | None  # how often in a row an engine is started again; None: until `open` raises `Gone`

    async def open(self, index: int) -> Core:
        """A connection to engine ``index``, which need not be ready yet."""
        ...

    async def close(self) -> None:
        """Ends what the engines need besides themselves; they have ended, or are left. May be called twice."""
        ...


class Gone(EngineDead):
    """Whoever looks after the engine has given it up."""


class Processes:
    """Engines in child processes, at ``addresses`` (by default private ones) and each with its share of the machine."""

    def __init__(
        self,
        config: EngineConfig,
        worker: Literal["real", "stub"],
        *,
        log_level: str,
        hash_key: bytes,
        addresses: list[str] | None = None,
    ) -> None:
        self.owned = True
        self.tries: int | None = MAX_TRIES if config.parallel.data_parallel_size > 1 else 0
        self._worker, self._log_level = worker, log_level
        self._hash_key = hash_key.hex()
        self._shares = shares(config)
        self._addresses = addresses or [""] * len(self._shares)

    async def open(self, index: int) -> Core:
        share = self._shares[index]
        return spawn(
            share.config,
            self._worker,
            log_level=self._log_level,
            address=self._addresses[index],
            hash_key=self._hash_key,
            env=share.env,
        )

    async def close(self) -> None:
        pass


class Addresses:
    """Engines that another process starts, at ``addresses``, and starts again as long as it sees fit."""

    def __init__(self, addresses: list[str]) -> None:
        self.owned = False
        self.tries: int | None = None if len(addresses) > 1 else 0
        self._addresses = addresses

    async def open(self, index: int) -> Core:
        return Core(self._addresses[index])

    async def close(self) -> None:
        pass


class Slot:
    """The place of one engine. ``client`` is None while it does not run, ``reason`` says why."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.client: CoreClient | None = None
        self.reason = "the engine is being started."
        self.given_up = False
        self.died = asyncio.Event()
        self.ends: list[asyncio.Task[None]] = []  # of clients whose engines have died


class Fleet:
    """``size`` engines of ``source``. Make it inside a running event loop.

    ``on_down`` is called with a slot whose engine has just died, ``on_end`` once with the last error when every engine
    was given up.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        on_down: Callable[[Slot], None] = lambda slot: None,
        on_end: Callable[[OctavoError], None] | None = None,
    ) -> None:
        self.slots = [Slot(index) for index in range(size)]
        self._source = source
        self._on_down, self._on_end = on_down, on_end
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts all engines at once and waits for them; raises the error of one that fails, and ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                for slot in self.slots:
                    group.create_task(self._open(slot))
        except BaseExceptionGroup as errors:
            await self.close()
            raise errors.exceptions[0] from None
        except asyncio.CancelledError:
            await self.close()
            raise
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in self.slots]
        if self._source.owned:
            self._keepers += [asyncio.create_task(self._watch(slot)) for slot in self.slots]

    def clients(self) -> list[CoreClient]:
        """Of the engines that run."""
        return [slot.client for slot in self.slots if slot.client is not None]

    async def close(self) -> None:
        """Ends all engines, and those that are being started."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in self.clients()))
        await asyncio.gather(*(end for slot in self.slots for end in slot.ends))
        await self._source.close()

    async def _open(self, slot: Slot) -> None:
        def died(error: OctavoError) -> None:
            self._down(slot, error)

        slot.client = await connect(await self._source.open(slot.index), on_death=died)

    def _down(self, slot: Slot, error: OctavoError) -> None:
        get_logger().error("engine %d: %s: %s", slot.index, error.id, error)
        slot.reason = error.cause
        if slot.client is not None:
            slot.ends.append(asyncio.create_task(slot.client.close()))
            slot.client = None
            slot.died.set()
        self._on_down(slot)

    async def _keep(self, slot: Slot) -> None:
        """Starts the engine again whenever it has died, until that has failed too often."""
        patience = Patience(self._source.tries)
        while not slot.given_up:
            patience.started()
            await slot.died.wait()
            slot.died.clear()
            await asyncio.shield(slot.ends[-1])
            slot.ends.clear()
            while slot.client is None and not slot.given_up:
                pause = patience.pause()
                if pause is None:
                    self._give_up(slot)
                else:
                    await asyncio.sleep(pause)
                    await self._try(slot)

    async def _watch(self, slot: Slot) -> None:
        """Ends the engine when it has not answered for too long, so that it is started again."""
        while not slot.given_up:
            await asyncio.sleep(PING_SECONDS)
            client = slot.client
            if client is not None and not await client.answers(HUNG_SECONDS):
                get_logger().error("engine %d has not answered for %.0f s and is ended", slot.index, HUNG_SECONDS)
                client.kill()

    async def _try(self, slot: Slot) -> None:
        try:
            await self._open(slot)
            get_logger().info("engine %d runs again", slot.index)
        except OctavoError as error:
            slot.reason = error.cause
            get_logger().error("engine %d did not start: %s: %s", slot.index, error.id, error)
            if isinstance(error, Gone):
                self._give_up(slot)

    def _give_up(self, slot: Slot) -> None:
        slot.given_up = True
        get_logger().error("engine %d is given up", slot.index)
        if all(other.given_up for other in self.slots) and self._on_end is not None:
            self._on_end(EngineDead(f"no engine is left; of the last one: {slot.reason}", "Start the server again."))


async def connect(core: Core, *, on_death: Callable[[OctavoError], None] | None = None) -> CoreClient:
    """The client of a core once that is ready; ends the connection if it cannot be, or if nobody waits for it."""
    waiting = asyncio.ensure_future(asyncio.to_thread(core.wait_ready))
    try:
        info = await asyncio.shield(waiting)
    except BaseException:
        core.cancel()  # so that `wait_ready` ends, in whose thread the socket is
        with contextlib.suppress(OctavoError):
            await waiting
        await asyncio.to_thread(core.stop)
        raise
    return CoreClient(core, info, on_death=on_death)
