"""One NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from octavo.config import MemoryOptions
from octavo.platforms.base import NOTHING_CAPTURED, Captured, T

KV_MARGIN = 1 << 28  # bytes left for what the measuring step did not show


@dataclass(frozen=True)
class _Copy:
    tensor: torch.Tensor
    done: torch.cuda.Event

    def ready(self) -> bool:
        return bool(self.done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> torch.Tensor:
        self.done.synchronize()
        return self.tensor


class CudaPlatform:
    """See `platforms.base.Platform`."""

    overlaps = True
    fast_bfloat16 = True
    enough_tokens: int | None = None
    few_tokens = 64  # not measured: a card reads weights for longer than it computes with so few
    captures = find_spec("triton") is not None  # the reference operators read lengths on the host

    def __init__(self, index: int | None = None) -> None:
        """``index``: the GPU, by default torch's current one."""
        if index is not None:
            torch.cuda.set_device(index)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.converts_float8 = torch.cuda.get_device_capability(self.device) >= (8, 9)
        self._graph_memory: Any = None  # shared by all graphs: one runs at a time

    def describe(self) -> str:
        """Name, capability and memory of the card."""
        card = torch.cuda.get_device_properties(self.device)
        return f"{card.name}, capability {card.major}.{card.minor}, {card.total_memory / 2**30:.1f} GiB"

    def host_buffer(self, count: int) -> torch.Tensor:
        """Pinned memory, so that the copy to the device is asynchronous."""
        return torch.empty(count, dtype=torch.int32, pin_memory=True)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros on the card."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def to_host(self, tensor: torch.Tensor) -> _Copy:
        """An asynchronous copy on the current stream, and the event that ends it."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return _Copy(host, done)

    def capture(self, work: Callable[[], T]) -> Callable[[], T]:
        """A CUDA graph of ``work``, which is run once before: kernels compile and libraries set themselves up."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=stream, capture_error_mode="thread_local"):
            result = work()
        self._graph_memory = graph.pool()

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def kv_budget(
        self, memory: MemoryOptions, measure: Callable[[], None], captured: Captured = NOTHING_CAPTURED
    ) -> tuple[int, str]:
        """What the user set, else the share of the card that the weights, the largest step and graphs leave."""
        weights = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        measure()  # in any case: it compiles and loads kernels, which no request should wait for
        if memory.kv_cache_memory_bytes is not None:
            torch.cuda.empty_cache()
            return memory.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device)
        graphs = int((peak - weights) * captured.share) + captured.outputs
        budget = int(total * memory.gpu_memory_utilization) - others - peak - graphs - KV_MARGIN
        gib = 2**30
        return budget, (
            f"{memory.gpu_memory_utilization:.0%} of {total / gib:.1f} GiB - weights and largest step "
            f"{peak / gib:.1f} - graphs {graphs / gib:.1f} - others {others / gib:.1f} - margin {KV_MARGIN / gib:.2f}"
        )
