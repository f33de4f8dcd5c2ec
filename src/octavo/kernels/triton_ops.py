"""Norms, gated activations, rotary and the KV write as Triton kernels; names and signatures of `kernels.reference`.

One program handles one token's row, so a result never depends on what else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_ACT = 1024


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, stride_row, stride_head, heads, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    source = x_ptr + (row // heads).to(tl.int64) * stride_row + (row % heads) * stride_head
    x = tl.load(source + offsets, mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / SIZE + eps)
    normed = (x * scale).to(weight_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + offsets, mask, 0.0)
    tl.store(out_ptr + row.to(tl.int64) * SIZE + offsets, weight * normed, mask)


@triton.jit
def _add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * SIZE
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    total = tl.load(x_ptr + row + offsets, mask, 0.0) + tl.load(residual_ptr + row + offsets, mask, 0.0)
    tl.store(sum_ptr + row + offsets, total, mask)
    x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / SIZE + eps)
    normed = (x * scale).to(weight_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + offsets, mask, 0.0)
    tl.store(out_ptr + row + offsets, weight * normed, mask)


@triton.jit
def _gated_kernel(x_ptr, out_ptr, SIZE, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    gate = tl.load(x_ptr + row * 2 * SIZE + offsets, mask, 0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + offsets, mask, 0.0)
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh(z)) = sigmoid(2 z)
    else:
        gate = gate * tl.sigmoid(gate)
    tl.store(out_ptr + row * SIZE + offsets, gate.to(up.dtype) * up, mask)


@triton.jit
def _rotary_kernel(
    x_ptr, table_ptr, positions_ptr, out_ptr, stride_token, stride_head, HEADS, HALF, REST,
    HEADS_PAD: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    head, i = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, HALF_PAD)[None, :]
    mask = (head < HEADS) & (i < HALF)
    row = table_ptr + position * 2 * HALF
    dtype = x_ptr.dtype.element_ty
    cos = tl.load(row + i, i < HALF, 0.0).to(dtype)
    sin = tl.load(row + HALF + i, i < HALF, 0.0).to(dtype)
    source = x_ptr + token * stride_token + head * stride_head
    first = tl.load(source + i, mask, 0.0)
    second = tl.load(source + HALF + i, mask, 0.0)
    width = 2 * HALF + REST
    target = out_ptr + (token * HEADS + head) * width
    tl.store(target + i, first * cos - second * sin, mask)
    tl.store(target + HALF + i, second * cos + first * sin, mask)
    if REST_PAD > 0:
        j = tl.arange(0, REST_PAD)[None, :]
        keep = (head < HEADS) & (j < REST)
        tl.store(target + 2 * HALF + j, tl.load(source + 2 * HALF + j, keep, 0.0), keep)


@triton.jit
def _store_kv_kernel(
    cache_ptr, key_ptr, value_ptr, slots_ptr, key_stride, key_head, value_stride, value_head, page_stride,
    HEADS, DIM, PAGE: tl.constexpr, HEADS_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head, d = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, DIM_PAD)[None, :]
    mask = (head < HEADS) & (d < DIM)
    key = tl.load(key_ptr + token * key_stride + head * key_head + d, mask, 0.0)
    value = tl.load(value_ptr + token * value_stride + head * value_head + d, mask, 0.0)
    page = cache_ptr + (slot // PAGE).to(tl.int64) * page_stride
    target = page + head * PAGE * DIM + (slot % PAGE) * DIM + d
    tl.store(target, key, mask)
    tl.store(target + HEADS * PAGE * DIM, value, mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `reference.rms_norm`; ``x`` is ``[T, C]`` or ``[T, H, D]`` with a dense last dimension."""
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads = x.shape[1] if x.dim() == 3 else 1
    stride_head = x.stride(1) if x.dim() == 3 else 0
    rows = x.shape[0] * heads
    block = triton.next_power_of_2(size)
    warps = 1 if block <= 512 else 4 if block <= 4096 else 8
    if rows:
        _rms_norm_kernel[(rows,)](x, weight, out, x.stride(0), stride_head, heads, eps, size, block, num_warps=warps)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_rms_norm`; both inputs are dense."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    warps = 4 if block <= 4096 else 8
    if len(x):
        _add_rms_norm_kernel[(len(x),)](x, residual, weight, out, total, eps, size, block, num_warps=warps)
    return out, total


def _gated(x: torch.Tensor, gelu: bool) -> torch.Tensor:
    size = x.shape[-1] // 2
    out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    if len(x):
        _gated_kernel[(len(x), triton.cdiv(size, _BLOCK_ACT))](x, out, size, gelu, _BLOCK_ACT)
    return out


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See `reference.silu_and_mul`."""
    return _gated(x, False)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See `reference.gelu_tanh_and_mul`."""
    return _gated(x, True)


def rotary(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """See `reference.rotary`; ``x`` may be a slice of a wider row."""
    tokens, heads, dim = x.shape
    half = cos_sin.shape[1] // 2
    rest = dim - 2 * half
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pads = [triton.next_power_of_2(heads), triton.next_power_of_2(half), triton.next_power_of_2(rest) if rest else 0]
    if tokens:
        _rotary_kernel[(tokens,)](x, cos_sin, positions, out, x.stride(0), x.stride(1), heads, half, rest, *pads)
    return out


def store_kv_(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """See `reference.store_kv_`; ``key`` and ``value`` may be slices of a wider row."""
    tokens, heads, dim = key.shape
    if tokens:
        _store_kv_kernel[(tokens,)](
            cache, key, value, slots, key.stride(0), key.stride(1), value.stride(0), value.stride(1), cache.stride(0),
            heads, dim, cache.shape[3], triton.next_power_of_2(heads), triton.next_power_of_2(dim),
        )
