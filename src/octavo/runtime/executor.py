"""The processes of ranks 1 and up, as rank 0 sees them: started, told what to do, watched, ended.

    rank 0                                   follower (`runtime.follower`)
      stdin pipe  -- Start, one line -->       its end, however rank 0 ended, ends the follower
      socket      -- Command ... ----->        run in order: each step's plan is sent once, encoded once
                  <-- Done | Failed ---        one answer to each of `Init`, `Load`, `Plan`; none to steps

A group cannot go on without one of its ranks. So the first failure is final: it is kept, every later call raises it,
and ``on_death`` is told.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from octavo.config import EngineConfig
from octavo.errors import EngineDead, OctavoError, retold
from octavo.log import get_logger
from octavo.parent import how_ended
from octavo.types import StepPlan

LENGTH = struct.Struct("<I")
POLL_SECONDS = 2e-5  # between looks at the device; other threads of the process run meanwhile
CLOSE_SECONDS = 5.0  # a process that is killed ends once its device has taken back its memory
BETTER_REASON_SECONDS = 1.0  # how long a rank that lost another one waits to hear how that one ended


class Start(msgspec.Struct, frozen=True):
    """What a follower reads from its standard input, as one line of JSON."""

    config: EngineConfig
    rank: int
    folder: str  # where ranks meet, and where their progress lies
    socket: int  # file descriptor
    log_level: str


class Init(msgspec.Struct, frozen=True, tag="init"):
    """`Worker.init`."""


class Load(msgspec.Struct, frozen=True, tag="load"):
    """`Worker.load`."""


class PlanMemory(msgspec.Struct, frozen=True, tag="memory"):
    """`Worker.plan_memory`."""


class Step(msgspec.Struct, frozen=True, tag="step"):
    """`Worker.step`."""

    plan: StepPlan


class TakeTokens(msgspec.Struct, frozen=True, tag="tokens"):
    """Rank 0 broadcasts the tokens that it sampled for the last step."""


Command = Init | Load | PlanMemory | Step | TakeTokens


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The command succeeded."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank's last message. ``lost``: only because another rank did not take part in a collective."""

    cause: str
    remedy: str = ""
    kind: str = "EngineDead"
    id: str = ""
    lost: bool = False


Answer = Done | Failed
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


def send_frame(connection: socket.socket, frame: bytes) -> None:
    """``frame`` behind its length."""
    connection.sendall(LENGTH.pack(len(frame)) + frame)


def receive_frame(connection: socket.socket) -> bytes:
    """The next frame; raises `EOFError` if the other end is gone."""
    return _receive(connection, LENGTH.unpack(_receive(connection, LENGTH.size))[0])


def _receive(connection: socket.socket, count: int) -> bytes:
    buffer = bytearray(count)
    view, filled = memoryview(buffer), 0
    while filled < count:
        received = connection.recv_into(view[filled:])
        if not received:
            raise EOFError
        filled += received
    return bytes(buffer)


def progress_of(folder: Path, ranks: int) -> np.memmap[tuple[int], np.dtype[np.int64]]:
    """Shared by all ranks: how many commands each has begun, to tell who is behind."""
    path = folder / "progress"
    if not path.exists():
        path.write_bytes(bytes(8 * ranks))
    return np.memmap(path, np.int64, mode="r+", shape=(ranks,))


class _Follower:
    """A process, the socket to it, and the commands that it has answered."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self.connection = connection
        self.answered = 0


class Executor:
    """Starts a follower for each rank from 1 on; they import what they need and wait. `close` must be called."""

    def __init__(self, config: EngineConfig, *, on_death: Callable[[OctavoError], None] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="octavo-"))
        self.on_failure: Callable[[], None] | None = None  # lets go of collectives on the device
        self._seconds = config.parallel.distributed_timeout_seconds
        self._on_death = on_death
        self._failure: OctavoError | None = None
        self._lost: OctavoError | None = None
        self._asked = 0
        self._closing = False
        self._changed = threading.Condition()
        ranks = config.parallel.tensor_parallel_size
        self._progress = progress_of(self.folder, ranks)
        self._followers = {rank: _start(config, rank, self.folder) for rank in range(1, ranks)}
        for rank in self._followers:
            threading.Thread(target=self._listen, args=(rank,), name=f"octavo-rank-{rank}", daemon=True).start()

    def tell(self, command: Command) -> None:
        """Sends ``command`` to all; raises the failure if there was one."""
        self.check()
        self._progress[0] += 1
        frame = msgspec.msgpack.encode(command)
        for rank, follower in self._followers.items():
            try:
                send_frame(follower.connection, frame)
            except BlockingIOError:  # its queue has been full for all that time
                raise self._fail(EngineDead(f"rank {rank} takes no commands for {self._seconds} s.", _REMEDY)) from None
            except OSError:
                raise self.reason(f"the connection to rank {rank} is broken") from None

    def ask(self, command: Command) -> None:
        """As `tell`, for a command that is answered by `wait`."""
        self._asked += 1
        self.tell(command)

    def wait(self) -> None:
        """Blocks until all have answered all that they were asked; raises the failure of one that cannot."""
        with self._changed:
            self._changed.wait_for(self._all_answered_or_failed)
        if self._failure is None and self._lost is not None:
            raise self.reason(str(self._lost.cause))
        self.check()

    def _all_answered_or_failed(self) -> bool:
        if self._failure is not None or self._lost is not None:
            return True
        return all(follower.answered >= self._asked for follower in self._followers.values())

    @property
    def failed(self) -> bool:
        """Whether a rank did."""
        return self._failure is not None

    def check(self) -> None:
        """Raises the failure, if there was one."""
        if self._failure is not None:
            raise self._failure

    def reason(self, symptom: str) -> OctavoError:
        """Why a collective or a connection failed: the end of a rank, if one ended, else who is behind."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, BETTER_REASON_SECONDS)
        if self._failure is not None:
            return self._failure
        behind = [str(rank) for rank, done in enumerate(self._progress) if done == self._progress.min()]
        behind = behind if len(behind) < len(self._progress) else [str(rank) for rank in self._followers]
        who = f"rank {behind[0]}" if len(behind) == 1 else f"ranks {', '.join(behind)}"
        return self._fail(EngineDead(f"{who} did not take part in a step ({symptom}).", _REMEDY))

    def watch_device(self, is_ready: Callable[[], bool]) -> None:
        """Polls until what the device computes is there; raises the failure, or names who is behind in time."""
        deadline = time.monotonic() + self._seconds
        while not is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise self.reason(f"nothing came for {self._seconds} s")
            time.sleep(POLL_SECONDS)

    def expect_end(self) -> None:
        """From now on a rank that ends has not failed."""
        self._closing = True

    def close(self) -> None:
        """Ends the followers at once; may be called twice."""
        self._closing = True
        # A thread that listens may be the last to end. If it kept what this belongs to, a process group would go while
        # the interpreter ends and in another thread than the main one, which aborts the process.
        self.on_failure = None
        for follower in self._followers.values():
            follower.process.kill()
        for rank, follower in self._followers.items():
            try:
                follower.process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                get_logger().warning("the process of rank %d is killed, but its device takes long to let go", rank)
            if follower.process.stdin is not None:
                follower.process.stdin.close()
            follower.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- the threads that listen ------------------------------------------------------------------------------------

    def _listen(self, rank: int) -> None:
        follower = self._followers[rank]
        try:
            while True:
                self._take(rank, _decode_answer(receive_frame(follower.connection)))
        except (OSError, EOFError):
            self._ended(rank, follower.process.wait())

    def _take(self, rank: int, answer: Answer) -> None:
        if isinstance(answer, Failed):
            error = retold(answer.kind, f"rank {rank}: {answer.cause}", answer.remedy, answer.id)
            if answer.lost:
                self._lost = error
                with self._changed:
                    self._changed.notify_all()
            else:
                self._fail(error)
            return
        with self._changed:
            self._followers[rank].answered += 1
            self._changed.notify_all()

    def _ended(self, rank: int, code: int) -> None:
        if self._closing or self._failure is not None:
            return
        if self._lost is not None and code >= 0:  # it has said why
            time.sleep(BETTER_REASON_SECONDS)
            self._fail(self._lost)
            return
        remedy = "If the system ran out of memory, give the engine less." if code == -9 else _REMEDY
        self._fail(EngineDead(f"the process of rank {rank} {how_ended(code)}.", remedy))

    def _fail(self, error: OctavoError) -> OctavoError:
        """Keeps the first failure, and tells of it."""
        with self._changed:
            if self._failure is not None or self._closing:
                return self._failure or error
            self._failure = error
            on_failure = self.on_failure
            self._changed.notify_all()
        get_logger().error("%s", error)
        for follower in self._followers.values():  # one that is stopped would not see that this process ends
            follower.process.kill()
        if self._on_death is not None:  # which may end this process; what follows can wait for the device
            self._on_death(error)
        if on_failure is not None:
            threading.Thread(target=on_failure, name="octavo-ranks-abort", daemon=True).start()
        return error


_REMEDY = "Restart; what the ranks wrote to standard error before says more."


def _start(config: EngineConfig, rank: int, folder: Path) -> _Follower:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "octavo.runtime.follower"],  # -P: no module is taken from the current folder
            stdin=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C in the terminal is for rank 0 alone
        )
        level = get_logger().getEffectiveLevel()
        start = Start(config, rank, str(folder), theirs.fileno(), "debug" if level <= logging.DEBUG else "warning")
    if process.stdin is None:
        raise EngineDead(f"the process of rank {rank} has no standard input.", "Start it again.")
    with contextlib.suppress(BrokenPipeError):  # the thread that listens reports how it ended
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
    limit = struct.pack("ll", config.parallel.distributed_timeout_seconds, 0)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return _Follower(process, ours)
