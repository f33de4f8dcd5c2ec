"""Norms, gated activations, rotary and the KV write as Triton kernels; names and signatures of `kernels.reference`.

One program handles one token's row, so a result never depends on what else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels import reference
from octavo.kernels.metadata import HeadChange
from octavo.kernels.pdl import chained, release, wait
from octavo.kernels.sampling import WHOLE, VocabPart

_BLOCK_ACT = 1024
_BLOCK_GREEDY = 4096


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, stride_row, stride_head, heads, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    source = x_ptr + (row // heads).to(tl.int64) * stride_row + (row % heads) * stride_head
    weight = tl.load(weight_ptr + offsets, mask, 0.0)
    release(CHAINED)
    wait(CHAINED)
    x = tl.load(source + offsets, mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / SIZE + eps)
    normed = (x * scale).to(weight_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * SIZE + offsets, weight * normed, mask)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * SIZE
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    weight = tl.load(weight_ptr + offsets, mask, 0.0)
    release(CHAINED)
    wait(CHAINED)
    total = tl.load(x_ptr + row + offsets, mask, 0.0) + tl.load(residual_ptr + row + offsets, mask, 0.0)
    tl.store(sum_ptr + row + offsets, total, mask)
    x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / SIZE + eps)
    normed = (x * scale).to(weight_ptr.dtype.element_ty)
    tl.store(out_ptr + row + offsets, weight * normed, mask)


@triton.jit
def gated(gate, GELU: tl.constexpr):
    """The activation of a float32 ``gate``."""
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh(z)) = sigmoid(2 z)
    else:
        gate = gate * tl.sigmoid(gate)
    return gate


@triton.jit
def _gated_kernel(x_ptr, out_ptr, SIZE, GELU: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    release(CHAINED)
    wait(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    gate = tl.load(x_ptr + row * 2 * SIZE + offsets, mask, 0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + offsets, mask, 0.0)
    tl.store(out_ptr + row * SIZE + offsets, gated(gate, GELU).to(up.dtype) * up, mask)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _rotary_kernel(
    x_ptr, table_ptr, positions_ptr, out_ptr, stride_token, stride_head, HEADS, HALF, REST,
    HEADS_PAD: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr,
):  # fmt: skip
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
def _fit(x, to: tl.constexpr):
    """``x`` as the cache holds it; see `reference.store_kv_`."""
    if to == tl.float8e4nv:
        x = x.to(tl.float32)
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    return x.to(to)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _place_heads_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cache_ptr, q_weight_ptr, k_weight_ptr, table_ptr, positions_ptr, slots_ptr,
    stride_token, page_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    HEADS_PAD: tl.constexpr, KV_PAD: tl.constexpr, DIM_PAD: tl.constexpr, HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr, HAS_NORM: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One token. q, k and v are parts of one row; a head is HALF + HALF + rest."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    page = cache_ptr + (slot // PAGE).to(tl.int64) * page_stride + (slot % PAGE) * DIM
    row = table_ptr + tl.load(positions_ptr + token).to(tl.int64) * 2 * HALF
    i = tl.arange(0, HALF_PAD)
    dtype = q_ptr.dtype.element_ty
    cos = tl.load(row + i, i < HALF, 0.0).to(dtype).to(tl.float32)
    sin = tl.load(row + HALF + i, i < HALF, 0.0).to(dtype).to(tl.float32)
    release(CHAINED)
    wait(CHAINED)
    head = tl.arange(0, HEADS_PAD)[:, None]
    source, target = q_ptr + token * stride_token + head * DIM, out_ptr + (token * HEADS + head) * DIM
    _place_head(source, target, head < HEADS, q_weight_ptr, cos, sin, eps, DIM, HALF, HALF_PAD, REST_PAD, HAS_NORM)
    head = tl.arange(0, KV_PAD)[:, None]
    source, target = k_ptr + token * stride_token + head * DIM, page + head * PAGE * DIM
    _place_head(source, target, head < KV_HEADS, k_weight_ptr, cos, sin, eps, DIM, HALF, HALF_PAD, REST_PAD, HAS_NORM)
    d = tl.arange(0, DIM_PAD)[None, :]
    held = (head < KV_HEADS) & (d < DIM)
    v = tl.load(v_ptr + token * stride_token + head * DIM + d, held, 0.0)
    tl.store(target + KV_HEADS * PAGE * DIM + d, _fit(v, cache_ptr.dtype.element_ty), held)


@triton.jit
def _place_head(
    source, target, live, weight_ptr, cos, sin, eps,
    DIM: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """RMS norm and rotation of the heads [rows, 1] that ``source`` points to."""
    i = tl.arange(0, HALF_PAD)[None, :]
    mask = live & (i < HALF)
    first = tl.load(source + i, mask, 0.0).to(tl.float32)
    second = tl.load(source + HALF + i, mask, 0.0).to(tl.float32)
    if REST_PAD > 0:
        j = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        rest = tl.load(source + j, live & (j < DIM), 0.0).to(tl.float32)
    dtype = source.dtype.element_ty
    kept: tl.constexpr = target.dtype.element_ty
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST_PAD > 0:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        if REST_PAD > 0:
            weight = tl.load(weight_ptr + j, j < DIM, 0.0)
            rest = (weight * (rest * scale).to(dtype)).to(tl.float32)
        weight = tl.load(weight_ptr + i, i < HALF, 0.0)
        first = (weight * (first * scale).to(dtype)).to(tl.float32)
        weight = tl.load(weight_ptr + HALF + i, i < HALF, 0.0)
        second = (weight * (second * scale).to(dtype)).to(tl.float32)
    tl.store(target + i, _fit((first * cos[None, :] - second * sin[None, :]).to(dtype), kept), mask)
    tl.store(target + HALF + i, _fit((second * cos[None, :] + first * sin[None, :]).to(dtype), kept), mask)
    if REST_PAD > 0:
        tl.store(target + j, _fit(rest.to(dtype), kept), live & (j < DIM))


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _store_kv_kernel(
    cache_ptr, key_ptr, value_ptr, slots_ptr, key_stride, key_head, value_stride, value_head, page_stride,
    HEADS, DIM, PAGE: tl.constexpr, HEADS_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head, d = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, DIM_PAD)[None, :]
    mask = (head < HEADS) & (d < DIM)
    key = tl.load(key_ptr + token * key_stride + head * key_head + d, mask, 0.0)
    value = tl.load(value_ptr + token * value_stride + head * value_head + d, mask, 0.0)
    page = cache_ptr + (slot // PAGE).to(tl.int64) * page_stride
    target = page + head * PAGE * DIM + (slot % PAGE) * DIM + d
    tl.store(target, _fit(key, cache_ptr.dtype.element_ty), mask)
    tl.store(target + HEADS * PAGE * DIM, _fit(value, cache_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["FIRST"])
def _peaks_kernel(
    logits_ptr, found_ptr, stride, SIZE, FIRST, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr
):
    """The greatest of each block of a row, and the bits of its token's number; NaN counts as infinite."""
    release(CHAINED)
    wait(CHAINED)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + at, at < SIZE, float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    peak, index = tl.max(x, 0, return_indices=True)
    place = found_ptr + row * 2 * BLOCKS + block
    tl.store(place, peak)
    tl.store((place + BLOCKS).to(tl.pointer_type(tl.int32)), FIRST + block * BLOCK + index)


@triton.jit(do_not_specialize=["rows"])
def _greedy_kernel(
    found_ptr, out_ptr, rows, PARTS: tl.constexpr, BLOCKS: tl.constexpr, PAD: tl.constexpr, CHAINED: tl.constexpr
):
    """Of a row's ``PARTS``, each the peaks of ``BLOCKS`` and their tokens."""
    wait(CHAINED)
    row, block = tl.program_id(0), tl.arange(0, PAD)
    start = found_ptr + row * PARTS * 2 * BLOCKS
    peaks = tl.load(start + block // BLOCKS * 2 * BLOCKS + block % BLOCKS, block < PARTS * BLOCKS, float("-inf"))
    peak, winner = tl.max(peaks, 0, return_indices=True)
    finite = tl.abs(peak) < float("inf")
    at = start + winner // BLOCKS * 2 * BLOCKS + BLOCKS + winner % BLOCKS
    token = tl.load(at.to(tl.pointer_type(tl.int32)))
    tl.store(out_ptr + row, tl.where(finite, token, 0))
    tl.store(out_ptr + rows + row, finite.to(tl.int32))


@triton.jit(do_not_specialize=["first"])
def _embed_kernel(
    ids_ptr, weight_ptr, out_ptr, first, rows, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr
):
    release(CHAINED)
    wait(CHAINED)
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token) - first
    held = tl.where((row >= 0) & (row < rows), SIZE, 0)  # of the weight's row
    value = tl.load(weight_ptr + row.to(tl.int64) * SIZE + i, i < held, 0.0)
    tl.store(out_ptr + token * SIZE + i, value, i < SIZE)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `reference.rms_norm`; ``x`` is ``[T, C]`` or ``[T, H, D]`` with a dense last dimension."""
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads = x.shape[1] if x.dim() == 3 else 1
    stride_head = x.stride(1) if x.dim() == 3 else 0
    rows = x.shape[0] * heads
    block = triton.next_power_of_2(size)
    warps = 1 if block <= 512 else 4 if block <= 4096 else 8
    chain = chained(x.device)
    if rows:
        _rms_norm_kernel[(rows,)](
            x, weight, out, x.stride(0), stride_head, heads, eps, size, block, chain, num_warps=warps, launch_pdl=chain
        )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_rms_norm`; both inputs are dense."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    warps = 4 if block <= 4096 else 8
    chain = chained(x.device)
    if len(x):
        _add_rms_norm_kernel[(len(x),)](
            x, residual, weight, out, total, eps, size, block, chain, num_warps=warps, launch_pdl=chain
        )
    return out, total


def _gated(x: torch.Tensor, gelu: bool) -> torch.Tensor:
    size = x.shape[-1] // 2
    out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    chain = chained(x.device)
    if len(x):
        grid = (len(x), triton.cdiv(size, _BLOCK_ACT))
        _gated_kernel[grid](x, out, size, gelu, _BLOCK_ACT, chain, launch_pdl=chain)
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


def place_heads_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    change: HeadChange,
    positions: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """See `metadata.PlaceHeads`; one launch where something is rotated and q, k and v are parts of one row."""
    tokens, heads, dim = q.shape
    if change.cos_sin is None or not _of_one_row(q, k, v):
        return _place_heads_apart(q, k, v, change, positions, cache, slots)
    half, kv_heads = change.cos_sin.shape[1] // 2, k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    pads = [triton.next_power_of_2(n) if n else 0 for n in (heads, kv_heads, dim, half, dim - 2 * half)]
    chain = chained(q.device)
    if tokens:
        _place_heads_kernel[(tokens,)](
            q, k, v, out, cache, change.q_norm, change.k_norm, change.cos_sin, positions, slots,
            q.stride(0), cache.stride(0), change.eps, heads, kv_heads, dim, half, cache.shape[3], *pads,
            change.q_norm is not None, chain, num_warps=4, launch_pdl=chain,
        )  # fmt: skip
    return out


def _of_one_row(*parts: torch.Tensor) -> bool:
    """Whether all have dense heads and the same distance from token to token; of a single token that says nothing."""
    dense = all(x.stride(1) == x.shape[2] and x.stride(2) == 1 for x in parts)
    return dense and (len(parts[0]) == 1 or len({x.stride(0) for x in parts}) == 1)


def greedy(logits: torch.Tensor, part: VocabPart = WHOLE) -> torch.Tensor:
    """See `sampling.greedy`."""
    rows, size = logits.shape
    blocks = triton.cdiv(size, _BLOCK_GREEDY)
    found = torch.empty((rows, 2 * blocks), dtype=torch.float32, device=logits.device)
    out = torch.empty((2, rows), dtype=torch.int32, device=logits.device)
    if rows:
        chain = chained(logits.device)
        _peaks_kernel[(rows, blocks)](
            logits, found, logits.stride(0), size, part.first, blocks, _BLOCK_GREEDY, chain, launch_pdl=chain
        )
        found = part.gather(found)
        parts = found.shape[1] // (2 * blocks)
        pad = triton.next_power_of_2(parts * blocks)
        _greedy_kernel[(rows,)](found, out, rows, parts, blocks, pad, chain, num_warps=1, launch_pdl=chain)
    return out


def embed(ids: torch.Tensor, weight: torch.Tensor, first: int | None = None) -> torch.Tensor:
    """See `reference.embed`."""
    size = weight.shape[1]
    out = torch.empty((len(ids), size), dtype=weight.dtype, device=weight.device)
    if len(ids):
        chain, block = chained(weight.device), triton.next_power_of_2(size)
        _embed_kernel[(len(ids),)](ids, weight, out, first or 0, len(weight), size, block, chain, launch_pdl=chain)
    return out


def store_kv_(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """See `reference.store_kv_`; ``key`` and ``value`` may be slices of a wider row."""
    tokens, heads, dim = key.shape
    if tokens:
        _store_kv_kernel[(tokens,)](
            cache,
            key,
            value,
            slots,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            cache.stride(0),
            heads,
            dim,
            cache.shape[3],
            triton.next_power_of_2(heads),
            triton.next_power_of_2(dim),
        )


_place_heads_apart = reference.place_heads_from(rms_norm, rotary, store_kv_)
