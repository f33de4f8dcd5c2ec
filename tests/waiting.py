"""Waiting for what must come: no longer than it takes, and long enough for a machine that is busy or stands still."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

PATIENCE = 60.0  # seconds; only against hanging, so it must be no more than what a defect would make a test wait for


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Returns as soon as ``condition`` holds; fails if it does not come to hold."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.01)


def children(process: psutil.Process | None = None, command: str = "") -> list[psutil.Process]:
    """The living children of ``process``, by default of this one, whose command line has ``command`` in it.

    In the order of their start; none of a process that has ended.
    """
    try:
        found = (process or psutil.Process()).children()
    except psutil.NoSuchProcess:
        return []
    return sorted((child for child in found if lives(child) and command in _command(child)), key=lambda one: one.pid)


def lives(process: psutil.Process) -> bool:
    """False for a zombie, too: whoever inherited it reaps it at leisure."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def ended(process: psutil.Process, seconds: float = PATIENCE) -> bool:
    """Whether ``process`` ends within ``seconds``."""
    deadline = time.monotonic() + seconds
    while lives(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
