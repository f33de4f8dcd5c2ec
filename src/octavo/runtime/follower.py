"""A follower's process: ``python -m octavo.runtime.follower``. `runtime.executor` starts it and tells of its life."""

from __future__ import annotations

import os
import signal
import socket
import traceback
from pathlib import Path

import msgspec

from octavo import log
from octavo.errors import OctavoError
from octavo.parallel.group import LostPeer
from octavo.parent import end_with_parent, run_child
from octavo.runtime.executor import (
    Command,
    Done,
    Failed,
    Init,
    Load,
    PlanMemory,
    Start,
    Step,
    progress_of,
    receive_frame,
    send_frame,
)
from octavo.runtime.parallel import MEMORY_REMEDY
from octavo.runtime.worker import MemoryErrors, Worker


class Follower:
    """Executes the commands of rank 0 on a worker of its own."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._folder = Path(start.folder)
        self._worker = Worker(rank=start.rank)

    def execute(self, command: Command) -> Done | None:
        """Acts on a command; returns the answer, if it has one."""
        match command:
            case Step(plan):
                self._worker.step(plan)
                return None
            case Init():
                self._worker.init(self._start.config)
            case Load():
                with MemoryErrors():
                    self._worker.join(self._start.rank, self._folder)
                    self._worker.load()
            case PlanMemory():
                with MemoryErrors():
                    self._worker.plan_memory()
            case _:
                self._worker.take_tokens()
                return None
        return Done()


def run(start: Start, connection: socket.socket) -> int:
    """Executes commands until rank 0 is gone or one fails; returns the exit code."""
    decode = msgspec.msgpack.Decoder(Command).decode
    follower = Follower(start)
    progress = progress_of(Path(start.folder), start.config.parallel.tensor_parallel_size)
    try:
        while True:
            command = decode(receive_frame(connection))
            progress[start.rank] += 1
            answer = follower.execute(command)
            if answer is not None:
                send_frame(connection, msgspec.msgpack.encode(answer))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        send_frame(connection, msgspec.msgpack.encode(_failed(error)))
        return 1


def _failed(error: Exception) -> Failed:
    if isinstance(error, OctavoError):
        return Failed(error.cause, error.remedy, type(error).__name__, error.id)
    if isinstance(error, LostPeer):
        return Failed(str(error), lost=True)
    if isinstance(error, MemoryError):
        return Failed(f"ran out of memory: {error}", MEMORY_REMEDY, "OutOfMemory")
    traceback.print_exc()
    return Failed(f"failed with {type(error).__name__}: {error}.", "Restart, and report it with the traceback.")


def main(start: Start) -> int:
    end_with_parent()
    os.dup2(2, 1)  # what libraries print is log, not output
    log.configure(start.log_level)
    return run(start, socket.socket(fileno=start.socket))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run_child(Start, main)
