"""Starts the engine-core process and knows how it ended. The parent's half of `core.process`, which it never imports.

Both processes end together: the child reads end-of-file from its standard input when the parent is gone, and the parent
has a thread that waits for the child.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from octavo import errors
from octavo.config import EngineConfig
from octavo.errors import EngineDead, OctavoError
from octavo.log import get_logger
from octavo.types import MAX_MESSAGE_BYTES, CoreOutput, Dead, EngineInfo, Ready, Shutdown

GRACE_SECONDS = 0.5  # how long `stop` waits before it becomes less polite
LAST_WORDS_MS = 200  # after the child's end, how long its last message may still be on its way
_ERRORS = {cls.__name__: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, OctavoError)}

decode_output = msgspec.msgpack.Decoder(CoreOutput).decode


class CoreProcess:
    """A running engine core and the two sockets to it. Made by `spawn`; `stop` must be called."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, context: zmq.Context[Any]) -> None:
        self.process = process
        self.context = context
        self.inputs: zmq.Socket[bytes]
        self.outputs: zmq.Socket[bytes]
        self._folder = folder

    def wait_ready(self) -> EngineInfo:
        """Blocks until the engine is ready; raises the error that kept it from that, as the class it was there."""
        while True:
            alive = self.process.poll() is None
            if self.outputs.poll(100 if alive else LAST_WORDS_MS):
                message = decode_output(self.outputs.recv())
                if isinstance(message, Ready):
                    return message.info
                if isinstance(message, Dead):
                    raise error_of(message)
            elif not alive:
                raise self.death()

    def death(self) -> OctavoError:
        """The error for a child that ended without a word."""
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        remedy = "If the system ran out of memory, give the engine less." if code == -9 else "Start it again."
        return EngineDead(f"the engine process {how}.", remedy)

    def watch(self, ended: Callable[[], None]) -> None:
        """Calls ``ended`` from a thread of its own when the process has ended."""

        def wait() -> None:
            self.process.wait()
            ended()

        threading.Thread(target=wait, name="octavo-core-watch", daemon=True).start()

    def stop(self) -> None:
        """Ends the process within a second, by three means ever less polite, and removes the sockets."""
        if self.inputs.closed:
            return
        with contextlib.suppress(zmq.Again):  # nobody is connected
            self.inputs.send(msgspec.msgpack.encode(Shutdown()), zmq.NOBLOCK)
            self._ended_within(GRACE_SECONDS)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        if not self._ended_within(GRACE_SECONDS):
            get_logger().warning("the engine process does not end by itself: killing it")
            self.process.kill()
            self.process.wait()
        self.inputs.close(linger=0)
        self.outputs.close(linger=0)
        self.context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ended_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def spawn(config: EngineConfig, worker: Literal["real", "stub"] = "real", *, log_level: str = "info") -> CoreProcess:
    """Starts an engine core in a process of its own and returns at once; see `CoreProcess.wait_ready`."""
    folder = _private_folder()
    context: zmq.Context[Any] = zmq.Context()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "octavo.core.process"],  # -P: no module is taken from the current folder
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is for the parent alone
    )
    core = CoreProcess(process, folder, context)
    core.inputs = _bound(context, zmq.PUSH, folder / "in")
    core.outputs = _bound(context, zmq.PULL, folder / "out")
    start = {"config": config, "worker": worker, "folder": str(folder), "log_level": log_level}
    if process.stdin is None:
        raise EngineDead("the engine process has no standard input.", "Start it again.")
    with contextlib.suppress(BrokenPipeError):  # `wait_ready` reports how the process ended
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
    return core


def error_of(dead: Dead) -> OctavoError:
    """The error that a `Dead` message carries, as its own class again."""
    error = _ERRORS.get(dead.kind, EngineDead)(dead.cause, dead.remedy)
    if dead.id:
        error.id = dead.id
    return error


def _private_folder() -> Path:
    """A new folder with mode 0700 and a path short enough for a socket's address (107 bytes on Linux, 103 on macOS)."""
    short = len(tempfile.gettempdir()) < 80
    return Path(tempfile.mkdtemp(prefix="octavo-", dir=None if short else "/tmp"))  # noqa: S108


def _bound(context: zmq.Context[Any], kind: int, path: Path) -> zmq.Socket[bytes]:
    """Queues are unbounded: ``max_waiting`` and ``max_tokens`` bound what can be in them."""
    made: zmq.Socket[bytes] = context.socket(kind)
    made.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    made.setsockopt(zmq.SNDHWM, 0)
    made.setsockopt(zmq.RCVHWM, 0)
    made.setsockopt(zmq.LINGER, 0)
    made.bind(f"ipc://{path}")
    return made
