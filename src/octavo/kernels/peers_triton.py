"""Sums over the GPUs of one host in a kernel that reads the others' memory, alone or with the addition and norm after.

A program has one row. It copies its summand into a buffer that all ranks can read, tells them by a flag, waits for
theirs, and adds up all rows in the order of the ranks, so that every rank finds the same. A row counts its sums in
``epochs``; buffers alternate with it. That is enough to overwrite none that is still read: a rank that reaches sum
n + 2 of a row has seen the others' flags of n + 1, which they set when they had read n.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from octavo.kernels.pdl import chained, release, wait

MOST_ROWS = 256
ROW_BYTES = 1 << 15
BUFFER_BYTES = 2 * MOST_ROWS * ROW_BYTES


@triton.jit
def _sum_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, buffers_ptr, flags_ptr, epochs_ptr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, STRIDE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    kind = x_ptr.dtype.element_ty
    if NORM:
        weight = tl.load(weight_ptr + offsets, mask, 0.0)
    release(CHAINED)
    wait(CHAINED)
    epoch = tl.load(epochs_ptr + row) + 1
    at = row.to(tl.int64) * SIZE + offsets
    x = tl.load(x_ptr + at, mask, 0.0)
    place = ((epoch & 1) * ROWS + row).to(tl.int64) * STRIDE + offsets
    tl.store(tl.load(buffers_ptr + RANK).to(tl.pointer_type(kind)) + place, x, mask)
    tl.debug_barrier()  # all threads have written before one tells
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            theirs = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs + row * RANKS + RANK, epoch, sem="release", scope="sys")
    mine = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + row * RANKS
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            seen = tl.atomic_add(mine + peer, 0, sem="acquire", scope="sys")
            while (seen - epoch) < 0:  # a difference, since both wrap around
                seen = tl.atomic_add(mine + peer, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(RANKS):
        if peer == RANK:
            total += x.to(tl.float32)
        else:
            theirs = tl.load(buffers_ptr + peer).to(tl.pointer_type(kind))
            total += tl.load(theirs + place, mask, 0.0, cache_modifier=".cv").to(tl.float32)
    tl.store(epochs_ptr + row, epoch)
    summed = total.to(kind)
    if NORM:
        summed += tl.load(residual_ptr + at, mask, 0.0)
        tl.store(total_ptr + at, summed, mask)
        wide = summed.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide) / SIZE + eps)
        tl.store(out_ptr + at, weight * (wide * scale).to(kind), mask)
    else:
        tl.store(out_ptr + at, summed, mask)


class PeerSums:
    """``buffers`` and ``flags`` have the addresses of each rank's `BUFFER_BYTES` and int32 ``[MOST_ROWS, ranks]``."""

    def __init__(self, rank: int, buffers: torch.Tensor, flags: torch.Tensor, kept: Any) -> None:
        self._rank, self._buffers, self._flags = rank, buffers, flags
        self._kept = kept  # whatever owns the memory
        self._epochs = torch.zeros(MOST_ROWS, dtype=torch.int32, device=buffers.device)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether ``x[T, C]`` is small enough."""
        return x.dim() == 2 and 0 < len(x) <= MOST_ROWS and x.shape[1] * x.element_size() <= ROW_BYTES

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' ``x[T, C]``."""
        out = torch.empty_like(x)
        self._launch(x, x, x, out, out, 0.0, norm=False)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`reference.add_rms_norm` of the sum of the ranks' ``x``; both inputs are dense."""
        out, total = torch.empty_like(x), torch.empty_like(x)
        self._launch(x, residual, weight, out, total, eps, norm=True)
        return out, total

    def _launch(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        total: torch.Tensor,
        eps: float,
        *,
        norm: bool,
    ) -> None:
        rows, size = x.shape
        block = triton.next_power_of_2(size)
        chain = chained(x.device)
        _sum_kernel[(rows,)](
            x, residual, weight, out, total, self._buffers, self._flags, self._epochs, eps,
            size, block, self._rank, len(self._flags), norm, MOST_ROWS, ROW_BYTES // x.element_size(), chain,
            num_warps=4 if block <= 2048 else 8, launch_pdl=chain,
        )  # fmt: skip
