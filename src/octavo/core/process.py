"""The engine-core process: ``python -m octavo.core.process``, started by `frontend.core_process.spawn`.

Life: one line of JSON on standard input says what to run (`Start`); the engine is built and every `Hello` answered with
`Ready`, or with `Dead` and the reason; then the loop turns until `Shutdown`. Standard input stays open and is the tie
to the parent: its end, however the parent ended, ends this process at once. Signals that a terminal or a supervisor
sends to all are the parent's to handle; they are ignored here.
"""

from __future__ import annotations

import gc
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

import msgspec

from octavo import log
from octavo.config import EngineConfig
from octavo.core.transport import Channel, Peer, ZmqChannel
from octavo.errors import OctavoError
from octavo.parent import end_with_parent, run_child
from octavo.types import (
    Abort,
    Bye,
    CoreInput,
    Dead,
    EngineInfo,
    Hello,
    Outputs,
    Ping,
    Pong,
    Ready,
    Request,
    ResetPrefixCache,
    Shutdown,
    Stats,
    Submit,
    TokenOutput,
)

if TYPE_CHECKING:
    from octavo.runtime.base import WorkerBase


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the parent writes, as one line of JSON."""

    config: EngineConfig
    worker: Literal["real", "stub"]
    address: str  # of the socket that listens already …
    listener: int  # … as this file descriptor
    log_level: str
    hash_key: str = ""  # of prefix pages, in hex; equal in engines that share frontends. Default: drawn here
    secret_key: str = ""  # see `ZmqChannel`
    folder: str = ""  # to remove when the parent is gone


class Engine(Protocol):
    """What the loop needs of `core.engine.EngineCore`."""

    @property
    def info(self) -> EngineInfo: ...

    def add(self, request: Request) -> TokenOutput | None: ...

    def abort(self, ids: list[str]) -> list[TokenOutput]: ...

    def has_work(self) -> bool: ...

    def step(self) -> list[TokenOutput]: ...

    def stats(self) -> Stats: ...

    def reset_prefix_cache(self) -> None: ...

    def close(self) -> None: ...


def run(build: Callable[[], Engine], channel: Channel) -> int:
    """Builds an engine and serves ``channel`` with it until told to stop; returns the exit code.

    Any exception, at start-up or in the loop, becomes one `Dead` message: a broken engine does not limp on.
    """
    try:
        engine = build()
        serve(engine, channel)
        engine.close()
    except Exception as error:
        if not isinstance(error, OctavoError):
            traceback.print_exc()
        dead = _dead(error)
        channel.send_all(dead)
        return dead.exit_code
    finally:
        channel.close()
    return 0


def serve(engine: Engine, channel: Channel) -> None:
    """The loop: take what has arrived, make one step, send what it produced. Sleeps while there is nothing to do."""
    dispatcher = _Dispatcher(engine, channel)
    while True:
        outputs: list[TokenOutput] = []
        for peer, message in channel.receive(wait=not engine.has_work()):
            if isinstance(message, Shutdown):
                return
            outputs += dispatcher.handle(peer, message)
        if engine.has_work():
            outputs += engine.step()
        if outputs:
            dispatcher.send(outputs)


class _Dispatcher:
    """Knows which peer each running request is of."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._owners: dict[str, Peer] = {}

    def handle(self, peer: Peer, message: CoreInput) -> list[TokenOutput]:
        """Acts on a message; returns what ended by it."""
        engine = self._engine
        if isinstance(message, Submit):
            return [refusal for request in message.requests if (refusal := self._add(peer, request)) is not None]
        if isinstance(message, Abort):
            return engine.abort([id for id in message.ids if self._owners.get(id) == peer])
        if isinstance(message, Bye):
            return engine.abort([id for id, owner in self._owners.items() if owner == peer])
        if isinstance(message, Hello):
            self._channel.send(peer, Ready(engine.info))
        elif isinstance(message, Ping):
            self._channel.send(peer, Pong(message.nonce, engine.stats()))
        elif isinstance(message, ResetPrefixCache):
            engine.reset_prefix_cache()
            self._channel.send(peer, Pong(message.nonce, engine.stats()))
        return []

    def send(self, outputs: list[TokenOutput]) -> None:
        """One message to each peer that ``outputs`` are for."""
        stats = self._engine.stats()
        shares: dict[Peer, list[TokenOutput]] = {}
        for output in outputs:
            ended = output.finish_reason is not None
            owner = self._owners.pop(output.id, None) if ended else self._owners.get(output.id)
            if owner is not None:
                shares.setdefault(owner, []).append(output)
        for peer, share in shares.items():
            self._channel.send(peer, Outputs(share, stats))

    def _add(self, peer: Peer, request: Request) -> TokenOutput | None:
        refusal = self._engine.add(request)
        if refusal is None or request.id not in self._owners:
            self._owners[request.id] = peer
            return refusal
        self._channel.send(peer, Outputs([refusal], self._engine.stats()))  # the id is that of a running request
        return None


def _dead(error: Exception) -> Dead:
    if isinstance(error, OctavoError):
        return Dead.of(error)
    return Dead(  # clients see this: what the error says stays in the log
        f"the engine failed with {type(error).__name__}.",
        "This is a bug in octavo or in what it runs on; restart, and report it with the traceback on standard error.",
    )


def _build(start: Start, on_death: Callable[[OctavoError], None]) -> Engine:
    """The imports are inside: they take most of the start, and one that fails is to be reported as `Dead`."""
    phases = {"python": seconds_since_start()}
    start_of_import = time.perf_counter()
    from octavo.core.engine import EngineCore

    worker: WorkerBase
    if start.worker == "stub":
        from octavo.runtime.stub import StubWorker

        worker = StubWorker()
    else:
        from octavo.runtime.worker import worker_for

        worker = worker_for(start.config, on_death=on_death)
    phases["import"] = time.perf_counter() - start_of_import
    engine = EngineCore(start.config, worker, hash_key=bytes.fromhex(start.hash_key) or None, phases=phases)
    gc.collect()
    gc.freeze()  # modules and model stay: looking through them again and again would hold up steps
    return engine


def seconds_since_start() -> float:
    """Seconds since the system started this process (resolution: 10 ms); 0 where the system does not tell."""
    try:
        text = Path("/proc/self/stat").read_text(encoding="ascii")
        ticks = int(text.rpartition(")")[2].split()[19])  # field 22 of proc(5): starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return 0.0


def _end_with(error: OctavoError, channel: Channel) -> NoReturn:
    """For an error that comes up beside the loop, which may sleep, or wait for a device that will never answer."""
    try:
        channel.send_all(_dead(error))
        channel.close()
    finally:
        os._exit(error.exit_code)


def main(start: Start) -> int:
    end_with_parent(start.folder)
    os.dup2(2, 1)  # what libraries print is log, not output
    log.configure(start.log_level)
    channel = ZmqChannel(start.address, start.listener, secret_key=start.secret_key)
    return run(lambda: _build(start, lambda error: _end_with(error, channel)), channel)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run_child(Start, main)
