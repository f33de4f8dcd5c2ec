"""Compiles the Triton kernels that some work launches, on all cores and before it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction


def rehearse(work: Callable[[], None]) -> None:
    """Goes through ``work`` with launches that compile, or take from the cache on disk, and run nothing: what kernels
    would have written is undefined, and ``work`` may not depend on it. Compilers release Python's lock, so that threads
    serve."""
    launch, seen = JITFunction.run, set()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        key = (kernel, *map(_trait, args), *options.items())
        if key not in seen:
            seen.add(key)
            launch(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor(os.cpu_count(), "octavo-compile") as pool, triton.AsyncCompileMode(pool):
            work()
    finally:
        JITFunction.run = launch


def _trait(argument: Any) -> Any:
    """What a kernel may be specialised on."""
    return (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, torch.Tensor) else argument
