"""Compiles the Triton kernels that some work launches, on all cores and before it runs."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

_SLOW = 0.15  # seconds: what takes longer was not in the cache on disk
_WORD = 2  # bytes of a job's number: all of them fit into a pipe
_PATIENCE = 30.0  # seconds that the others get to compile


class _Recorder(Executor):
    """Keeps what it is to compile for later."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[[], Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append((future, fn))
        return future

    def fail(self, error: BaseException) -> None:
        """Gives up what is not compiled; nobody waits for it then."""
        for future, _ in self.jobs:
            if not future.done():
                future.set_exception(error)

    def finish(self) -> None:
        """Compiles; from the first on that is not in the cache on disk, in several processes, which fill that cache."""
        alone = False
        for number, (future, compile_one) in enumerate(self.jobs):
            start = time.perf_counter()
            future.set_result(compile_one())
            if not alone and time.perf_counter() - start > _SLOW:
                share([job for _, job in self.jobs[number + 1 :]])
                alone = True


def share(jobs: list[Callable[[], Any]]) -> None:
    """Runs ``jobs`` in copies of this process, one a core, each of which takes the next job when it is done with one;
    what they leave is on disk. Compilers written in Python hold its lock, so that threads would wait for each other."""
    queue, end = os.pipe()
    for number in range(len(jobs)):
        os.write(end, number.to_bytes(_WORD, "little"))
    os.close(end)
    children = [_fork(jobs, queue) for _ in range(min(len(jobs), os.cpu_count() or 1))]
    os.close(queue)
    deadline = time.monotonic() + _PATIENCE
    while children and time.monotonic() < deadline:
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
        time.sleep(0.01)
    for child in children:  # this process compiles what they have not
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _fork(jobs: list[Callable[[], Any]], queue: int) -> int:
    """The id of a child that runs those of ``jobs`` whose numbers it gets out of ``queue``, and ends without touching
    what it shares with this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist; the child needs none of their locks
        child = os.fork()
    if child:
        return child
    try:
        while number := os.read(queue, _WORD):
            jobs[int.from_bytes(number, "little")]()
    finally:
        os._exit(0)


def rehearse(work: Callable[[], None]) -> None:
    """Goes through ``work`` with launches that compile, or take from the cache on disk, and run nothing: what kernels
    would have written is undefined, and ``work`` may not depend on it."""
    launch, seen, recorder = JITFunction.run, set(), _Recorder()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        key = (kernel, *map(_trait, args), *options.items())
        if key not in seen:
            seen.add(key)
            launch(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        with triton.AsyncCompileMode(recorder):
            try:
                work()
                recorder.finish()
            except BaseException as error:
                recorder.fail(error)
                raise
    finally:
        JITFunction.run = launch


def _trait(argument: Any) -> Any:
    """What a kernel may be specialised on."""
    return (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, torch.Tensor) else argument
