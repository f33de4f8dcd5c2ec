"""The table of operators, each in plain torch: the meaning of every kernel, the fallback, and the tests' oracle.

A faster kernel has the same name and signature (see `select`). Shapes: T tokens of the flat batch, H query heads,
KH key/value heads, D head size, C hidden size. Functions named ``*_`` write in place.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from octavo.kernels.metadata import AttentionMetadata, Groups, HeadChange, PlaceHeads

FLOAT8, FLOAT8_MAX = torch.float8_e4m3fn, 448.0


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x[T, in] @ weight[out, in].T + bias[out]``."""
    return F.linear(x, weight, bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension; the statistics are in float32, the product in the weight's type,
    which is x's or float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * wide.to(weight.dtype)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual + x`` and its `rms_norm`, as (normed, sum)."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def embed(ids: torch.Tensor, weight: torch.Tensor, first: int | None = None) -> torch.Tensor:
    """``weight[ids]`` for ``ids[T]`` and ``weight[V, C]``: ``[T, C]``.

    If the weight is the part of a vocabulary from ``first`` on, zeros stand for the ids that are not in it.
    """
    if first is None:
        return F.embedding(ids, weight)
    local = ids - first
    own = (local >= 0) & (local < len(weight))
    return F.embedding(local.clamp(0, len(weight) - 1), weight).masked_fill_(~own.unsqueeze(-1), 0)


def take_in_(
    token_ids: torch.Tensor,
    fed_rows: torch.Tensor,
    last_token: torch.Tensor,
    table: torch.Tensor,
    table_at: torch.Tensor,
    table_values: torch.Tensor,
) -> None:
    """What a step takes in before its model: ``table[table_at[P]] = table_values[P]``, and ``token_ids[T]`` becomes
    ``last_token[fed_rows[T]]`` where that row is not -1. All are int32."""
    if len(table_at):
        table[table_at] = table_values
    torch.where(fed_rows < 0, token_ids, last_token[fed_rows], out=token_ids)


def put_(target: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
    """``target[at[N]] = values[N]``, all int32; of places that are equal any may win."""
    target[at] = values


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[:, :I]) * x[:, I:]`` for ``x[T, 2 I]``."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """As `silu_and_mul` with the tanh approximation of GELU."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """`gelu_tanh_and_mul` or `silu_and_mul` of a `linear`: ``weight[2 I, in]`` has the gates first."""
    return (gelu_tanh_and_mul if gelu else silu_and_mul)(linear(x, weight, bias))


def group(experts: torch.Tensor, count: int) -> Groups:
    """The groups of ``experts[T, K]``, of which there are ``count``; those of one expert are in the order of tokens."""
    known = torch.where((experts >= 0) & (experts < count), experts, count).flatten()
    by_expert, order = known.sort(stable=True)
    starts = torch.searchsorted(by_expert, torch.arange(count + 1, device=experts.device), out_int32=True)
    places = torch.empty_like(order, dtype=torch.int32)
    places[order] = torch.arange(len(order), dtype=torch.int32, device=experts.device)
    places = torch.where(known < count, places, -1).view(experts.shape)
    return Groups((order // experts.shape[1]).int(), places, starts)


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: Groups, *, by_token: bool
) -> torch.Tensor:
    """A `linear` of each sorted row with its expert's ``weight[E, out, in]`` and ``bias[E, out]``: ``[T K, out]``.

    ``x`` is sorted, ``[T K, in]``; or it is ``by_token``, ``[T, in]``. Rows without an expert are left undefined.
    """
    if by_token:
        x = x[groups.rows]
    out = x.new_zeros(x.shape[0], weight.shape[1])
    starts = groups.starts.tolist()
    for expert, (first, last) in enumerate(pairwise(starts)):
        if first < last:
            out[first:last] = linear(x[first:last], weight[expert], None if bias is None else bias[expert])
    return out


def combine(x: torch.Tensor, weights: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Of each token the sum of its sorted rows of ``x[T K, C]`` times ``weights[T, K]``, in float32: ``[T, C]``."""
    found = x[groups.places.clamp(min=0)].float() * weights.float().unsqueeze(-1)
    return found.masked_fill((groups.places < 0).unsqueeze(-1), 0).sum(1).to(x.dtype)


def rotary(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotates the first R dimensions of each head of ``x[T, H, D]``, half-split as in Llama.

    ``cos_sin[max_len, R]`` holds R/2 cosines then R/2 sines of each position, in float32; ``positions[T]`` int32.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).to(x.dtype).chunk(2, dim=-1)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def store_kv_(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes ``key`` and ``value [T, KH, D]`` to ``slots[T]`` of one layer's cache ``[pages, 2, KH, page_size, D]``.

    A cache of 8-bit floats takes them unscaled; what it cannot hold becomes its greatest number, NaN stays.
    """
    page_size = cache.shape[3]
    page, offset = torch.div(slots, page_size, rounding_mode="floor").long(), (slots % page_size).long()
    if cache.dtype is FLOAT8:
        key, value = (x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).view(torch.uint8) for x in (key, value))
        cache = cache.view(torch.uint8)  # torch has no indexing of 8-bit floats on every device
    cache[page, 0, :, offset] = key
    cache[page, 1, :, offset] = value


def place_heads_from(
    norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    store_: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> PlaceHeads:
    """`place_heads_` composed of three operators."""

    def place_heads_(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        change: HeadChange,
        positions: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        if change.q_norm is not None and change.k_norm is not None:
            q, k = norm(q, change.q_norm, change.eps), norm(k, change.k_norm, change.eps)
        if change.cos_sin is not None:
            q, k = rotate(q, change.cos_sin, positions), rotate(k, change.cos_sin, positions)
        store_(cache, k, v, slots)
        return q

    return place_heads_


place_heads_ = place_heads_from(rms_norm, rotary, store_kv_)


def attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of ``query[T, H, D]`` over the pages of one layer's cache, the new tokens already stored.

    ``window``: a query sees that many tokens, itself included. ``softcap``: scores become ``cap * tanh(score / cap)``.
    ``sinks[H]``: one more logit in each head's softmax, without a value. Returns ``[T, H, D]``.
    """
    out = torch.empty_like(query)
    starts, lens, rows = meta.query_start.tolist(), meta.seq_lens.tolist(), meta.rows.tolist()
    page_size = cache.shape[3]
    for b, (row, length) in enumerate(zip(rows, lens, strict=True)):
        pages = meta.block_table[row, : -(-length // page_size)].long()
        # [P, 2, KH, ps, D] -> [2, KH, P*ps, D]
        kv = _taken(cache, pages).to(query.dtype).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        q = query[starts[b] : starts[b + 1]]
        out[starts[b] : starts[b + 1]] = _attend(q, kv[0], kv[1], scale, window, softcap, sinks)
    return out


def _taken(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """``cache[pages]``, of 8-bit floats too."""
    return cache.view(torch.uint8)[pages].view(FLOAT8) if cache.dtype is FLOAT8 else cache[pages]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence: ``q[Q, H, D]`` are the last Q of the L tokens of ``k, v [KH, L, D]``."""
    count, heads, dim = q.shape
    kv_heads, length, _ = k.shape
    group = heads // kv_heads
    # Query heads that share a KV head become rows of one product: [KH, group * Q, D].
    folded = q.view(count, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * count, dim)
    scores = torch.matmul(folded, k.transpose(1, 2)).float().view(kv_heads, group, count, length) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(length - count, length, device=q.device).unsqueeze(1)
    key_position = torch.arange(length, device=q.device).unsqueeze(0)
    hidden = key_position > position
    if window is not None:
        hidden |= key_position <= position - window
    scores.masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(kv_heads, group, 1, 1).expand(-1, -1, count, 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    mixed = torch.matmul(weights.to(v.dtype).view(kv_heads, group * count, length), v)
    return mixed.view(kv_heads, group, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)
