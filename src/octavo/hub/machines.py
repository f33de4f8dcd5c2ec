"""What a plan has to know of a machine; data sheets of some GPUs, so that one can ask about those that are not here."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from octavo.errors import ConfigError

GIB: Final = 1 << 30
_PROBE_BYTES: Final = 1 << 27  # far more than the caches of a core hold
_PROBE_PASSES: Final = 3


@dataclass(frozen=True)
class Machine:
    """``bandwidth`` is of its memory, in bytes a second, None if unknown; ``kv_share`` of it is for the KV cache.

    Without ``kv_share`` the KV cache gets what ``--gpu-memory-utilization`` and the weights leave.
    """

    name: str
    device: Literal["cpu", "cuda"]
    memory: int
    bandwidth: float | None
    fast_bfloat16: bool
    kv_share: float | None = None


# Usable GiB as the driver reports them, and GB/s of the data sheets.
_GPUS: Final[dict[str, tuple[str, float, float]]] = {
    "a10": ("NVIDIA A10", 22.1, 600),
    "a100": ("NVIDIA A100 80GB SXM", 79.2, 2039),
    "a100-40gb": ("NVIDIA A100 40GB", 39.4, 1555),
    "b200": ("NVIDIA B200", 178.4, 7700),
    "h100": ("NVIDIA H100 SXM", 79.2, 3350),
    "h20": ("NVIDIA H20", 95.1, 4000),
    "h200": ("NVIDIA H200", 139.8, 4800),
    "l4": ("NVIDIA L4", 22.0, 300),
    "l40s": ("NVIDIA L40S", 44.4, 864),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 23.5, 1008),
    "rtx5090": ("NVIDIA GeForce RTX 5090", 31.4, 1792),
}


def named(name: str) -> Machine:
    """The GPU called ``name`` (``h100``); raises `ConfigError` for one that is not listed."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in _GPUS:
        raise ConfigError(f"--gpu is {name!r}, which is not known.", f"Known are {', '.join(_GPUS)}.")
    title, memory, bandwidth = _GPUS[key]
    return Machine(title, "cuda", int(memory * GIB), bandwidth * 1e9, fast_bfloat16=True)


def bandwidth_of(title: str) -> float | None:
    """The data sheet's bytes a second of a GPU by the name that its driver gives; None if it is not listed."""
    words = set(title.lower().replace("-", " ").split())
    for key in sorted(_GPUS, key=len, reverse=True):  # a100-40gb before a100
        if set(key.replace("rtx", "rtx-").split("-")) <= words:
            return _GPUS[key][2] * 1e9
    return None


def larger_than(memory: int) -> str | None:
    """The ``--gpu`` name of the smallest listed GPU with more than ``memory`` bytes."""
    fitting = [(size, key) for key, (_, size, _) in _GPUS.items() if size * GIB > memory]
    return min(fitting)[1] if fitting else None


def measure_bandwidth() -> float:
    """Bytes a second that all cores together read from memory: the best of a few sums over an array (about 0.2 s)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(np.ones(_PROBE_BYTES // 8, np.uint64), cores)
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:  # numpy lets go of the interpreter's lock
        for _ in range(_PROBE_PASSES):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return _PROBE_BYTES / best
