"""Child processes of octavo: how each begins, is tied to the one that started it, and ends."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

import msgspec

Start = TypeVar("Start")


def run_child(start: type[Start], work: Callable[[Start], int]) -> NoReturn:
    """The life of a child process: ``work`` gets what a line of JSON on standard input says, and returns the exit code.

    Threads of native libraries have nothing left to do then and can take seconds to end: they are not waited for.
    """
    line = sys.stdin.buffer.readline()
    code = work(msgspec.json.decode(line, type=start)) if line else 1
    sys.stderr.flush()
    os._exit(code)


def end_with_parent(folder: str = "") -> None:
    """From now on this process ends at once, with exit code 1, when its standard input does, however the parent ended.

    ``folder`` is removed then: a parent that was killed cannot. A thread watches, so that a main thread which waits for
    a device or for another process does not matter. Nothing else may read standard input.
    """

    def watch() -> None:
        while os.read(0, 4096):
            pass
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="octavo-parent-watch", daemon=True).start()


def how_ended(code: int) -> str:
    """What the exit code of a child process says, in words."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
