"""The least time that a machine leaves a workload: bytes over its bandwidth, operations over its rate of products.

Both are measured when a benchmark starts, in about a second (the bandwidth of a GPU is its data sheet's). A prompt's
tokens pass all layers, its last one the head, too; a decode step reads the weights once for all sequences, of experts
those that are chosen, and K and V of each sequence. What attention computes is left out, and so is everything that
could be hidden behind these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.log import get_logger

PROBE_ROWS, PROBE_SIZE = 256, 2048  # of the product that is timed
PROBE_SECONDS = 0.3  # for each candidate


@dataclass(frozen=True)
class Floor:
    """Bytes and operations are counted for one step; ``layers`` and ``head`` are numbers of weights."""

    bandwidth: float  # bytes a second
    rate: float  # operations a second in products
    read: int  # bytes of weights, for one token
    layers: int
    head: int
    kv_bytes: int  # of a token
    rows: int  # most sequences in a step
    experts: int = 0  # bytes of all experts,
    share: float = 1.0  # of which a token chooses this part

    def read_by(self, tokens: int) -> float:
        """Bytes of weights that a step of so many tokens reads, if routers choose evenly and independently."""
        return self.read + self.experts * ((1 - self.share) - (1 - self.share) ** tokens)

    def seconds(self, lengths: Sequence[int], max_tokens: int) -> float:
        """For prompts of ``lengths`` tokens, each with ``max_tokens`` new ones, all known at the start."""
        prompts = 2 * (self.layers * sum(lengths) + self.head * len(lengths))
        total = max(prompts / self.rate, self.read_by(sum(lengths)) / self.bandwidth)
        steps = max_tokens - 1
        for first in range(0, len(lengths), self.rows):
            batch = lengths[first : first + self.rows]
            products = 2 * len(batch) * (self.layers + self.head) / self.rate
            cached = sum(steps * length + steps * (steps + 1) // 2 for length in batch)
            read = self.read_by(len(batch))
            total += steps * max(products, read / self.bandwidth) + cached * self.kv_bytes / self.bandwidth
        return total

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e9:.1f} GB/s, {self.rate / 1e9:,.0f} GFLOP/s in products"


def measure(config: EngineConfig) -> Floor | None:
    """The floor of the model of ``config`` on this machine; None, with a line in the log, where it cannot be told."""
    from octavo.plan_command import plan_here

    try:
        plan = plan_here(config)
    except OctavoError as error:
        get_logger().info("floor: unknown: %s", error.cause)
        return None
    if plan.machine.bandwidth is None or not plan.weights.layers:
        get_logger().info("floor: unknown for this device or model")
        return None
    return Floor(
        bandwidth=plan.machine.bandwidth,
        rate=product_rate(plan.machine.device, plan.dtype, plan.weights.small),
        read=plan.weights.read,
        layers=plan.weights.layers,
        head=plan.weights.head,
        kv_bytes=plan.cache.bytes_per_token,
        rows=config.limits.max_num_seqs,
        experts=plan.weights.experts,
        share=plan.weights.share,
    )


def product_rate(device: str, dtype: str, small: bool) -> float:
    """Operations a second of the fastest product there is, octavo's own or torch's; ``small``: of int8 weights."""
    import torch

    from octavo.kernels import select

    kind: torch.dtype = getattr(torch, dtype)
    x = torch.randn(PROBE_ROWS, PROBE_SIZE, device=device).to(kind)
    weight = torch.randn(PROBE_SIZE, PROBE_SIZE, device=device).to(kind)
    ops = select.ops(x.device, kind)
    pack = ops.pack_int8 if small and ops.pack_int8 is not None else ops.pack_linear
    packed = pack(weight, None)
    candidates: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, weight)]
    if packed is not None:
        candidates.append(lambda: packed(x))

    def least(product: Callable[[], object]) -> float:
        best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
        while best == float("inf") or time.perf_counter() < end:
            start = time.perf_counter()
            product()
            if x.is_cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    return 2 * PROBE_ROWS * PROBE_SIZE**2 / min(map(least, candidates))
