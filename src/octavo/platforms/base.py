"""What differs between devices, apart from kernels. Nothing above this folder and `kernels` asks which device it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from octavo.config import MemoryOptions

T = TypeVar("T")


class HostCopy(Protocol):
    """A copy from the device that may still be under way."""

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        ...

    def wait(self) -> torch.Tensor:
        """The tensor on the host, complete."""
        ...


@dataclass(frozen=True)
class Captured:
    """Memory that captured steps keep: a ``share`` of what the largest step takes besides the weights, and
    ``outputs`` bytes."""

    share: float = 0.0
    outputs: int = 0


NOTHING_CAPTURED = Captured()


class Platform(Protocol):
    """One device. ``overlaps``: it computes while the host goes on, so that steps are worth launching ahead."""

    device: torch.device
    overlaps: bool
    captures: bool  # `capture` is worth calling
    converts_float8: bool  # it has instructions for 8-bit floats, so that the KV cache may be of them
    fast_bfloat16: bool  # it has instructions for bfloat16, so that halving the weights' bytes costs no time
    few_tokens: int  # so many take a step little longer than one: it reads the same weights
    enough_tokens: int | None  # so many in a step take its products to their full rate; None: no number is enough

    def describe(self) -> str:
        """One line for the start-up log."""
        ...

    def host_buffer(self, count: int) -> torch.Tensor:
        """int32[count] on the host, from which copies to the device are fastest."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros on the device; where memory is virtual, untouched parts of it take none."""
        ...

    def to_host(self, tensor: torch.Tensor) -> HostCopy:
        """Starts a copy to the host."""
        ...

    def capture(self, work: Callable[[], T]) -> Callable[[], T]:
        """``work`` recorded: the result replays it on the same memory and returns the same tensors each time."""
        ...

    def kv_budget(
        self, memory: MemoryOptions, measure: Callable[[], None], captured: Captured = NOTHING_CAPTURED
    ) -> tuple[int, str]:
        """(bytes the KV cache may take, the arithmetic behind it). ``measure`` runs the largest step once; steps will
        be ``captured``."""
        ...
