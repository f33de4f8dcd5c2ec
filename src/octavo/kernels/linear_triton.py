"""The product of a few rows with a weight: what a decode step of a small batch spends its time on.

A program reads whole rows of the weight, all of it at once and before it waits for the kernel that makes ``x``, so
that the memory is busy while that one ends (programmatic dependent launch). cuBLAS leaves half of the bandwidth unused
for the small matrices of a small model; see docs/performance-log.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from octavo.kernels.pdl import chained, release, wait

_ROWS = (1, 2, 4)  # of x: each is a kernel of its own
_MAX_WORK = 1 << 24  # multiply-adds of more rows than one: above it the arithmetic, not the memory, is the limit
_MAX_SIZE = 16384  # of a row of the weight: it must fit into the registers of a program
_TILE = 16384  # elements of the weight that a program reads


@triton.jit
def _few_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, out_size,
    SIZE: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, PAD)
    at = weight_ptr + n[:, None].to(tl.int64) * SIZE + k[None, :]
    if PAD == SIZE:
        weight = tl.load(at, (n < out_size)[:, None], 0.0)
    else:
        weight = tl.load(at, (n < out_size)[:, None] & (k < SIZE)[None, :], 0.0)
    bias = tl.load(bias_ptr + n, n < out_size, 0.0).to(tl.float32) if HAS_BIAS else 0.0
    release(CHAINED)
    wait(CHAINED)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * SIZE + k, k < SIZE, 0.0).to(tl.float32)
        out = tl.sum(weight.to(tl.float32) * x[None, :], 1) + bias
        tl.store(out_ptr + row * out_size + n, out.to(out_ptr.dtype.element_ty), n < out_size)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `reference.linear`."""
    if not _fits(x, weight):
        return F.linear(x, weight, bias)
    size = weight.shape[1]
    pad = triton.next_power_of_2(size)
    outputs, chain = max(1, _TILE // pad), chained(x.device)
    out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    _few_rows_kernel[(triton.cdiv(len(weight), outputs),)](
        x, weight, bias, out, len(weight), size, pad, len(x), outputs, bias is not None, chain,
        num_warps=8, launch_pdl=chain,
    )  # fmt: skip
    return out


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.dim() != 2:
        return False
    rows, size = x.shape
    if rows not in _ROWS or (rows > 1 and rows * weight.numel() > _MAX_WORK):
        return False
    return size <= _MAX_SIZE and size % 64 == 0 and x.dtype != torch.float32 and x.is_contiguous()
