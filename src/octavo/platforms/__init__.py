"""Devices; `select` picks one."""

from __future__ import annotations

import torch

from octavo.errors import ConfigError
from octavo.platforms.base import Platform


def select(name: str, rank: int = 0, ranks: int = 1, engines: int = 1) -> Platform:
    """The platform called ``name``: "cpu", "cuda", or "auto" for the GPU if there is one.

    Where ``ranks`` processes share a model, ``rank`` has the GPU of that number, or its share of the CPU's memory.
    ``engines``, each of so many ranks, share this machine.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise ConfigError(
                "--device is cuda, but torch sees no GPU.", "Use --device cpu, or a torch built for CUDA."
            )
        from octavo.platforms.cuda import CudaPlatform

        return CudaPlatform(_own_gpu(rank, ranks) if ranks > 1 else None)
    from octavo.platforms.cpu import CpuPlatform

    return CpuPlatform(ranks * engines)


def _own_gpu(rank: int, ranks: int) -> int:
    count = torch.cuda.device_count()
    if count < ranks:
        raise ConfigError(
            f"tensor_parallel_size is {ranks}, but torch sees {count} GPUs.",
            "Lower it, or let this process see more (CUDA_VISIBLE_DEVICES).",
        )
    return rank
