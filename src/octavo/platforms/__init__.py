"""Devices; `select` picks one."""

from __future__ import annotations

import torch

from octavo.errors import ConfigError
from octavo.platforms.base import Platform


def select(name: str) -> Platform:
    """The platform called ``name``: "cpu", "cuda", or "auto" for the GPU if there is one."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise ConfigError(
                "--device is cuda, but torch sees no GPU.", "Use --device cpu, or a torch built for CUDA."
            )
        from octavo.platforms.cuda import CudaPlatform

        return CudaPlatform()
    from octavo.platforms.cpu import CpuPlatform

    return CpuPlatform()
