"""Several API processes over the same engines, and this process, which starts all of them, again if need be.

    supervisor ── engine 0 … M-1     each listens at a path in a private folder
        │             │││
        └───── API process 0 … N-1   each connects to every engine, and has a listening socket of its own

All listening sockets are bound to the one address; the kernel shares connections out among them. They stay open here,
so that those which come while an API process is started again wait for it instead of being refused.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from typing import Literal

import msgspec

from octavo.config import EngineConfig, ServerConfig
from octavo.errors import ConfigError, EngineDead, OctavoError
from octavo.frontend.balancer import own_engines
from octavo.frontend.core_process import private_folder
from octavo.frontend.fleet import MAX_TRIES, Fleet, Patience
from octavo.frontend.ray_engines import RayActors
from octavo.log import PROCESS, get_logger
from octavo.parent import how_ended
from octavo.server.address import listeners
from octavo.server.api_process import Report, Start, Up
from octavo.server.metrics import SHARED_FOLDER
from octavo.server.run import signals

MAX_API_PROCESSES = 256
LAST_SECONDS = 5.0  # beyond those of draining, until an API process that does not end is killed
NOTICE_SECONDS = 5.0  # for API processes to find out that there is no engine, tell their clients so, and end


def supervise(config: EngineConfig, server: ServerConfig, *, worker: Literal["real", "stub"]) -> int:
    """Serves until told to stop; returns the exit code: 0 after a signal, 1 when no engine or API process is left.

    Raises `OctavoError` for whatever prevents the start.
    """
    if not 1 <= server.api_server_count <= MAX_API_PROCESSES:
        raise ConfigError(
            f"api_server_count is {server.api_server_count}, outside [1, {MAX_API_PROCESSES}].",
            "Give a value in that range; one for each 40,000 tokens/s that are streamed is plenty.",
        )
    folder = private_folder()
    (folder / "metrics").mkdir()
    try:
        with listeners(server) as bound:
            return asyncio.run(_Supervisor(config, server, worker, str(folder), bound).run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Supervisor:
    """See `supervise`."""

    def __init__(
        self,
        config: EngineConfig,
        server: ServerConfig,
        worker: Literal["real", "stub"],
        folder: str,
        listeners: list[socket.socket],
    ) -> None:
        self._config, self._server, self._worker, self._folder = config, server, worker, folder
        self._listeners = dict(enumerate(listeners))  # without those of processes that are given up
        self._engines = config.parallel.data_parallel_size
        self._addresses = [f"ipc://{folder}/engine-{i}" for i in range(self._engines)]
        self._cluster = ""
        self._fleet: Fleet | None = None
        self._apis: dict[int, Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()
        self._signal = signal.SIGTERM
        self._code = 0

    async def run(self) -> int:
        with signals(self._signalled):
            starting = asyncio.create_task(self._start())
            stopped = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    print(starting.result(), file=sys.stderr, flush=True)
                    await stopped
            finally:
                starting.cancel()
                await asyncio.wait((starting,))
                await self._end()
        return self._code

    async def _start(self) -> str:
        """Starts everything at once; returns what is to be told once all is ready."""
        source = await own_engines(
            self._config, self._worker, log_level=self._server.log_level, addresses=self._addresses
        )
        if isinstance(source, RayActors):
            self._addresses, self._cluster = source.names, source.cluster
        self._fleet = fleet = Fleet(source, self._engines, on_end=self._fail)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fleet.start())
                apis = [group.create_task(self._first_start(index)) for index in self._listeners]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        count = f"{len(self._listeners)} API processes and {self._engines} engine{'s' * (self._engines > 1)}"
        return f"{apis[0].result()}\n  {count}"

    async def _first_start(self, index: int) -> str:
        """Keeps an API process from now on; returns its banner when it takes requests for the first time."""
        up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._keepers.append(asyncio.create_task(self._keep(index, up)))
        return await up

    async def _keep(self, index: int, up: asyncio.Future[str]) -> None:
        patience = Patience(MAX_TRIES)
        pause: float | None = 0.0
        while pause is not None and not self._stop.is_set():
            await asyncio.sleep(pause)
            process = self._apis[index] = await self._launch(index)
            try:
                banner = await _banner(process)
                patience.started()
                if up.done():
                    get_logger().info("API process %d runs again", index)
                else:
                    up.set_result(banner)
            except OctavoError as error:
                if not up.done():
                    up.set_exception(error)
                    return
            how = how_ended(await process.wait())
            if not self._stop.is_set():
                get_logger().error("API process %d %s", index, how)
                pause = patience.pause()
        if not self._stop.is_set():
            get_logger().error("API process %d is given up", index)
            self._listeners.pop(index).close()  # the kernel sends no more connections there
            if not self._listeners:
                self._fail(EngineDead("no API process is left.", "Start the server again."))

    async def _launch(self, index: int) -> Process:
        listener = self._listeners[index].fileno()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "octavo.server.api_process"),
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=(listener,),
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            env={**os.environ, SHARED_FOLDER: f"{self._folder}/metrics", PROCESS: f"API process {index}"},
        )
        start = Start(self._config, self._server, self._worker, self._addresses, self._cluster, listener)
        if process.stdin is not None:
            process.stdin.write(msgspec.json.encode(start) + b"\n")
        return process

    async def _end(self) -> None:
        """Lets the API processes answer what they have, and ends them and the engines."""
        self._stop.set()
        waits = [asyncio.create_task(process.wait()) for process in self._apis.values()]
        if waits and self._code:  # a signal now would make errors look like answers that were cut short
            await asyncio.wait(waits, timeout=NOTICE_SECONDS)
        self._send(self._signal)
        if waits:
            await asyncio.wait(waits, timeout=self._server.drain_seconds + LAST_SECONDS)
        self._send(signal.SIGKILL)
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*waits, *self._keepers, return_exceptions=True)
        if self._fleet is not None:
            await self._fleet.close()

    def _send(self, number: signal.Signals) -> None:
        for process in self._apis.values():
            if process.returncode is None:
                process.send_signal(number)

    def _signalled(self, number: int) -> None:
        if self._stop.is_set():
            self._send(signal.Signals(number))  # a second one ends the draining
            return
        get_logger().info("stopping on %s", signal.Signals(number).name)
        self._signal = signal.Signals(number)
        self._stop.set()

    def _fail(self, error: OctavoError) -> None:
        get_logger().error("%s: %s", error.id, error)
        self._code = 1
        self._stop.set()


async def _banner(process: Process) -> str:
    """What a started API process says; raises the error that it has, or that it ended without a word."""
    line = await process.stdout.readline() if process.stdout is not None else b""
    if not line:
        raise EngineDead(f"an API process {how_ended(await process.wait())}.", "Start the server again.")
    report = msgspec.json.decode(line, type=Report)
    if isinstance(report, Up):
        return report.banner
    raise report.error()
