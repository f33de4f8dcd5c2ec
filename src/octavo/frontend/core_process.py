"""Connects to engine cores, starts them as child processes and knows how they ended.

The parent's half of `core.process`, which it never imports. Both processes end together: the child reads end-of-file
from its standard input when the parent is gone, and the parent has a thread that waits for the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from octavo.config import EngineConfig
from octavo.errors import EngineDead, OctavoError
from octavo.log import get_logger
from octavo.parent import how_ended
from octavo.types import MAX_MESSAGE_BYTES, Bye, CoreInput, CoreOutput, Dead, EngineInfo, Hello, Ready, Shutdown

GRACE_SECONDS = 0.5  # how long `stop` waits before it becomes less polite
LAST_WORDS_MS = 200  # after the engine's end, how long its last message may still be on its way
HEARTBEAT_MS = 5000  # over a network: a machine that vanishes does not close its connections

decode_output = msgspec.msgpack.Decoder(CoreOutput).decode


class Core:
    """A connection to an engine core that somebody else started. `stop` must be called.

    ``public_key`` (of CURVE, in Z85) is the public half of the core's ``secret_key``, if it has one.
    """

    def __init__(self, address: str, *, public_key: str = "") -> None:
        self.address = address
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = _dealer(self._context, public_key)
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._cancelled = False
        self.socket.connect(address)
        self.send(Hello())

    def send(self, message: CoreInput) -> None:
        """Queues a message; never blocks."""
        self.socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)

    def wait_ready(self) -> EngineInfo:
        """Blocks until the engine is ready; raises the error that kept it from that, as the class it was there."""
        while not self._cancelled:
            alive = self.alive()
            if self.socket.poll(100 if alive else self.last_words_ms()):
                message = decode_output(self.socket.recv())
                if isinstance(message, Ready):
                    return message.info
                if isinstance(message, Dead):
                    raise message.error()
            elif not alive:
                raise self.death()
        raise EngineDead("the start was given up.")

    def cancel(self) -> None:
        """Makes `wait_ready` end soon; from any thread."""
        self._cancelled = True

    def kill(self) -> None:
        """Ends an engine that does not answer. One that somebody else looks after is left to them."""

    def alive(self) -> bool:
        """False once the engine is known to be gone."""
        return not self._monitor.poll(0)

    def last_words_ms(self) -> int:
        """How long to wait for the last message of an engine that is gone."""
        return LAST_WORDS_MS

    def death(self) -> OctavoError:
        """The error for an engine that ended without a word."""
        return EngineDead("the connection to the engine was lost.", "The server's log says how the engine ended.")

    def watch(self, ended: Callable[[], None]) -> None:
        """Calls ``ended`` once, in any thread, when the engine is gone. To be called in the running event loop."""
        loop = asyncio.get_running_loop()

        def look() -> None:
            if not self.alive():
                self.unwatch()
                ended()

        loop.add_reader(self._monitor.fileno(), look)
        loop.call_soon(look)  # the descriptor tells of changes only

    def unwatch(self) -> None:
        """Ends `watch`; to be called in the same event loop."""
        asyncio.get_running_loop().remove_reader(self._monitor.fileno())

    def stop(self) -> None:
        """Leaves. The engine goes on, and aborts what was asked for here."""
        if not self.socket.closed:
            self.send(Bye())
            self._close(linger=LAST_WORDS_MS)

    def _close(self, linger: int) -> None:
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=linger)
        self._context.term()


class CoreProcess(Core):
    """An engine core in a child process. Made by `spawn`."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, folder: Path | None) -> None:
        super().__init__(address)
        self.process = process
        self._folder = folder

    def cancel(self) -> None:
        """As in `Core`, and at once; the process is not asked first."""
        super().cancel()
        self.kill()

    def kill(self) -> None:
        """Ends the process without asking it."""
        self.process.kill()

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def last_words_ms(self) -> int:
        """As in `Core`. A process that was not killed has said why it ended, however late this machine reads it."""
        killed = (self.process.poll() or 0) < 0
        return LAST_WORDS_MS if killed else 10 * LAST_WORDS_MS

    def death(self) -> OctavoError:
        """The error for a child that ended without a word."""
        code = self.process.wait()
        remedy = "If the system ran out of memory, give the engine less." if code == -9 else "Start it again."
        return EngineDead(f"the engine process {how_ended(code)}.", remedy)

    def watch(self, ended: Callable[[], None]) -> None:
        """Calls ``ended`` from a thread of its own when the process has ended."""

        def wait() -> None:
            self.process.wait()
            ended()

        threading.Thread(target=wait, name="octavo-core-watch", daemon=True).start()

    def unwatch(self) -> None:
        """Nothing: the thread ends with the process."""

    def stop(self) -> None:
        """Ends the process within a second, by three means ever less polite, and removes the sockets."""
        if self.socket.closed:
            return
        self.send(Shutdown())
        self._ended_within(GRACE_SECONDS)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        if not self._ended_within(GRACE_SECONDS):
            get_logger().warning("the engine process does not end by itself: killing it")
            self.process.kill()
            self.process.wait()
        self._close(linger=0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _ended_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def spawn(
    config: EngineConfig,
    worker: Literal["real", "stub"] = "real",
    *,
    log_level: str = "info",
    address: str = "",
    hash_key: str = "",
    env: Mapping[str, str] | None = None,
) -> CoreProcess:
    """Starts an engine core in a process of its own and returns at once; see `Core.wait_ready`.

    It listens at ``address``, by default in a private folder of its own. ``hash_key``: see `core.process.Start`;
    ``env`` is added to this process's environment.
    """
    folder = None if address else private_folder()
    address = address or f"ipc://{folder}/core"
    start = {"config": config, "worker": worker, "log_level": log_level, "hash_key": hash_key}
    process, address = launch(address, start, env=env)
    return CoreProcess(process, address, folder)


def launch(
    address: str, start: dict[str, Any], *, env: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], str]:
    """Starts an engine core that listens at ``address``, ``ipc://PATH`` or ``tcp://HOST:PORT``.

    ``start`` are the other fields of `core.process.Start`. Returns the process, whose standard input stays open and
    ties it to this one, and the address with a port that was free if PORT is 0.
    """
    listener, address = _listening(address)
    with listener:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "octavo.core.process"],  # -P: no module is taken from the current folder
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is for the parent alone
            pass_fds=(listener.fileno(),),
            env={**os.environ, **env} if env else None,
        )
        folder = os.path.dirname(address.removeprefix("ipc://")) if address.startswith("ipc://") else ""
        start = {**start, "address": address, "listener": listener.fileno(), "folder": folder}
    if process.stdin is None:
        raise EngineDead("the engine process has no standard input.", "Start it again.")
    with contextlib.suppress(BrokenPipeError):  # `wait_ready` reports how the process ended
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
    return process, address


def private_folder() -> Path:
    """A new folder with mode 0700 and a path short enough for a socket's address (107 bytes on Linux, 103 on macOS)."""
    short = len(tempfile.gettempdir()) < 80
    return Path(tempfile.mkdtemp(prefix="octavo-", dir=None if short else "/tmp"))  # noqa: S108


def _listening(address: str) -> tuple[socket.socket, str]:
    """A socket that takes connections already, before the process that will answer them runs; and its address."""
    scheme, _, place = address.partition("://")
    if scheme == "ipc":
        Path(place).unlink(missing_ok=True)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.bind(place)
    else:
        host, _, port = place.rpartition(":")
        made = socket.create_server((host, int(port)), family=socket.AF_INET)
        address = f"tcp://{host}:{made.getsockname()[1]}"
    made.listen()
    return made, address


def _dealer(context: zmq.Context[Any], public_key: str) -> zmq.Socket[bytes]:
    """Queues are unbounded: ``max_waiting`` and ``max_tokens`` bound what can be in them."""
    made: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    made.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    made.setsockopt(zmq.SNDHWM, 0)
    made.setsockopt(zmq.RCVHWM, 0)
    made.setsockopt(zmq.LINGER, 0)
    if public_key:
        made.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        made.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        own_public, own_secret = zmq.curve_keypair()
        made.setsockopt(zmq.CURVE_SERVERKEY, public_key.encode())
        made.setsockopt(zmq.CURVE_PUBLICKEY, own_public)
        made.setsockopt(zmq.CURVE_SECRETKEY, own_secret)
    return made
