"""Attention over pages in Triton: items with one query split their keys over programs, others run in query blocks.

All query heads of a KV head are rows of one product, so a tile of K and V is read once for the group. Scores and the
running softmax are float32, in powers of two. Launches depend on the batch's shape alone, never on lengths, which are
read on the device: a captured graph stays right as sequences grow. Where only the device knows which items have one
query, both kernels look at all and leave each other's alone. Numbers that change from step to step are not specialised
on, so that no request waits for a compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from octavo.kernels.metadata import AttentionMetadata
from octavo.kernels.pdl import chained, release, wait

_MIN_ROWS = 16  # least rows of a tensor-core product
_MAX_SPLITS = 32
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: ``tile`` keys at once, ``rows`` of queries times heads of a group (prefill).

    ``registers`` a thread at most: where they fit, two programs on a multiprocessor hide each other's softmax.
    """

    tile: int
    warps: int
    stages: int
    rows: int = _MIN_ROWS
    registers: int | None = None


# By padded head size; measured by bench/kernels_gpu.py, see docs/performance-log.md. Decode splits until the card has
# ``SPLIT_BELOW`` programs a multiprocessor.
DECODE = {
    16: Launch(64, 2, 2),
    32: Launch(64, 2, 2),
    64: Launch(128, 4, 2),
    128: Launch(32, 2, 4),
    256: Launch(32, 4, 2),
}
PREFILL = {
    16: Launch(64, 8, 2, 128),
    32: Launch(64, 8, 2, 128),
    64: Launch(64, 4, 2, 64, 128),
    128: Launch(64, 8, 2, 128, 128),
    256: Launch(32, 4, 2, 64),
}
# float32 products take many times the registers and the shared memory.
WIDE = Launch(32, 4, 1, 32)
SPLIT_BELOW = 2


@triton.jit
def _place(table, keys, last, page_stride, DIM: tl.constexpr, PAGE: tl.constexpr):
    """Offsets [keys] of the rows of one head's K; keys after ``last`` are anywhere in the cache."""
    page = tl.load(table + keys // PAGE, keys <= last, 0).to(tl.int64)
    return page * page_stride + (keys % PAGE) * DIM


@triton.jit
def _attend(
    acc, total, top, q, head_ptr, table, begin, end, last, positions, scale, softcap, window, page_stride, kv_stride,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Takes the keys ``begin`` to ``end`` into the running softmax (acc [rows, d], total and top [rows], base 2).

    Not ``MASKED``: every row sees all of them. Pages are looked up a tile ahead, so that the loads of K and V wait for
    nothing and can be started several tiles early.
    """
    factor = _LOG2E if HAS_CAP else scale * _LOG2E  # of the scores, in the exponent
    d = tl.arange(0, DIM_PAD)
    keys = begin + tl.arange(0, TILE)
    offsets = _place(table, keys, last, page_stride, DIM, PAGE)
    for _ in range(begin, end, TILE):
        at = head_ptr + offsets[:, None] + d[None, :]
        if MASKED:
            held = (keys <= last)[:, None] & (d < DIM)[None, :]
            k = tl.load(at, held, 0.0)
            v = tl.load(at + kv_stride, held, 0.0)
        elif DIM == DIM_PAD:
            k = tl.load(at)
            v = tl.load(at + kv_stride)
        else:
            k = tl.load(at, (d < DIM)[None, :], 0.0)
            v = tl.load(at + kv_stride, (d < DIM)[None, :], 0.0)
        k, v = k.to(q.dtype), v.to(q.dtype)  # of 8 bits in the cache, if it is told so
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_CAP:
            s = softcap * (2.0 * tl.sigmoid(2.0 * (s * scale) / softcap) - 1.0)  # tanh
        if MASKED:
            seen = (keys[None, :] <= positions[:, None]) & (keys <= last)[None, :]
            if HAS_WINDOW:
                seen &= keys[None, :] > positions[:, None] - window
            s = tl.where(seen, s, -1.0e30)
        higher = tl.maximum(top, tl.max(s, 1) * factor)
        p = tl.exp2(s * factor - higher[:, None])
        if MASKED:
            p = tl.where(s > -1.0e29, p, 0.0)  # a row may have seen nothing yet
        decay = tl.exp2(top - higher)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(p, 1)
        top = higher
        keys += TILE
        offsets = _place(table, keys, last, page_stride, DIM, PAGE)
    return acc, total, top


_VARYING_POINTERS = ["query_start_ptr", "seq_lens_ptr", "rows_ptr"]  # views into one buffer, at any offset


@triton.jit(
    do_not_specialize=["window", "first_item", "num_items", "table_stride"],
    do_not_specialize_on_alignment=_VARYING_POINTERS,
)
def _prefill_kernel(
    q_ptr, cache_ptr, out_ptr, query_start_ptr, seq_lens_ptr, rows_ptr, table_ptr, sinks_ptr,
    scale, softcap, window, first_item, num_items, q_stride, q_head, table_stride, page_stride, kv_stride, head_stride,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PICK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A block of the queries of one item; with ``PICK`` those of one query are left to `_decode_kernel`."""
    release(CHAINED)
    wait(CHAINED)
    # The last blocks of an item have most keys: they go first.
    block, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    # Item i owns blocks query_start[i] // QUERIES + i on, at least as many as it needs: the last i whose first is not
    # after this block.
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
    if (first >= count) | (PICK & (count == 1)):
        return
    computed = tl.load(seq_lens_ptr + first_item + low) - count
    table = table_ptr + tl.load(rows_ptr + first_item + low).to(tl.int64) * table_stride
    head_ptr = cache_ptr + kv_head * head_stride
    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    live_row = (row < QUERIES * GROUP) & (query < count)
    positions = computed + query
    d = tl.arange(0, DIM_PAD)
    at = (start + query).to(tl.int64)
    mask_q = live_row[:, None] & (d < DIM)[None, :]
    q = tl.load(q_ptr + at[:, None] * q_stride + head[:, None] * q_head + d[None, :], mask_q, 0.0)

    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks_ptr + head, live_row, 0.0).to(tl.float32) * _LOG2E
        total += 1.0
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    last = computed + tl.minimum(first + QUERIES, count) - 1
    if HAS_WINDOW:
        whole = tl.maximum(computed + first - window + 1, 0) // TILE * TILE
    else:
        whole = (computed + first + 1) // TILE * TILE  # keys before it are seen by every row
        acc, total, top = _attend(
            acc, total, top, q, head_ptr, table, 0, whole, last, positions, scale, softcap, window, page_stride,
            kv_stride, DIM, DIM_PAD, PAGE, TILE, False, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, head_ptr, table, whole, last + 1, last, positions, scale, softcap, window, page_stride,
        kv_stride, DIM, DIM_PAD, PAGE, TILE, True, HAS_WINDOW, HAS_CAP,
    )  # fmt: skip
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (at[:, None] * HEADS + head[:, None]) * DIM + d[None, :], out, mask_q)


@triton.jit(do_not_specialize=["window", "table_stride", "splits"], do_not_specialize_on_alignment=_VARYING_POINTERS)
def _decode_kernel(
    q_ptr, cache_ptr, out_ptr, lse_ptr, query_start_ptr, seq_lens_ptr, rows_ptr, table_ptr, sinks_ptr,
    scale, softcap, window, q_stride, q_head, table_stride, page_stride, kv_stride, head_stride, splits,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PICK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One of ``splits`` parts of an item's keys: float32 outputs [item, head, split] and their logsumexp (base 2) for
    `_merge_kernel`; with one split the answer itself. Item i has query i, or with ``PICK``, if it has one only, the
    one that ``query_start_ptr`` says."""
    item, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + item)
    table = table_ptr + tl.load(rows_ptr + item).to(tl.int64) * table_stride
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    live_row = row < GROUP
    d = tl.arange(0, DIM_PAD)
    mask_q = live_row[:, None] & (d < DIM)[None, :]
    release(CHAINED)
    wait(CHAINED)
    query = item
    if PICK:
        query = tl.load(query_start_ptr + item)
        if tl.load(query_start_ptr + item + 1) - query != 1:
            return
    q = tl.load(q_ptr + query.to(tl.int64) * q_stride + head[:, None] * q_head + d[None, :], mask_q, 0.0)
    positions = tl.zeros([ROWS], tl.int32) + seq_len - 1

    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(seq_len - window, 0) // TILE * TILE
    share = tl.cdiv(tl.cdiv(seq_len - begin, TILE), splits) * TILE
    begin += split * share
    last = tl.minimum(begin + share, seq_len) - 1
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS and not SPLIT:
        top = tl.load(sinks_ptr + head, live_row, 0.0).to(tl.float32) * _LOG2E
        total += 1.0
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    acc, total, top = _attend(
        acc, total, top, q, cache_ptr + kv_head * head_stride, table, begin, last + 1, last, positions, scale, softcap,
        window, page_stride, kv_stride, DIM, DIM_PAD, PAGE, TILE, True, HAS_WINDOW, HAS_CAP,
    )  # fmt: skip
    empty = total == 0.0
    place = query * HEADS + head
    if SPLIT:
        place = (item * HEADS + head) * splits + split
        tl.store(lse_ptr + place, tl.where(empty, -1.0e30, top + tl.log2(tl.where(empty, 1.0, total))), live_row)
    out = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(out_ptr + place[:, None].to(tl.int64) * DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask_q)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["query_start_ptr"])
def _merge_kernel(
    acc_ptr, lse_ptr, out_ptr, query_start_ptr, sinks_ptr, splits, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, MOST: tl.constexpr, PICK: tl.constexpr, HAS_SINKS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one head: their outputs weighted by 2 to the lse. For ``PICK`` see `_decode_kernel`."""
    item, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = (item * HEADS + head) * splits
    split, d = tl.arange(0, MOST), tl.arange(0, DIM_PAD)
    release(CHAINED)
    wait(CHAINED)
    query = item
    if PICK:
        query = tl.load(query_start_ptr + item).to(tl.int64)
        if tl.load(query_start_ptr + item + 1) - query != 1:
            return
    lse = tl.load(lse_ptr + place + split, split < splits, -1.0e30)
    top = tl.max(lse)
    sink = 0.0
    if HAS_SINKS:
        logit = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        top = tl.maximum(top, logit)
        sink = tl.exp2(logit - top)
    weight = tl.exp2(lse - top)
    acc = tl.load(
        acc_ptr + (place + split)[:, None] * DIM + d[None, :], (split < splits)[:, None] & (d < DIM)[None, :], 0.0
    )
    out = tl.sum(acc * weight[:, None], 0) / (tl.sum(weight) + sink)
    tl.store(out_ptr + (query * HEADS + head) * DIM + d, out.to(out_ptr.dtype.element_ty), d < DIM)


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
    if meta.num_decodes != 0:
        _decode(query, cache, meta, numbers, window is not None, softcap is not None, sinks, out)
    if meta.num_decodes != len(meta.rows):
        _prefill(query, cache, meta, numbers, window is not None, softcap is not None, sinks, out)
    return out


def _decode(query, cache, meta, numbers, has_window, has_cap, sinks, out):
    pick, heads, dim = meta.num_decodes is None, query.shape[1], query.shape[2]
    items = len(meta.rows) if pick else meta.num_decodes
    kv_heads, page = cache.shape[2], cache.shape[3]
    splits = num_splits(items * kv_heads, _processors(query.device))
    acc = lse = out
    if splits > 1:
        acc = torch.empty(items, heads, splits, dim, dtype=torch.float32, device=query.device)
        lse = torch.empty(items, heads, splits, dtype=torch.float32, device=query.device)
    group, pad = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    chain, launch = chained(query.device), WIDE if query.dtype == torch.float32 else DECODE[pad]
    _decode_kernel[(items, kv_heads, splits)](
        query, cache, acc, lse, meta.query_start, meta.seq_lens, meta.rows, meta.block_table, sinks, *numbers,
        query.stride(0), query.stride(1), meta.block_table.stride(0), *cache.stride()[:3], splits,
        group, heads, dim, pad, page, max(_MIN_ROWS, triton.next_power_of_2(group)), launch.tile, splits > 1,
        pick, has_window, has_cap, sinks is not None, chain,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers, launch_pdl=chain,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(items, heads)](
            acc, lse, out, meta.query_start, sinks, splits, heads, dim, pad, _MAX_SPLITS, pick, sinks is not None,
            chain, num_warps=1, launch_pdl=chain,
        )  # fmt: skip


def _prefill(query, cache, meta, numbers, has_window, has_cap, sinks, out):
    first, heads, dim = meta.num_decodes or 0, query.shape[1], query.shape[2]
    items, pick = len(meta.rows) - first, meta.num_decodes is None
    kv_heads, page = cache.shape[2], cache.shape[3]
    group, pad = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    chain, launch = chained(query.device), WIDE if query.dtype == torch.float32 else PREFILL[pad]
    rows = max(launch.rows, triton.next_power_of_2(group))
    queries = rows // group
    blocks = (len(query) - first) // queries + items
    _prefill_kernel[(blocks, kv_heads)](
        query, cache, out, meta.query_start, meta.seq_lens, meta.rows, meta.block_table, sinks, *numbers,
        first, items, query.stride(0), query.stride(1), meta.block_table.stride(0), *cache.stride()[:3],
        group, heads, dim, pad, page, queries, rows, launch.tile, pick, has_window, has_cap, sinks is not None, chain,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers, launch_pdl=chain,
    )  # fmt: skip


def num_splits(programs: int, processors: int) -> int:
    """Into how many parts to split the keys of each of ``programs`` (item, KV head) pairs: a power of two."""
    splits = 1
    while splits < _MAX_SPLITS and programs * splits < processors * SPLIT_BELOW:
        splits *= 2
    return splits


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
