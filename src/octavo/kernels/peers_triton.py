"""Sums and gathers over the GPUs of one host in a kernel that writes into the others' memory; sums alone or with the
addition and norm that follow.

A program has one row. It writes the row into a buffer of each other rank, reads theirs from its own, and adds them up
in the order of the ranks, so that every rank finds the same. Each word of 8 bytes, which arrive together, is 4 of the
row and the number of the row's exchange: the reader waits until it sees that number everywhere, so nothing is told
apart from the data and no fence is needed. The number is kept in ``epochs``; buffers alternate with it. That is enough
to overwrite none that is still read: a rank that comes to exchange n + 2 of a row has read the others' words of n + 1,
which they wrote when they were done with n.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from octavo.kernels.pdl import chained, release, wait

MOST_ROWS = 256
ROW_BYTES = 1 << 15
_WORDS = ROW_BYTES // 4


def buffer_bytes(ranks: int) -> int:
    """Of the memory that each rank gives to the others, zero at first."""
    return 8 * 2 * MOST_ROWS * ranks * _WORDS


@triton.jit
def _values(words, kind: tl.constexpr):
    """What the lower halves of ``words`` hold: one value of 4 bytes, or two of 2."""
    payload = words.to(tl.int32)
    if kind.primitive_bitwidth == 32:
        values = payload.to(kind, bitcast=True)
    else:
        first = (payload & 0xFFFF).to(tl.int16).to(kind, bitcast=True)
        second = (payload >> 16).to(tl.int16).to(kind, bitcast=True)
        values = tl.interleave(first, second)
    return values


@triton.jit
def _exchange_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, buffers_ptr, epochs_ptr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, RESULT: tl.constexpr,
    ROWS: tl.constexpr, STRIDE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """``RESULT``: "sum", "norm" of the residual and the sum, or "gather". ``STRIDE``: words of a row in a buffer."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    EACH: tl.constexpr = 32 // kind.primitive_bitwidth  # values of a word
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    i = tl.max_contiguous(tl.arange(0, BLOCK // EACH), 1)  # a word a thread: neither access to others' memory is wider
    live = i < SIZE // EACH
    if RESULT == "norm":
        weight = tl.load(weight_ptr + offsets, mask, 0.0)
    release(CHAINED)
    wait(CHAINED)
    epoch = tl.load(epochs_ptr + row) + 1
    start = row.to(tl.int64) * SIZE
    payload = tl.load((x_ptr + start).to(tl.pointer_type(tl.int32)) + i, live, 0)
    word = (epoch.to(tl.int64) << 32) | (payload.to(tl.int64) & 0xFFFFFFFF)
    slot = ((epoch & 1) * ROWS + row).to(tl.int64) * (RANKS * STRIDE)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            theirs = tl.load(buffers_ptr + peer).to(tl.pointer_type(tl.int64)) + slot + RANK * STRIDE
            tl.store(theirs + i, word, live, cache_modifier=".wt")
    x = tl.load(x_ptr + start + offsets, mask, 0.0)
    if RESULT == "norm":
        residual = tl.load(residual_ptr + start + offsets, mask, 0.0)
    mine = tl.load(buffers_ptr + RANK).to(tl.pointer_type(tl.int64)) + slot
    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(RANKS):
        if peer == RANK:
            value = x
        else:
            words = tl.load(mine + peer * STRIDE + i, live, 0, volatile=True)
            while tl.sum((live & ((words >> 32).to(tl.int32) != epoch)).to(tl.int32)) > 0:
                words = tl.load(mine + peer * STRIDE + i, live, 0, volatile=True)
            value = _values(words, kind)
        if RESULT == "gather":
            tl.store(out_ptr + (row.to(tl.int64) * RANKS + peer) * SIZE + offsets, value, mask)
        else:
            total += value.to(tl.float32)
    tl.debug_barrier()  # all threads have read the epoch before it changes
    tl.store(epochs_ptr + row, epoch)
    if RESULT != "gather":
        summed = total.to(kind)
        if RESULT == "norm":
            summed = (summed.to(tl.float32) + residual.to(tl.float32)).to(kind)
            tl.store(total_ptr + start + offsets, summed, mask)
            wide = summed.to(tl.float32)
            normed = (wide * tl.rsqrt(tl.sum(wide * wide) / SIZE + eps)).to(kind)
            tl.store(out_ptr + start + offsets, (weight.to(tl.float32) * normed.to(tl.float32)).to(kind), mask)
        else:
            tl.store(out_ptr + start + offsets, summed, mask)


class PeerMemory:
    """``buffers`` has the address of each rank's `buffer_bytes`, int64 ``[ranks]``."""

    def __init__(self, rank: int, buffers: torch.Tensor, kept: Any) -> None:
        self._rank, self._buffers = rank, buffers
        self._kept = kept  # whatever owns the memory
        self._epochs = torch.zeros(MOST_ROWS, dtype=torch.int32, device=buffers.device)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether ``x[T, C]`` is small enough."""
        nbytes = x.shape[-1] * x.element_size()
        return x.dim() == 2 and 0 < len(x) <= MOST_ROWS and nbytes <= ROW_BYTES and nbytes % 4 == 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' ``x[T, C]``."""
        out = torch.empty_like(x)
        self._launch("sum", x, x, x, out, out)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`reference.add_rms_norm` of the sum of the ranks' ``x``; both inputs are dense."""
        out, total = torch.empty_like(x), torch.empty_like(x)
        self._launch("norm", x, residual, weight, out, total, eps)
        return out, total

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' ``x[T, C]`` side by side: ``[T, ranks * C]``."""
        out = x.new_empty(len(x), len(self._buffers) * x.shape[1])
        self._launch("gather", x, x, x, out, out)
        return out

    def _launch(
        self,
        result: str,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        total: torch.Tensor,
        eps: float = 0.0,
    ) -> None:
        rows, size = x.shape
        block = max(2, triton.next_power_of_2(size))
        chain = chained(x.device)
        _exchange_kernel[(rows,)](
            x, residual, weight, out, total, self._buffers, self._epochs, eps,
            size, block, self._rank, len(self._buffers), result, MOST_ROWS, _WORDS, chain,
            num_warps=4 if block <= 2048 else 8, launch_pdl=chain,
        )  # fmt: skip
