"""Attention over pages in Triton: items with one query split their keys over programs, others run in query blocks.

All query heads of a KV head are rows of one product, so a tile of K and V is read once for the group. Scores and the
running softmax are float32. Launches depend on the batch's shape alone, never on lengths, which are read on the device:
a captured graph stays right as sequences grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from octavo.kernels.metadata import AttentionMetadata

_MIN_ROWS = 16  # least rows of a tensor-core product
_MAX_SPLITS = 32


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: ``tile`` keys at once, ``rows`` of queries times heads of a group (prefill)."""

    tile: int
    warps: int
    stages: int
    rows: int = _MIN_ROWS


# By padded head size; measured by bench/kernels_gpu.py, see docs/performance-log.md. Decode splits until the card has
# ``SPLIT_BELOW`` programs a multiprocessor.
DECODE = {16: Launch(64, 4, 2), 32: Launch(64, 4, 2), 64: Launch(64, 4, 2), 128: Launch(64, 4, 2), 256: Launch(32, 4, 2)}
PREFILL = {
    16: Launch(64, 8, 2, 128),
    32: Launch(64, 8, 2, 128),
    64: Launch(64, 8, 2, 128),
    128: Launch(64, 8, 2, 128),
    256: Launch(32, 4, 2, 64),
}
SPLIT_BELOW = 2


@triton.jit
def _scores(q, k, keys, positions, scale, softcap, window, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr):
    """Masked scores [rows, keys] of queries at ``positions`` [rows]."""
    s = tl.dot(q, k, input_precision="ieee") * scale
    if HAS_CAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
    seen = keys[None, :] <= positions[:, None]
    if HAS_WINDOW:
        seen &= keys[None, :] > positions[:, None] - window
    return tl.where(seen, s, -1.0e30)


@triton.jit
def _tile(cache_ptr, table, keys, last, page_stride, head_offset, d, DIM: tl.constexpr, PAGE: tl.constexpr):
    """Element offsets [keys] of the rows of K for ``keys``, and the mask of those that exist."""
    live = keys <= last
    page = tl.load(table + keys // PAGE, live, 0).to(tl.int64)
    return page * page_stride + head_offset + (keys % PAGE) * DIM, live


@triton.jit
def _prefill_kernel(
    q_ptr, cache_ptr, out_ptr, query_start_ptr, seq_lens_ptr, rows_ptr, table_ptr, sinks_ptr,
    scale, softcap, window, first_item, num_items, q_stride, q_head, table_stride, page_stride, kv_stride, head_stride,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):
    block, kv_head = tl.program_id(0), tl.program_id(1)
    # Item i owns blocks query_start[i] // QUERIES + i on, at least as many as it needs: the last i whose first is <= block.
    origin = tl.load(query_start_ptr + first_item)
    low, high = 0, num_items - 1
    while low < high:
        middle = (low + high + 1) // 2
        if (tl.load(query_start_ptr + first_item + middle) - origin) // QUERIES + middle <= block:
            low = middle
        else:
            high = middle - 1
    start = tl.load(query_start_ptr + first_item + low)
    count = tl.load(query_start_ptr + first_item + low + 1) - start
    first = (block - ((start - origin) // QUERIES + low)) * QUERIES
    if first >= count:
        return
    seq_len = tl.load(seq_lens_ptr + first_item + low)
    table = table_ptr + tl.load(rows_ptr + first_item + low).to(tl.int64) * table_stride
    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    live_row = (row < QUERIES * GROUP) & (query < count)
    positions = seq_len - count + query
    d = tl.arange(0, DIM_PAD)
    at = (start + query).to(tl.int64)
    mask_q = live_row[:, None] & (d < DIM)[None, :]
    q = tl.load(q_ptr + at[:, None] * q_stride + head[:, None] * q_head + d[None, :], mask_q, 0.0)

    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks_ptr + head, live_row, 0.0).to(tl.float32)
        total += 1.0
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    last = seq_len - count + tl.minimum(first + QUERIES, count) - 1
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(seq_len - count + first - window + 1, 0) // TILE * TILE
    for at_key in range(begin, last + 1, TILE):
        keys = at_key + tl.arange(0, TILE)
        offsets, live = _tile(cache_ptr, table, keys, last, page_stride, kv_head * head_stride, d, DIM, PAGE)
        k = tl.load(cache_ptr + offsets[None, :] + d[:, None], live[None, :] & (d < DIM)[:, None], 0.0)
        s = _scores(q, k, keys, positions, scale, softcap, window, HAS_WINDOW, HAS_CAP)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.where(s > -1.0e29, tl.exp(s - higher[:, None]), 0.0)
        decay = tl.exp(top - higher)
        v = tl.load(cache_ptr + kv_stride + offsets[:, None] + d[None, :], live[:, None] & (d < DIM)[None, :], 0.0)
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(p, 1)
        top = higher
    out = acc / total[:, None]
    tl.store(out_ptr + (at[:, None] * HEADS + head[:, None]) * DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask_q)


@triton.jit
def _decode_kernel(
    q_ptr, cache_ptr, acc_ptr, lse_ptr, seq_lens_ptr, rows_ptr, table_ptr,
    scale, softcap, window, q_stride, q_head, table_stride, page_stride, kv_stride, head_stride,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):
    item, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + item)
    table = table_ptr + tl.load(rows_ptr + item).to(tl.int64) * table_stride
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    live_row = row < GROUP
    d = tl.arange(0, DIM_PAD)
    mask_q = live_row[:, None] & (d < DIM)[None, :]
    q = tl.load(q_ptr + item.to(tl.int64) * q_stride + head[:, None] * q_head + d[None, :], mask_q, 0.0)
    positions = tl.zeros([ROWS], tl.int32) + seq_len - 1

    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(seq_len - window, 0) // TILE * TILE
    share = tl.cdiv(tl.cdiv(seq_len - begin, TILE), SPLITS) * TILE
    begin += split * share
    last = tl.minimum(begin + share, seq_len) - 1
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for at_key in range(begin, last + 1, TILE):
        keys = at_key + tl.arange(0, TILE)
        offsets, live = _tile(cache_ptr, table, keys, last, page_stride, kv_head * head_stride, d, DIM, PAGE)
        k = tl.load(cache_ptr + offsets[None, :] + d[:, None], live[None, :] & (d < DIM)[:, None], 0.0)
        v = tl.load(cache_ptr + kv_stride + offsets[:, None] + d[None, :], live[:, None] & (d < DIM)[None, :], 0.0)
        s = _scores(q, k, keys, positions, scale, softcap, window, HAS_WINDOW, HAS_CAP)
        s = tl.where(live[None, :], s, -1.0e30)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.where(s > -1.0e29, tl.exp(s - higher[:, None]), 0.0)
        decay = tl.exp(top - higher)
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(p, 1)
        top = higher
    place = (item * HEADS + head) * SPLITS + split
    empty = total == 0.0
    lse = tl.where(empty, -1.0e30, top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + place, lse, live_row)
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(acc_ptr + place[:, None].to(tl.int64) * DIM + d[None, :], acc, mask_q)


@triton.jit
def _merge_kernel(
    acc_ptr, lse_ptr, out_ptr, sinks_ptr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr,
):
    """Joins the splits of one head: their outputs weighted by exp(lse)."""
    item, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = (item * HEADS + head) * SPLITS
    split, d = tl.arange(0, SPLITS), tl.arange(0, DIM_PAD)
    lse = tl.load(lse_ptr + place + split)
    top = tl.max(lse)
    sink = 0.0
    if HAS_SINKS:
        logit = tl.load(sinks_ptr + head).to(tl.float32)
        top = tl.maximum(top, logit)
        sink = tl.exp(logit - top)
    weight = tl.exp(lse - top)
    acc = tl.load(acc_ptr + (place + split)[:, None] * DIM + d[None, :], (d < DIM)[None, :], 0.0)
    out = tl.sum(acc * weight[:, None], 0) / (tl.sum(weight) + sink)
    tl.store(out_ptr + (item * HEADS + head) * DIM + d, out.to(out_ptr.dtype.element_ty), d < DIM)


def attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.attention`."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    numbers = (scale, softcap or 0.0, window or 0)
    if meta.num_decodes:
        _decode(query, cache, meta, numbers, window is not None, softcap is not None, sinks, out)
    if meta.num_decodes < len(meta.rows):
        _prefill(query, cache, meta, numbers, window is not None, softcap is not None, sinks, out)
    return out


def _decode(query, cache, meta, numbers, has_window, has_cap, sinks, out):
    items, heads, dim = meta.num_decodes, query.shape[1], query.shape[2]
    kv_heads, page = cache.shape[2], cache.shape[3]
    splits = num_splits(items * kv_heads, _processors(query.device))
    acc = torch.empty(items, heads, splits, dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(items, heads, splits, dtype=torch.float32, device=query.device)
    group, pad = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    launch = DECODE[pad]
    _decode_kernel[(items, kv_heads, splits)](
        query, cache, acc, lse, meta.seq_lens, meta.rows, meta.block_table, *numbers, query.stride(0), query.stride(1),
        meta.block_table.stride(0), *cache.stride()[:3], group, heads, dim, pad, page,
        max(launch.rows, triton.next_power_of_2(group)), launch.tile, splits, has_window, has_cap,
        num_warps=launch.warps, num_stages=launch.stages,
    )
    _merge_kernel[(items, heads)](acc, lse, out, sinks, heads, dim, pad, splits, sinks is not None, num_warps=1)


def _prefill(query, cache, meta, numbers, has_window, has_cap, sinks, out):
    items, heads, dim = len(meta.rows) - meta.num_decodes, query.shape[1], query.shape[2]
    kv_heads, page = cache.shape[2], cache.shape[3]
    group, pad = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    launch = PREFILL[pad]
    rows = max(launch.rows, triton.next_power_of_2(group))
    queries = rows // group
    blocks = (len(query) - meta.num_decodes) // queries + items
    _prefill_kernel[(blocks, kv_heads)](
        query, cache, out, meta.query_start, meta.seq_lens, meta.rows, meta.block_table, sinks, *numbers,
        meta.num_decodes, items, query.stride(0), query.stride(1), meta.block_table.stride(0), *cache.stride()[:3],
        group, heads, dim, pad, page, queries, rows, launch.tile, has_window, has_cap, sinks is not None,
        num_warps=launch.warps, num_stages=launch.stages,
    )


def num_splits(programs: int, processors: int) -> int:
    """Into how many parts to split the keys of each of ``programs`` (item, KV head) pairs: a power of two."""
    splits = 1
    while splits < _MAX_SPLITS and programs * splits < processors * SPLIT_BELOW:
        splits *= 2
    return splits


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
