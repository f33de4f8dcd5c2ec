"""The operators of `kernels.reference` on the C++ extension, for bfloat16 and float32.

The extension sees addresses only, so every function here checks types, layout and sizes first; whatever the extension
does not take goes to the reference. Indices inside tensors (slots, pages, positions) are checked in C++: IndexError.
"""

from __future__ import annotations

import torch

from octavo import _cpu
from octavo.kernels import reference
from octavo.kernels.metadata import AttentionMetadata

_TYPES = frozenset((torch.bfloat16, torch.float32))
MAX_HEAD_DIM = 256
PANEL = 16

_cpu.set_threads(torch.get_num_threads())


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a matrix over its last dimension, which must be dense for the kernels; copies only if it has to."""
    if x.dim() != 2:
        return x.reshape(-1, x.shape[-1]) if x.is_contiguous() else x.contiguous().view(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `reference.rms_norm`."""
    cols = x.shape[-1]
    if x.dtype not in _TYPES or weight.dtype is not x.dtype or weight.shape != (cols,) or not weight.is_contiguous():
        return reference.rms_norm(x, weight, eps)
    flat = _rows_of(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    _cpu.norm(
        x.dtype is torch.bfloat16,
        flat.data_ptr(),
        0,
        weight.data_ptr(),
        out.data_ptr(),
        0,
        flat.shape[0],
        cols,
        flat.stride(0),
        0,
        eps,
    )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.add_rms_norm`."""
    cols = x.shape[-1]
    same = x.dtype is residual.dtype is weight.dtype and x.shape == residual.shape and weight.shape == (cols,)
    if x.dtype not in _TYPES or not same or not weight.is_contiguous():
        return reference.add_rms_norm(x, residual, weight, eps)
    flat, other = _rows_of(x), _rows_of(residual)
    out, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    _cpu.norm(
        x.dtype is torch.bfloat16,
        flat.data_ptr(),
        other.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        flat.shape[0],
        cols,
        flat.stride(0),
        other.stride(0),
        eps,
    )
    return out, total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See `reference.silu_and_mul`."""
    if x.dtype not in _TYPES or x.shape[-1] % 2:
        return reference.silu_and_mul(x)
    return _gate(x, silu=True)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See `reference.gelu_tanh_and_mul`."""
    if x.dtype not in _TYPES or x.shape[-1] % 2:
        return reference.gelu_tanh_and_mul(x)
    return _gate(x, silu=False)


def _gate(x: torch.Tensor, silu: bool) -> torch.Tensor:
    cols = x.shape[-1] // 2
    flat = _rows_of(x)
    out = torch.empty((*x.shape[:-1], cols), dtype=x.dtype)
    _cpu.gate(x.dtype is torch.bfloat16, silu, flat.data_ptr(), out.data_ptr(), flat.shape[0], cols, flat.stride(0))
    return out


def rotary(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """See `reference.rotary`. Raises IndexError if a position is outside of ``cos_sin``."""
    tokens, heads, dim = x.shape
    max_len, rotated = cos_sin.shape
    table = cos_sin.dtype is torch.float32 and cos_sin.is_contiguous() and rotated <= dim and rotated % 2 == 0
    if x.dtype not in _TYPES or not table or positions.shape != (tokens,):
        return reference.rotary(x, cos_sin, positions)
    if x.stride(2) != 1 or x.stride(1) != dim:
        x = x.contiguous()
    positions = positions.to(torch.int32).contiguous()
    out = torch.empty((tokens, heads, dim), dtype=x.dtype)
    _cpu.rotary(
        x.dtype is torch.bfloat16,
        x.data_ptr(),
        out.data_ptr(),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        tokens,
        heads,
        dim,
        rotated,
        x.stride(0),
        max_len,
    )
    return out


def store_kv_(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """See `reference.store_kv_`. Raises IndexError if a slot is outside of ``cache``."""
    pages, two, heads, page_size, dim = cache.shape
    tokens = slots.shape[0]
    same = cache.dtype is key.dtype is value.dtype and key.shape == value.shape == (tokens, heads, dim)
    if not same or two != 2 or not cache.is_contiguous() or slots.dtype is not torch.int32:
        return reference.store_kv_(cache, key, value, slots)
    key, value = (x if x.stride(2) == 1 and x.stride(1) == dim else x.contiguous() for x in (key, value))
    slots = slots.contiguous()
    _cpu.store(
        cache.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        slots.data_ptr(),
        tokens,
        heads,
        dim,
        page_size,
        pages,
        key.stride(0),
        value.stride(0),
        cache.element_size(),
    )
    return None


def attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.attention`. Raises IndexError if the metadata point outside of ``query`` or ``cache``."""
    tokens, heads, dim = query.shape
    pages, two, kv_heads, page_size, cache_dim = cache.shape
    fits = dim == cache_dim and dim % PANEL == 0 and dim <= MAX_HEAD_DIM and two == 2 and heads % kv_heads == 0
    if query.dtype not in _TYPES or cache.dtype is not query.dtype or not fits or not is_plain(cache, meta):
        return reference.attention(query, cache, meta, scale, window, softcap, sinks)
    if query.stride(2) != 1 or query.stride(1) != dim:
        query = query.contiguous()
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
        if sinks.shape != (heads,):
            raise ValueError(f"sinks have shape {tuple(sinks.shape)}, not ({heads},)")
    out = torch.empty((tokens, heads, dim), dtype=query.dtype)
    table = meta.block_table
    _cpu.attention(
        query.dtype is torch.bfloat16,
        query.data_ptr(),
        cache.data_ptr(),
        out.data_ptr(),
        meta.query_start.data_ptr(),
        meta.seq_lens.data_ptr(),
        meta.rows.data_ptr(),
        table.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        meta.rows.shape[0],
        heads,
        kv_heads,
        dim,
        page_size,
        pages,
        table.shape[0],
        table.stride(0),
        query.stride(0),
        tokens,
        window or 0,
        scale,
        softcap or 0.0,
    )
    return out


def is_plain(cache: torch.Tensor, meta: AttentionMetadata) -> bool:
    """Whether the metadata are as `AttentionMetadata` says, dense, and long enough for one another."""
    items = meta.rows.shape[0]
    index = (meta.query_start, meta.seq_lens, meta.rows, meta.block_table)
    dense = cache.is_contiguous() and all(t.dtype is torch.int32 and t.is_contiguous() for t in index)
    return dense and meta.query_start.shape[0] == items + 1 and meta.seq_lens.shape[0] == items


def argmax(x: torch.Tensor) -> torch.Tensor:
    """Index (int64) of the greatest of each row of ``x[S, V]``: the lowest of equals, the first NaN if there is one."""
    if x.dtype not in _TYPES or x.stride(1) != 1 or not x.shape[1]:
        return x.argmax(-1)
    out = torch.empty(x.shape[0], dtype=torch.int64)
    _cpu.argmax(x.dtype is torch.bfloat16, x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], x.stride(0))
    return out


class PackedLinear:
    """A bfloat16 weight in panels of 16 outputs: ``[out / 16, in / 2, 16, 2]``, the last panel filled up with zeros."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        missing = -self.out_features % PANEL
        if missing:
            weight = torch.cat((weight, weight.new_zeros(missing, self.in_features)))
        pairs = weight.contiguous().view(torch.int32)
        self.panels = pairs.view(-1, PANEL, self.in_features // 2).transpose(1, 2).contiguous()
        self.bias = None if bias is None else bias.to(torch.bfloat16).contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x[..., in] @ weight.T + bias``; another type or width than the weight's is a ValueError."""
        if x.dtype is not torch.bfloat16 or x.shape[-1] != self.in_features:
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; the weight takes bfloat16 [..., {self.in_features}]")
        flat = _rows_of(x)
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=torch.bfloat16)
        _cpu.linear(
            flat.data_ptr(),
            self.panels.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            out.data_ptr(),
            flat.shape[0],
            self.in_features,
            self.out_features,
            flat.stride(0),
        )
        return out

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """``weight[ids]``: ``[T, in]``. Raises IndexError for an id outside of the weight."""
        ids = ids.to(torch.int32).contiguous()
        out = torch.empty((ids.numel(), self.in_features), dtype=torch.bfloat16)
        _cpu.gather(
            self.panels.data_ptr(),
            ids.data_ptr(),
            out.data_ptr(),
            ids.numel(),
            self.in_features,
            self.out_features,
        )
        return out.view(*ids.shape, self.in_features)


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear | None:
    """The packed product of ``weight[out, in]``, or None where F.linear stays (float32, odd ``in``)."""
    if weight.dtype is not torch.bfloat16 or weight.shape[1] % 2 or weight.numel() == 0:
        return None
    return PackedLinear(weight, bias)


def describe() -> str:
    """What the kernels were chosen for and how many threads run them, such as "avx512_bf16, 2 threads"."""
    return f"{_cpu.active()}, {_cpu.threads()} threads"
