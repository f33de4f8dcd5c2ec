"""A decoder layer, or all of a model's, in one call into the C++ extension.

On a small model and few tokens the interpreter costs as much as the products: a layer is a dozen operators, each of
which checks its tensors and allocates an output. Here weights are checked once, and what layers share once a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo import _cpu
from octavo.kernels.cpu import MAX_HEAD_DIM, PANEL, PackedLinear, is_plain
from octavo.kernels.metadata import AttentionMetadata
from octavo.kernels.select import FusedDecoder, FusedLayer, LayerParts

_GATES = {"silu_and_mul": True, "gelu_tanh_and_mul": False}


def fuse_layer(parts: LayerParts) -> FusedLayer | None:
    """See `select.Ops`. None unless all products are packed and of fitting sizes, and the norms are bfloat16."""
    products = [p for p in (parts.qkv, parts.o, parts.gate_up, parts.down) if isinstance(p, PackedLinear)]
    norms = [n for n in (parts.input_norm, parts.post_norm, parts.q_norm, parts.k_norm) if n is not None]
    if len(products) < 4 or parts.activation not in _GATES or not _fits(parts, *products):
        return None
    if any(p.dtype is not torch.bfloat16 for p in products):
        return None
    if any(n.dtype is not torch.bfloat16 or not n.is_contiguous() for n in norms):
        return None
    table = parts.cos_sin
    if table is not None and (table.dtype is not torch.float32 or not table.is_contiguous()):
        return None
    return _Layer(parts, *products)


def _fits(parts: LayerParts, qkv: PackedLinear, o: PackedLinear, gate_up: PackedLinear, down: PackedLinear) -> bool:
    size, dim = qkv.in_features, parts.head_dim
    heads = dim % PANEL == 0 and dim <= MAX_HEAD_DIM and parts.heads % parts.kv_heads == 0
    attention = qkv.out_features == (parts.heads + 2 * parts.kv_heads) * dim and o.in_features == parts.heads * dim
    mlp = gate_up.in_features == size and gate_up.out_features == 2 * down.in_features
    outputs = o.out_features == down.out_features == size
    norms = parts.input_norm.shape == parts.post_norm.shape == (size,)
    head_norms = all(n is None or n.shape == (dim,) for n in (parts.q_norm, parts.k_norm))
    table = parts.cos_sin is None or (parts.cos_sin.shape[1] <= dim and parts.cos_sin.shape[1] % 2 == 0)
    return heads and attention and mlp and outputs and norms and head_norms and table


class _Layer:
    """Keeps the tensors whose addresses the extension holds."""

    def __init__(
        self, parts: LayerParts, qkv: PackedLinear, o: PackedLinear, gate_up: PackedLinear, down: PackedLinear
    ) -> None:
        self.parts = parts
        self.size = qkv.in_features
        self._products = (qkv, o, gate_up, down)
        self.native = _cpu.Layer(
            qkv.native,
            o.native,
            gate_up.native,
            down.native,
            parts.input_norm.data_ptr(),
            parts.post_norm.data_ptr(),
            0 if parts.q_norm is None else parts.q_norm.data_ptr(),
            0 if parts.k_norm is None else parts.k_norm.data_ptr(),
            parts.eps,
            _GATES[parts.activation],
        )

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cache: torch.Tensor,
        meta: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `select.FusedLayer`. Raises ValueError for another type or shape, IndexError for wrong indices."""
        step = _steps.of(self.parts, positions, cache, meta)
        for tensor in (x, residual):
            if tensor is not None:
                _check_hidden(tensor, (step.tokens, self.size))
        if cache.shape != step.cache_shape or cache.dtype is not torch.bfloat16 or not cache.is_contiguous():
            raise ValueError(f"the cache is {cache.dtype} {tuple(cache.shape)}, not bfloat16 {step.cache_shape}, dense")
        out, total = torch.empty_like(x), torch.empty_like(x)
        self.native.run(
            step.native,
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            cache.data_ptr(),
            out.data_ptr(),
            total.data_ptr(),
        )
        return out, total


def fuse_decoder(layers: Sequence[FusedLayer], norm: torch.Tensor, eps: float) -> FusedDecoder | None:
    """See `select.Ops`. None for layers of different sizes, or a norm that is not bfloat16."""
    own = [layer for layer in layers if isinstance(layer, _Layer)]
    if not own or len(own) < len(layers) or any(layer.size != own[0].size for layer in own):
        return None
    if norm.shape != (own[0].size,) or norm.dtype is not torch.bfloat16 or not norm.is_contiguous():
        return None
    return _Decoder(own, norm, eps)


class _Decoder:
    """Keeps the tensors whose addresses the extension holds."""

    def __init__(self, layers: list[_Layer], norm: torch.Tensor, eps: float) -> None:
        self._layers, self._norm = layers, norm
        self._size = layers[0].size
        kinds: dict[tuple[object, ...], int] = {}
        numbers = [kinds.setdefault(_kind(layer.parts), len(kinds)) for layer in layers]
        self._kinds = [layers[numbers.index(number)].parts for number in range(len(kinds))]
        self._native = _cpu.Decoder([layer.native for layer in layers], numbers, norm.data_ptr(), eps)

    def __call__(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: torch.Tensor,
        meta: AttentionMetadata,
        layers: int,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `select.FusedDecoder`. Raises ValueError for another type or shape, IndexError for wrong indices."""
        if not 0 < layers <= min(len(self._layers), len(cache)) or cache.dtype is not torch.bfloat16:
            raise ValueError(f"{layers} of {len(self._layers)} layers on a KV cache {cache.dtype} {tuple(cache.shape)}")
        first = cache[0]
        steps = [_Step(parts, positions, first, meta) for parts in self._kinds]
        _check_hidden(x, (steps[0].tokens, self._size))
        if wanted is not None and (wanted.dtype is not torch.int32 or wanted.dim() != 1 or not wanted.is_contiguous()):
            raise ValueError(f"wanted tokens are {wanted.dtype} {tuple(wanted.shape)}, not int32 [S], dense")
        out = x.new_empty(x.shape if wanted is None else (wanted.shape[0], self._size))
        self._native.run(
            layers,
            [step.native for step in steps],
            x.data_ptr(),
            cache.data_ptr(),
            cache.stride(0) * cache.element_size(),
            out.data_ptr(),
            0 if wanted is None else wanted.data_ptr(),
            -1 if wanted is None else wanted.shape[0],
        )
        return out


def _check_hidden(x: torch.Tensor, shape: tuple[int, int]) -> None:
    if x.shape != shape or x.dtype is not torch.bfloat16 or not x.is_contiguous():
        raise ValueError(f"the hidden state is {x.dtype} {tuple(x.shape)}, not bfloat16 {shape}, dense")


def _kind(parts: LayerParts) -> tuple[object, ...]:
    """Equal for layers that take the same `_Step`."""
    shape = (parts.heads, parts.kv_heads, parts.head_dim)
    return (*shape, parts.window, parts.softcap, parts.scale, id(parts.cos_sin))


class _Step:
    """A step's metadata, checked, for layers of one `_kind`; keeps the tensors alive."""

    def __init__(
        self, parts: LayerParts, positions: torch.Tensor, cache: torch.Tensor, meta: AttentionMetadata
    ) -> None:
        self.tokens = meta.slots.shape[0]
        self.cache_shape = cache.shape
        pages, two, kv_heads, page_size, dim = cache.shape
        if not is_plain(cache, meta) or (two, kv_heads, dim) != (2, parts.kv_heads, parts.head_dim):
            raise ValueError("the attention metadata or the KV cache are not as kernels.metadata describes them")
        if positions.shape != (self.tokens,) or meta.slots.dtype is not torch.int32 or not meta.slots.is_contiguous():
            raise ValueError(f"positions {tuple(positions.shape)} or slots are not int32 [{self.tokens}], dense")
        positions, table, cos_sin = positions.to(torch.int32).contiguous(), meta.block_table, parts.cos_sin
        self._kept = (positions, cos_sin, meta.slots, meta.query_start, meta.seq_lens, meta.rows, table)
        self.native = _cpu.Step(
            positions.data_ptr(),
            meta.slots.data_ptr(),
            0 if cos_sin is None else cos_sin.data_ptr(),
            0 if cos_sin is None else cos_sin.shape[1],
            0 if cos_sin is None else cos_sin.shape[0],
            meta.query_start.data_ptr(),
            meta.seq_lens.data_ptr(),
            meta.rows.data_ptr(),
            table.data_ptr(),
            meta.rows.shape[0],
            parts.heads,
            kv_heads,
            dim,
            page_size,
            pages,
            table.shape[0],
            table.stride(0),
            self.tokens,
            parts.window or 0,
            parts.scale,
            parts.softcap or 0.0,
        )


class _Steps:
    """The `_Step`s of the step that runs: one for each kind of layer."""

    def __init__(self) -> None:
        self._meta: AttentionMetadata | None = None
        self._positions: torch.Tensor | None = None
        self._by_kind: dict[tuple[object, ...], _Step] = {}

    def of(self, parts: LayerParts, positions: torch.Tensor, cache: torch.Tensor, meta: AttentionMetadata) -> _Step:
        if meta is not self._meta or positions is not self._positions:
            self._meta, self._positions, self._by_kind = meta, positions, {}
        kind = _kind(parts)
        step = self._by_kind.get(kind)
        if step is None:
            step = self._by_kind[kind] = _Step(parts, positions, cache, meta)
        return step


_steps = _Steps()
