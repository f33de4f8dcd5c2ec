"""The CPU: device and host are one, so copies and events are nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.config import MemoryOptions
from octavo.platforms import pages
from octavo.platforms.base import NOTHING_CAPTURED, Captured, T

KV_SHARE = 0.1  # of the machine's memory: others live here too
CPU_INFO = Path("/proc/cpuinfo")
ENOUGH_TOKENS = 128  # for each thread: at half as many, products reach the rate that they have at 2,048
FEW_TOKENS = 8  # of bfloat16; with twice as many a step takes nearly twice as long
BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # x86, x86, Arm


@dataclass(frozen=True)
class _Here:
    tensor: torch.Tensor

    def ready(self) -> bool:
        return True

    def wait(self) -> torch.Tensor:
        return self.tensor


class CpuPlatform:
    """See `platforms.base.Platform`."""

    overlaps = False
    captures = False
    converts_float8 = False
    few_tokens = FEW_TOKENS

    def __init__(self, ranks: int = 1) -> None:
        """``ranks`` processes share the CPU."""
        self._ranks = ranks
        if ranks > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
        self.device = torch.device("cpu")
        self.enough_tokens: int | None = ENOUGH_TOKENS * torch.get_num_threads()
        self.fast_bfloat16 = not BFLOAT16_FLAGS.isdisjoint(cpu_flags())

    def describe(self) -> str:
        """Threads, memory and whether bfloat16 is fast."""
        bfloat16 = "with" if self.fast_bfloat16 else "without"
        memory = f"{total_memory() / 2**30:.1f} GiB"
        return f"cpu, {torch.get_num_threads()} threads, {memory}, {bfloat16} bfloat16 instructions"

    def host_buffer(self, count: int) -> torch.Tensor:
        """Plain memory."""
        return torch.empty(count, dtype=torch.int32)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroing is left to the operating system; `torch.zeros` would write every byte now."""
        count = math.prod(shape) * dtype.itemsize
        if count == 0:  # such a view torch refuses
            return torch.zeros(shape, dtype=dtype)
        return pages.zeros(count).view(dtype).view(shape)

    def to_host(self, tensor: torch.Tensor) -> _Here:
        """The tensor itself."""
        return _Here(tensor)

    def capture(self, work: Callable[[], T]) -> Callable[[], T]:
        """Nothing to record: the work itself."""
        return work

    def kv_budget(
        self, memory: MemoryOptions, measure: Callable[[], None], captured: Captured = NOTHING_CAPTURED
    ) -> tuple[int, str]:
        """What the user set, else a tenth of the machine's memory."""
        if memory.kv_cache_memory_bytes is not None:
            return memory.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
        total = total_memory()
        share = KV_SHARE / self._ranks
        return int(total * share), f"{share:.0%} of {total / 2**30:.1f} GiB"


def total_memory() -> int:
    """Bytes that this process may use: the machine's, or the control group's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                return min(total, int(file.read()))
        except (OSError, ValueError):
            continue
    return total


def cpu_flags() -> frozenset[str]:
    """What the first core can do, in the kernel's words; empty where `CPU_INFO` is not there."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))  # x86, Arm
    return frozenset(next(found, "").split())
