"""Which kernels run: chosen once for a device and a type, from an ordered list of candidates that may refuse.

Layers call the functions of the `Ops` that `ops` returns; nobody else asks what the machine can do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels import reference, sampling
from octavo.kernels.metadata import AttentionMetadata, Groups, PlaceHeads


class Linear(Protocol):
    """See `reference.linear`."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...


class Attention(Protocol):
    """See `reference.attention`."""

    def __call__(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        meta: AttentionMetadata,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class TakeIn(Protocol):
    """See `reference.take_in_`."""

    def __call__(
        self,
        token_ids: torch.Tensor,
        fed_rows: torch.Tensor,
        last_token: torch.Tensor,
        table: torch.Tensor,
        table_at: torch.Tensor,
        table_values: torch.Tensor,
    ) -> None: ...


class Greedy(Protocol):
    """See `sampling.greedy`."""

    def __call__(self, logits: torch.Tensor, part: sampling.VocabPart = ...) -> torch.Tensor: ...


class PackedLinear(Protocol):
    """A weight in the layout its kernel reads, the only copy of it.

    ``few_rows``: with more the product takes several times as long as with one; None: that is never so, or not known.
    """

    few_rows: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x[T, in] @ weight.T + bias``."""
        ...

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """``weight[ids]``, for an embedding that shares its weight with the head; ``ids[T]`` -> ``[T, in]``."""
        ...


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A Llama-like decoder layer: norm, QKV, norms of heads, rotary, attention, O; norm, gate and up, activation, down.

    ``activation`` names one of the gated operators of `Ops`; products are None where they are not packed.
    """

    qkv: PackedLinear | None
    o: PackedLinear | None
    gate_up: PackedLinear | None
    down: PackedLinear | None
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    activation: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    cos_sin: torch.Tensor | None  # [max_len, rotated], as `reference.rotary` takes it; None: nothing is rotated


class PackBlocks(Protocol):
    """Packs a weight that is stored in blocks of few bits."""

    def __call__(
        self, parts: Sequence[tuple[str, torch.Tensor]], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """``parts``, at most `MAX_PARTS`, lie one below the other: (type, uint8 ``[out, bytes of a row]``)."""
        ...


MAX_PARTS = 3


def _no_blocks(
    parts: Sequence[tuple[str, torch.Tensor]], bias: torch.Tensor | None, dtype: torch.dtype
) -> PackedLinear:
    raise NotImplementedError("these operators take no blocks; see Ops.block_types")


class FusedLayer(Protocol):
    """A decoder layer in one call."""

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cache: torch.Tensor,
        meta: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x[T, C]`` and the residual it has yet to be added to (None: zero) to the layer's own such pair.

        ``cache`` is the layer's; K and V of the tokens are written to it.
        """
        ...


class FusedDecoder(Protocol):
    """The layers of a decoder and the norm after them in one call."""

    def __call__(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: torch.Tensor,
        meta: AttentionMetadata,
        layers: int,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings ``x[T, C]`` through the first ``layers`` to hidden states ``[T, C]``; ``cache`` is the model's.

        With ``wanted``, int32 ``[S]`` in ascending order, to those of these tokens: ``[S, C]``.
        """
        ...


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling in which each row of a batch has its own settings: functions of `kernels.sampling_triton`,
    `kernels.logprobs_triton` and `kernels.edit_triton`."""

    draw: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool, bool], torch.Tensor]
    record_: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    logprobs: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    send: Callable[[npt.NDArray[np.int32], torch.device], torch.Tensor]


class GroupedLinear(Protocol):
    """See `reference.grouped_linear`."""

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: Groups, *, by_token: bool
    ) -> torch.Tensor: ...


class PackedExperts(Protocol):
    """The weights of all experts in the layout their kernel reads, the only copy of them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        ...

    def __call__(self, x: torch.Tensor, groups: Groups, *, by_token: bool) -> torch.Tensor:
        """`reference.grouped_linear` with these weights."""
        ...


def _never_packs_experts(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedExperts | None:
    return None


@dataclass(frozen=True, slots=True)
class ExpertOps:
    """What a mixture of experts is computed with: functions of `kernels.reference` by the same names.

    ``pack(weight[E, out, in], bias[E, out] | None)`` is for experts what ``pack_linear`` is for one product.
    """

    group: Callable[[torch.Tensor, int], Groups] = reference.group
    linear: GroupedLinear = reference.grouped_linear
    combine: Callable[[torch.Tensor, torch.Tensor, Groups], torch.Tensor] = reference.combine
    pack: Callable[[torch.Tensor, torch.Tensor | None], PackedExperts | None] = _never_packs_experts


@dataclass(frozen=True, slots=True)
class Ops:
    """The operators of `kernels.reference` by the same names, and what only some platforms have.

    ``pack_linear(weight[out, in], bias[out] | None)`` returns the packed product, or None where packing brings nothing;
    after it the caller drops ``weight``. ``fuse_layer(parts)`` returns the layer in one call, or None where it cannot,
    and so does ``fuse_decoder(layers, norm, eps)`` with such layers, of which the i-th has the i-th part of the cache.
    ``block_types`` are GGUF's names of the types that ``pack_blocks`` takes, whose weights need not be dequantised.
    ``pack_int8`` is as ``pack_linear`` and rounds the weight.
    Without ``row_sampling`` rows are grouped by what they need, for `kernels.sampling`. ``rehearse(work)`` compiles the
    kernels that ``work`` launches and runs none; it does nothing where nothing is compiled.
    """

    name: str
    take_in_: TakeIn
    put_: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    linear: Linear
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
    silu_and_mul: Callable[[torch.Tensor], torch.Tensor]
    gelu_tanh_and_mul: Callable[[torch.Tensor], torch.Tensor]
    gated_linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, bool], torch.Tensor]
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    store_kv_: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    place_heads_: PlaceHeads
    attention: Attention
    embed: Callable[[torch.Tensor, torch.Tensor, int | None], torch.Tensor]
    greedy: Greedy
    pack_linear: Callable[[torch.Tensor, torch.Tensor | None], PackedLinear | None]
    fuse_layer: Callable[[LayerParts], FusedLayer | None]
    fuse_decoder: Callable[[Sequence[FusedLayer], torch.Tensor, float], FusedDecoder | None]
    experts: ExpertOps = ExpertOps()
    row_sampling: RowSampling | None = None
    rehearse: Callable[[Callable[[], None]], None] = lambda work: None
    block_types: frozenset[str] = frozenset()
    pack_blocks: PackBlocks = _no_blocks
    pack_int8: Callable[[torch.Tensor, torch.Tensor | None], PackedLinear | None] | None = None


def _never_packs(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear | None:
    return None


def _never_fuses(parts: LayerParts) -> FusedLayer | None:
    return None


def _never_fuses_decoders(layers: Sequence[FusedLayer], norm: torch.Tensor, eps: float) -> FusedDecoder | None:
    return None


REFERENCE = Ops(
    name="torch reference",
    take_in_=reference.take_in_,
    put_=reference.put_,
    linear=reference.linear,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    silu_and_mul=reference.silu_and_mul,
    gelu_tanh_and_mul=reference.gelu_tanh_and_mul,
    gated_linear=reference.gated_linear,
    rotary=reference.rotary,
    store_kv_=reference.store_kv_,
    place_heads_=reference.place_heads_,
    attention=reference.attention,
    embed=reference.embed,
    greedy=sampling.greedy,
    pack_linear=_never_packs,
    fuse_layer=_never_fuses,
    fuse_decoder=_never_fuses_decoders,
)

_report: dict[str, None] = {}  # insertion-ordered set of lines


@cache
def ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """The best operators for activations of ``dtype`` on ``device``; the reasons are in `report`."""
    if device.type == "cpu":
        chosen = _extension(dtype)
        if isinstance(chosen, Ops):
            _note(f"cpu kernels: {chosen.name}")
            return chosen
        _note(f"cpu kernels: {REFERENCE.name}; {chosen}")
        return REFERENCE
    chosen = _triton()
    if isinstance(chosen, Ops):
        _note(f"{device.type} kernels: {chosen.name}")
        return chosen
    _note(f"{device.type} kernels: {REFERENCE.name}; {chosen}")
    return REFERENCE


def int8_ops(device: torch.device, dtype: torch.dtype) -> Ops | None:
    """`ops` whose packed weights are rounded to int8 where their sizes allow it; None without such products."""
    chosen = ops(device, dtype)
    pack_int8, pack_linear = chosen.pack_int8, chosen.pack_linear
    if pack_int8 is None:
        return None

    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear | None:
        return pack_int8(weight, bias) or pack_linear(weight, bias)

    return dataclasses.replace(chosen, pack_linear=pack)


def _triton() -> Ops | str:
    """The Triton kernels, or why not."""
    try:
        from octavo.kernels import (
            attn_triton,
            blocks_triton,
            edit_triton,
            experts_triton,
            linear_triton,
            logprobs_triton,
            rehearsal,
            sampling_triton,
            step_triton,
            triton_ops,
        )
    except ImportError as error:
        return f"no Triton ({error}): install the package triton for many times the speed"
    return Ops(
        name="triton",
        take_in_=step_triton.take_in_,
        put_=step_triton.put_,
        linear=linear_triton.linear,
        rms_norm=triton_ops.rms_norm,
        add_rms_norm=triton_ops.add_rms_norm,
        silu_and_mul=triton_ops.silu_and_mul,
        gelu_tanh_and_mul=triton_ops.gelu_tanh_and_mul,
        gated_linear=linear_triton.gated_linear,
        rotary=triton_ops.rotary,
        store_kv_=triton_ops.store_kv_,
        place_heads_=triton_ops.place_heads_,
        attention=attn_triton.attention,
        embed=triton_ops.embed,
        greedy=triton_ops.greedy,
        pack_linear=_never_packs,
        fuse_layer=_never_fuses,
        fuse_decoder=_never_fuses_decoders,
        experts=ExpertOps(
            group=experts_triton.group,
            linear=experts_triton.grouped_linear,
            combine=experts_triton.combine,
        ),
        row_sampling=RowSampling(
            draw=sampling_triton.draw,
            record_=edit_triton.record_,
            logprobs=logprobs_triton.logprobs,
            send=edit_triton.send,
        ),
        rehearse=rehearsal.rehearse,
        block_types=frozenset(blocks_triton.TYPES),
        pack_blocks=blocks_triton.pack_blocks,
        pack_int8=blocks_triton.pack_int8,
    )


def _extension(dtype: torch.dtype) -> Ops | str:
    """The C++ extension's operators, or why not."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"octavo._cpu has bfloat16 and float32, not {dtype}"
    try:
        from octavo.kernels import cpu, cpu_experts, cpu_layer
    except ImportError as error:
        return f"no C++ extension ({error}): reinstall octavo with a C++17 compiler for several times the speed"
    return Ops(
        name=f"octavo._cpu, {cpu.describe()}",
        take_in_=cpu.take_in_,
        put_=cpu.put_,
        linear=reference.linear,
        rms_norm=cpu.rms_norm,
        add_rms_norm=cpu.add_rms_norm,
        silu_and_mul=cpu.silu_and_mul,
        gelu_tanh_and_mul=cpu.gelu_tanh_and_mul,
        gated_linear=reference.gated_linear,
        rotary=cpu.rotary,
        store_kv_=cpu.store_kv_,
        place_heads_=reference.place_heads_from(cpu.rms_norm, cpu.rotary, cpu.store_kv_),
        attention=cpu.attention,
        embed=reference.embed,
        greedy=sampling.greedy,
        pack_linear=cpu.pack_linear,
        fuse_layer=cpu_layer.fuse_layer,
        fuse_decoder=cpu_layer.fuse_decoder,
        experts=ExpertOps(group=cpu_experts.group, combine=cpu_experts.combine, pack=cpu_experts.pack_experts),
        block_types=frozenset(cpu.BLOCK_TYPES),
        pack_blocks=cpu.pack_blocks,
        pack_int8=cpu.pack_int8,
    )


def report() -> list[str]:
    """One line for each choice made so far, for the start-up log."""
    return list(_report)


def _note(line: str) -> None:
    _report[line] = None
