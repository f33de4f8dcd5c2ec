"""The product of few rows with a weight: what a decode step spends its time on.

One row: a program reads whole rows of the weight, all of it at once and before it waits for the kernel that makes
``x``, so that the memory is busy while that one ends (programmatic dependent launch). Up to `MOST_ROWS`: the weight's
rows are the rows of a tensor-core product, and programs share its columns until they fill the card; what each has is
added up, in order, by the last of them to arrive, so that the sum depends on the shape alone. cuBLAS leaves a fifth to
a half of the bandwidth unused for such shapes; see docs/performance-log.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from octavo.kernels import triton_ops
from octavo.kernels.pdl import chained, release, wait
from octavo.kernels.triton_ops import gated

MOST_ROWS = 64
_FEW = (1, 2, 4)  # rows of x that are multiplied without tensor cores: each is a kernel of its own
_MAX_WORK = 1 << 24  # multiply-adds of more rows than one: above it the arithmetic, not the memory, is the limit
_MAX_SIZE = 16384  # of a row of the weight: it must fit into the registers of a program
_TILE = 16384  # elements of the weight that a program reads
_OUTPUTS, _COLUMNS = 64, 128  # of the weight: the tile of the tensor-core product
_MOST_BLOCKS = 512  # more than that, and torch's product is as fast
_LEAST_PROGRAMS = 64
ALL = 1 << 16  # columns: as many as there are
_WHOLE_WAVE = range(96, 129)  # programs that occupy the card once


@dataclass(frozen=True)
class Launch:
    """``outputs`` rows of the weight a program, ``tile`` of their elements at once, ``splits`` programs a row.

    ``prefetch``: so many columns of its part a program asks for before it waits for the kernel that makes ``x``.
    """

    outputs: int
    tile: int
    splits: int
    warps: int
    stages: int
    prefetch: int = 0


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


@triton.jit
def _prefetch(address, size):
    """Asks for ``size`` bytes at each of ``address`` to come into the second-level cache."""
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }", "=r,l,r", [address, size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _finish(
    acc, out_ptr, block, rows, out_size, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """Writes ``acc[OUTPUTS, ROWS]``, or its second half times its activated first one, rounded as apart."""
    dtype = out_ptr.dtype.element_ty
    m = tl.arange(0, ROWS)
    count: tl.constexpr = OUTPUTS if GATE is None else OUTPUTS // 2
    n = block * count + tl.arange(0, count)
    if GATE is None:
        out = acc.to(dtype)
    else:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [2, count, ROWS]), [1, 2, 0]))
        out = gated(gate.to(dtype).to(tl.float32), GATE == "gelu").to(dtype) * up.to(dtype)
    kept = (n < out_size)[:, None] & (m < rows)[None, :]
    tl.store(out_ptr + m[None, :] * out_size + n[:, None], out, kept)


@triton.jit(do_not_specialize=["rows", "splits"])
def _split_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr, rows, out_size, size, share, splits,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    GATE: tl.constexpr, HAS_BIAS: tl.constexpr, PREFETCH: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """``OUTPUTS`` rows of the weight times ``share`` of the columns, a multiple of ``TILE``.

    ``GATE`` is None, or "silu" or "gelu": then the weight has ``2 out_size`` rows, and half of a program's are of
    gates, half of what these let through.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, OUTPUTS)
    if GATE is None:
        n = block * OUTPUTS + i
        live = n < out_size
    else:
        n = block * (OUTPUTS // 2) + i % (OUTPUTS // 2)
        live = n < out_size
        n += i // (OUTPUTS // 2) * out_size
    m, k = tl.arange(0, ROWS), tl.arange(0, TILE)
    begin = split * share
    end = tl.minimum(begin + share, size)
    weight_row = weight_ptr + tl.where(live, n, 0).to(tl.int64) * size
    if PREFETCH:
        _prefetch((weight_row + begin).to(tl.int64), tl.zeros_like(n) + tl.minimum(end - begin, PREFETCH) * 2)
    bias = tl.load(bias_ptr + n, live, 0.0).to(tl.float32) if HAS_BIAS else tl.zeros([OUTPUTS], tl.float32)
    release(CHAINED)
    wait(CHAINED)
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    at = weight_row[:, None] + k[None, :]
    x_at = x_ptr + m[None, :] * size + k[:, None]
    for first in range(begin, end, TILE):
        weight = tl.load(at + first, eviction_policy="evict_first")
        x = tl.load(x_at + first, (m < rows)[None, :], 0.0)
        acc = tl.dot(weight, x, acc)
    if not SPLIT:
        _finish(acc + bias[:, None], out_ptr, block, rows, out_size, OUTPUTS, ROWS, GATE)
    else:
        place = tl.arange(0, OUTPUTS)[:, None] * ROWS + m[None, :]
        own = partial_ptr + block.to(tl.int64) * splits * OUTPUTS * ROWS
        tl.store(own + split * OUTPUTS * ROWS + place, acc)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == splits - 1:
            acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
            for part in range(splits):
                acc += tl.load(own + part * OUTPUTS * ROWS + place, cache_modifier=".cg")
            _finish(acc + bias[:, None], out_ptr, block, rows, out_size, OUTPUTS, ROWS, GATE)
            tl.store(arrived_ptr + block, 0)  # as the next product expects it


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `reference.linear`."""
    if _takes_few(x, weight):
        return _few_rows(x, weight, bias)
    launch = choose(x, weight)
    return F.linear(x, weight, bias) if launch is None else split_linear(x, weight, bias, launch)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """See `reference.gated_linear`."""
    launch = None if _takes_few(x, weight) else choose(x, weight, gated=True)
    if launch is None:
        return (triton_ops.gelu_tanh_and_mul if gelu else triton_ops.silu_and_mul)(linear(x, weight, bias))
    return split_linear(x, weight, bias, launch, "gelu" if gelu else "silu")


def _few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    size = weight.shape[1]
    pad = triton.next_power_of_2(size)
    outputs, chain = max(1, _TILE // pad), chained(x.device)
    out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    _few_rows_kernel[(triton.cdiv(len(weight), outputs),)](
        x, weight, bias, out, len(weight), size, pad, len(x), outputs, bias is not None, chain,
        num_warps=8, launch_pdl=chain,
    )  # fmt: skip
    return out


def split_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, launch: Launch, gate: str | None = None
) -> torch.Tensor:
    """`linear`, or with ``gate`` `gated_linear`, by the tensor-core product: for up to `MOST_ROWS` rows, of a multiple
    of the tile as their size."""
    (rows, size), out_size = x.shape, len(weight) if gate is None else len(weight) // 2
    blocks, pad = triton.cdiv(len(weight), launch.outputs), max(16, triton.next_power_of_2(rows))
    share = triton.cdiv(size // launch.tile, launch.splits) * launch.tile
    splits, chain = triton.cdiv(size, share), chained(x.device)
    out = torch.empty((rows, out_size), dtype=x.dtype, device=x.device)
    partial, arrived = scratch(x.device, blocks * splits * launch.outputs * pad, blocks) if splits > 1 else (out, out)
    _split_kernel[(blocks, splits)](
        x, weight, bias, out, partial, arrived, rows, out_size, size, share, splits,
        pad, launch.outputs, launch.tile, splits > 1, gate, bias is not None, launch.prefetch if chain else 0, chain,
        num_warps=launch.warps, num_stages=launch.stages, launch_pdl=chain,
    )  # fmt: skip
    return out


def scratch(device: torch.device, count: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for sums, and zeroed counters: each product uses them from the start, and leaves the counters at zero."""
    return torch.empty(count, dtype=torch.float32, device=device), _counters(device)[:blocks]


@cache
def _counters(device: torch.device) -> torch.Tensor:
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def choose(x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False) -> Launch | None:
    """How to multiply; None: as torch does. ``gated``: the activation comes with it, which spares a kernel.

    The rule is drawn from ``bench/kernels_gpu.py --sweep`` on 12 shapes of three models; see docs/performance-log.md.
    """
    if x.dim() != 2 or x.dtype == torch.float32 or not x.is_contiguous() or not weight.is_contiguous():
        return None
    (rows, size), blocks = x.shape, triton.cdiv(len(weight), _OUTPUTS)
    if not 1 < rows <= MOST_ROWS or size % _COLUMNS or blocks > _MOST_BLOCKS:
        return None
    if rows > 32 and not gated and size <= 2 * len(weight) and blocks not in _WHOLE_WAVE:
        return None  # sums of several programs cost more than they bring
    if gated and size >= 4096 and triton.cdiv(blocks, 2) in _WHOLE_WAVE:
        return Launch(2 * _OUTPUTS, _COLUMNS if rows <= 32 else _COLUMNS // 2, 1, warps=4, stages=5)
    splits = 1
    while blocks * splits < _LEAST_PROGRAMS and size >= 1024 * splits:
        splits *= 2
    while blocks * splits < _WHOLE_WAVE.start and size >= 2048 * splits:
        splits *= 2
    prefetch = ALL if blocks * splits <= _LEAST_PROGRAMS else 0
    return Launch(_OUTPUTS, _COLUMNS, splits, warps=4, stages=5, prefetch=prefetch)


def _takes_few(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.dim() != 2:
        return False
    rows, size = x.shape
    if rows not in _FEW or (rows > 1 and rows * weight.numel() > _MAX_WORK):
        return False
    return size <= _MAX_SIZE and size % 64 == 0 and x.dtype != torch.float32 and x.is_contiguous()
