"""The CPU: device and host are one, so copies and events are nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from octavo.config import MemoryOptions

KV_SHARE = 0.1  # of the machine's memory: others live here too


@dataclass(frozen=True)
class _Here:
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


class CpuPlatform:
    """See `platforms.base.Platform`."""

    overlaps = False
    captures = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def describe(self) -> str:
        """Threads and memory."""
        return f"cpu, {torch.get_num_threads()} threads, {_total_memory() / 2**30:.1f} GiB"

    def host_buffer(self, count: int) -> torch.Tensor:
        """Plain memory."""
        return torch.empty(count, dtype=torch.int32)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """From numpy, which leaves zeroing to the operating system; `torch.zeros` would write every byte now."""
        count = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(shape)

    def to_host(self, tensor: torch.Tensor) -> _Here:
        """The tensor itself."""
        return _Here(tensor)

    def capture(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Nothing to record: the work itself."""
        return work

    def kv_budget(self, memory: MemoryOptions, measure: Callable[[], None]) -> tuple[int, str]:
        """What the user set, else a tenth of the machine's memory."""
        if memory.kv_cache_memory_bytes is not None:
            return memory.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
        total = _total_memory()
        return int(total * KV_SHARE), f"{KV_SHARE:.0%} of {total / 2**30:.1f} GiB"


def _total_memory() -> int:
    """Bytes that this process may use: the machine's, or the control group's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                return min(total, int(file.read()))
        except (OSError, ValueError):
            continue
    return total
