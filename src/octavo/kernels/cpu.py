"""The operators of `kernels.reference` on the C++ extension, for bfloat16 and float32.

The extension sees addresses only, so every function here checks types, layout and sizes first; whatever the extension
does not take goes to the reference. Indices inside tensors (slots, pages, positions) are checked in C++: IndexError.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from octavo import _cpu
from octavo.kernels import cpu_choice, reference
from octavo.kernels.metadata import AttentionMetadata
from octavo.platforms.pages import Arena

_TYPES = frozenset((torch.bfloat16, torch.float32))
MAX_HEAD_DIM = 256
PANEL = 16
FEW_BLOCK_ROWS = 4  # with more, blocks are unpacked first (csrc/impl/block_gemm.h)

cpu_choice.check_interface(getattr(_cpu, "INTERFACE", 0))
_passed_over = cpu_choice.choose(_cpu.names())
_cpu.set_threads(torch.get_num_threads())
weights = Arena()  # packed


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` as a matrix over its last dimension, which must be dense for the kernels; copies only if it has to."""
    if x.dim() != 2:
        return x.reshape(-1, x.shape[-1]) if x.is_contiguous() else x.contiguous().view(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def take_in_(
    token_ids: torch.Tensor,
    fed_rows: torch.Tensor,
    last_token: torch.Tensor,
    table: torch.Tensor,
    table_at: torch.Tensor,
    table_values: torch.Tensor,
) -> None:
    """See `reference.take_in_`. By numpy, whose calls cost a third of torch's: this is done for every token."""
    if len(table_at):
        table.numpy()[table_at.numpy()] = table_values.numpy()
    fed = fed_rows.numpy()
    np.copyto(token_ids.numpy(), last_token.numpy()[fed], where=fed >= 0)


def put_(target: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
    """See `reference.put_`. One by one: done for every token behind a forward, which has emptied the caches, and there
    an assignment by index arrays costs more than a few dozen of these."""
    array = target.numpy()
    for place, value in zip(at.tolist(), values.tolist(), strict=True):
        array[place] = value


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `reference.rms_norm`."""
    cols = x.shape[-1]
    if x.dtype not in _TYPES or not _multiplies(weight, x):
        return reference.rms_norm(x, weight, eps)
    flat = _rows_of(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    _cpu.norm(
        x.dtype is torch.bfloat16,
        weight.dtype is torch.float32,
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
    same = x.dtype is residual.dtype and x.shape == residual.shape
    if x.dtype not in _TYPES or not same or not _multiplies(weight, x):
        return reference.add_rms_norm(x, residual, weight, eps)
    flat, other = _rows_of(x), _rows_of(residual)
    out, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    _cpu.norm(
        x.dtype is torch.bfloat16,
        weight.dtype is torch.float32,
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


def _multiplies(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `_cpu.norm` takes a norm's ``weight`` for ``x``."""
    return weight.dtype in (x.dtype, torch.float32) and weight.shape == x.shape[-1:] and weight.is_contiguous()


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


def _takes(logits: torch.Tensor) -> bool:
    return logits.dtype in _TYPES and logits.stride(1) == 1 and logits.shape[1] > 0


def greedy(logits: torch.Tensor) -> torch.Tensor | None:
    """See `sampling.greedy`; None for logits that the extension does not take."""
    if not _takes(logits):
        return None
    rows, cols = logits.shape
    out = torch.empty((2, rows), dtype=torch.int32)
    _cpu.greedy(logits.dtype is torch.bfloat16, logits.data_ptr(), out.data_ptr(), rows, cols, logits.stride(0))
    return out


def sample(logits: torch.Tensor, settings: torch.Tensor) -> torch.Tensor | None:
    """See `sampling.sample_rows`; None for logits that the extension does not take."""
    if not _takes(logits):
        return None
    rows, cols = logits.shape
    if settings.dtype is not torch.int32 or settings.shape != (6, rows):
        raise ValueError(f"settings are {settings.dtype} {tuple(settings.shape)}, not int32 (6, {rows})")
    settings = settings.contiguous()
    out = torch.empty((2, rows), dtype=torch.int32)
    _cpu.sample(
        logits.dtype is torch.bfloat16,
        logits.data_ptr(),
        settings.data_ptr(),
        out.data_ptr(),
        rows,
        cols,
        logits.stride(0),
    )
    return out


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor | None:
    """See `sampling.packed_logprobs`; None for logits that the extension does not take.

    Raises IndexError for a token outside of the vocabulary.
    """
    if not _takes(logits):
        return None
    rows, cols = logits.shape
    count, tokens = min(count, cols), tokens.to(torch.int32).contiguous()
    if tokens.shape != (rows,):
        raise ValueError(f"{tuple(tokens.shape)} tokens for {rows} rows of logits")
    out = torch.empty((rows, 2 + 2 * count), dtype=torch.int32)
    _cpu.logprobs(
        logits.dtype is torch.bfloat16,
        logits.data_ptr(),
        tokens.data_ptr(),
        out.data_ptr(),
        rows,
        cols,
        logits.stride(0),
        count,
    )
    return out


class PackedLinear:
    """A weight in panels of 16 outputs, the layout of which only the extension knows (csrc/kernels.h, csrc/blocks.h).

    ``parts`` are what lies one below the other in it: (type, panels, outputs), where the type is "bf16" or one of
    `BLOCK_TYPES`. It takes activations of ``dtype``, which is bfloat16 unless all parts are blocks.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, torch.Tensor, int]],
        in_features: int,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.in_features = in_features
        self.out_features = sum(out for _, _, out in parts)
        self.few_rows = None if all(kind == "bf16" for kind, _, _ in parts) else FEW_BLOCK_ROWS
        self.bias = None if bias is None else bias.to(dtype).contiguous()
        self.panels = [panels for _, panels, _ in parts]  # whose addresses the extension holds
        self.native = _cpu.Weight(
            [(kind, panels.data_ptr(), out) for kind, panels, out in parts],
            0 if self.bias is None else self.bias.data_ptr(),
            in_features,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return sum(panels.nbytes for panels in self.panels)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x[..., in] @ weight.T + bias``; another type or width than the weight's is a ValueError."""
        if x.dtype is not self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}; the weight takes {self.dtype} [..., {self.in_features}]"
            )
        flat = _rows_of(x)
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype)
        self.native.product(x.dtype is torch.bfloat16, flat.data_ptr(), out.data_ptr(), flat.shape[0], flat.stride(0))
        return out

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """``weight[ids]``: ``[T, in]``. Raises IndexError for an id outside of the weight."""
        ids = ids.to(torch.int32).contiguous()
        out = torch.empty((ids.numel(), self.in_features), dtype=self.dtype)
        self.native.gather(self.dtype is torch.bfloat16, ids.data_ptr(), out.data_ptr(), ids.numel())
        return out.view(*ids.shape, self.in_features)


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear | None:
    """The packed product of ``weight[out, in]``, or None where F.linear stays (float32, odd ``in``)."""
    out, size = weight.shape
    if weight.dtype is not torch.bfloat16 or size % 2 or weight.numel() == 0:
        return None
    pairs = in_panels(weight)
    panels = weights.empty(pairs.nbytes).view(torch.int32).view(pairs.shape).copy_(pairs)
    return PackedLinear([("bf16", panels, out)], size, bias, torch.bfloat16)


def in_panels(weight: torch.Tensor) -> torch.Tensor:
    """Pairs of inputs of the bfloat16 ``weight[out, in]`` in panels: a view ``[out / 16, in / 2, 16]``; ``in`` even."""
    out, size = weight.shape
    missing = -out % PANEL
    if missing:
        weight = torch.cat((weight, weight.new_zeros(missing, size)))
    return weight.contiguous().view(torch.int32).view(-1, PANEL, size // 2).transpose(1, 2)


# Types of GGUF that are multiplied as they are, to (values, bytes) of a block.
BLOCK_TYPES = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
MAX_PARTS = 3


def pack_blocks(
    parts: Sequence[tuple[str, torch.Tensor]], bias: torch.Tensor | None, dtype: torch.dtype
) -> PackedLinear:
    """The product of a weight in blocks of few bits, for activations of ``dtype`` (bfloat16 or float32).

    ``parts`` lie one below the other: (type, of `BLOCK_TYPES`; uint8 ``[out, bytes of a row]``). Activations are
    rounded to 16 bits in groups of 32 (Q6_K: 16), each by its greatest. The scales of Q4_K, Q5_K and Q6_K, which are
    products of two numbers in the file, are rounded to float16. Raises ValueError for parts that do not fit together.
    """
    if not 0 < len(parts) <= MAX_PARTS or dtype not in _TYPES:
        raise ValueError(f"{len(parts)} parts for activations of {dtype}; 1 to {MAX_PARTS} of blocks are packed")
    sizes, packed = set(), []
    for kind, blocks in parts:
        values, nbytes = BLOCK_TYPES[kind]
        out, row = blocks.shape
        if blocks.dtype is not torch.uint8 or not blocks.is_contiguous() or not out or not row or row % nbytes:
            raise ValueError(f"blocks of {kind} are {blocks.dtype} {tuple(blocks.shape)}, not dense rows of bytes")
        size = row // nbytes * values
        panels = weights.empty(_cpu.panel_bytes(kind, out, size))
        _cpu.pack(kind, blocks.data_ptr(), out, size, panels.data_ptr())
        packed.append((kind, panels, out))
        sizes.add(size)
    if len(sizes) != 1:
        raise ValueError(f"parts of one weight take {sorted(sizes)} inputs")
    return PackedLinear(packed, sizes.pop(), bias, dtype)


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear | None:
    """The product of ``weight[out, in]`` rounded to int8 in groups of 32 inputs (GGUF's Q8_0); see `pack_blocks`.

    None for a weight that is not bfloat16 or float32, or whose inputs are no multiple of 32.
    """
    out, size = weight.shape
    if weight.dtype not in _TYPES or size % 32 or weight.numel() == 0:
        return None
    weight = weight.contiguous()
    panels = weights.empty(_cpu.panel_bytes("Q8_0", out, size))
    _cpu.quantise(weight.dtype is torch.bfloat16, weight.data_ptr(), out, size, panels.data_ptr())
    return PackedLinear([("Q8_0", panels, out)], size, bias, weight.dtype)


def describe() -> str:
    """What the kernels were chosen for and how many threads run them, such as "avx512_bf16, 2 threads"."""
    why = f" ({_passed_over})" if _passed_over else ""
    return f"{_cpu.active()}, {_cpu.threads()} threads{why}"
