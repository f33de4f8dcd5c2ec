"""Programmatic dependent launch: a kernel may start while the one before it ends, and waits where it needs its results.

Every kernel launched with ``launch_pdl=chained(device)`` calls `wait` in all its programs before it touches anything
that an earlier kernel wrote or reads. Waiting means: the kernel before is complete, and so are those before it, which
it has waited for. `release` lets the next kernel start as soon as every program of this one has begun.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def wait(CHAINED: tl.constexpr):
    """The kernels before are complete and their writes visible."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(CHAINED: tl.constexpr):
    """The next kernel may start."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@cache
def chained(device: torch.device) -> bool:
    """Whether the device can do it: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
