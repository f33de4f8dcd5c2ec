"""Native Llama layers like the decoder layers of a Transformers model, and where their weights come from.

A layer with the parts of Llama's is a candidate: projections packed or not, with biases or without, norms of heads or
none. Whether a native layer computes the same is for `models.hf.proof` to find out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.errors import OctavoError
from octavo.kernels.select import REFERENCE, Ops
from octavo.layers.base import Layer
from octavo.layers.linear import Linear
from octavo.layers.rotary import Rotary, shared_rotaries
from octavo.models.hf.attention import PagedAttention
from octavo.models.hf.norms import Formulas, NormFormula, formula_of_kind
from octavo.models.llama import LlamaDecoderLayer
from octavo.parallel.group import current
from octavo.parallel.shards import heads_of_rank

Key = TypeVar("Key", bound=Hashable)


class NotNative(Exception):
    """Why a decoder keeps its own layers, as a clause."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter of ``shape`` of the Transformers model goes: rows from ``start`` on of a native layer's
    ``parameter``, with ``add`` added."""

    layer: Layer
    parameter: str
    start: int
    shape: torch.Size
    add: float = 0.0


class Filling(Generic[Key]):
    """Fills native layers through ``slots``; a layer is finished with its last parameter."""

    def __init__(self, slots: Mapping[Key, Slot], device: torch.device, ops: Ops) -> None:
        self.slots = slots
        self._device = device
        self._ops = ops
        self._missing = Counter(slot.layer for slot in slots.values())
        for layer in self._missing:
            layer.materialise(device)

    def place(self, key: Key, tensor: torch.Tensor) -> None:
        """Copies ``tensor``, of the shape of its slot."""
        slot = self.slots[key]
        target = slot.layer.get_parameter(slot.parameter).data.narrow(0, slot.start, slot.shape[0])
        target.copy_(tensor)
        if slot.add:
            target.add_(slot.add)
        self._missing[slot.layer] -= 1
        if not self._missing[slot.layer]:
            slot.layer.finish(self._ops)


_ALTERNATIVES: dict[str, tuple[tuple[str, ...], ...]] = {
    "self_attn.qkv_proj": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.qkv_proj",),
    ),
    "self_attn.o_proj": (("self_attn.o_proj",),),
    "mlp.gate_up_proj": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_up_proj",)),
    "mlp.down_proj": (("mlp.down_proj",),),
    "input_layernorm": (("input_layernorm",),),
    "post_attention_layernorm": (("post_attention_layernorm",),),
    "self_attn.q_norm": (("self_attn.q_norm",), ()),
    "self_attn.k_norm": (("self_attn.k_norm",), ()),
}


@dataclass(frozen=True)
class Wiring:
    """What the parts of a layer do not tell."""

    rotates: bool
    norm: NormFormula


@dataclass(frozen=True)
class Parts:
    """A layer by the native names of its parts; ``kind``: layers of one kind differ in their weights alone, or show
    a difference when they run."""

    attention: PagedAttention
    modules: Mapping[str, list[nn.Module]]
    kind: Hashable

    def norms(self) -> list[nn.Module]:
        return [module for name, found in self.modules.items() if name.endswith("norm") for module in found]


@dataclass(frozen=True)
class Made:
    layer: LlamaDecoderLayer
    slots: dict[tuple[nn.Module, str], Slot]  # by the module and the name of its parameter


class Builder:
    """Makes native layers like those of one model."""

    def __init__(self, config: ModelConfig, geometry: ModelConfig, max_len: int) -> None:
        self.config = config
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._geometry = geometry
        self._ranks = current().size
        self._whole = config if self._ranks == 1 else _whole(config, geometry)
        self._rotaries = shared_rotaries(geometry.layers, max_len)
        self._formulas: Formulas = {}

    @property
    def tables(self) -> list[Rotary]:
        return [rotary for rotary in dict.fromkeys(self._rotaries) if rotary is not None]

    def formula(self, norm: nn.Module) -> NormFormula:
        found = formula_of_kind(norm, self._formulas)
        if found is None:
            raise NotNative(f"{type(norm).__name__} is no RMS norm")
        return found

    def parts(self, layer: nn.Module) -> Parts:
        """Raises `NotNative` for a layer with other parts than Llama's."""
        what = type(layer).__name__
        attention = next((m for m in layer.modules() if isinstance(m, PagedAttention)), None)
        modules = _modules_of(layer)
        if attention is None or modules is None:
            raise NotNative(f"{what} has other parts than a native layer")
        shape, index = attention.shape, attention.index
        if not shape.plain:
            raise NotNative(f"{what} caps the scores of attention, or has sinks")
        if index >= len(self._rotaries):
            raise NotNative(f"config.json has {len(self._rotaries)} layers, and this is number {index}")
        spec = self.config.layers[index]
        if (shape.kv_heads, shape.head_dim, shape.key_dim) != (spec.kv_heads, spec.head_dim, shape.value_dim):
            raise NotNative(f"{what} has other sizes of K and V than the cache")
        if heads_of_rank(self._whole.layers[index], self._ranks) != spec:
            raise NotNative(f"each rank has all heads of {what}")
        sizes = tuple((name, p.shape) for name, p in layer.named_parameters())
        parts = Parts(attention, modules, (type(layer), shape, spec, id(self._rotaries[index]), sizes))
        if len({self.formula(norm) for norm in parts.norms()}) != 1:
            raise NotNative(f"{what} has norms of several kinds")
        return parts

    def candidates(self, parts: Parts, device: torch.device) -> Iterator[tuple[Wiring, LlamaDecoderLayer]]:
        """Layers in float32 with the weights of ``parts``, as they may be wired."""
        formula = self.formula(parts.norms()[0])
        for rotates in (True, False):
            made = self.build(parts, Wiring(rotates, formula), torch.float32)
            filling = Filling(made.slots, device, REFERENCE)
            for module, kind in made.slots:
                filling.place((module, kind), module.get_parameter(kind))
            yield Wiring(rotates, formula), made.layer

    def build(self, parts: Parts, wiring: Wiring, dtype: torch.dtype) -> Made:
        """A native layer without memory, and where the parameters of ``parts`` go; raises `NotNative`."""
        index, shape = parts.attention.index, parts.attention.shape
        config = _wired(self._whole, self._geometry, parts.modules, wiring.norm.eps, self._ranks)
        try:
            made = LlamaDecoderLayer(config, index, self._rotaries[index] if wiring.rotates else None, dtype)
        except OctavoError as error:
            raise NotNative(error.cause.rstrip(".")) from error
        if shape.scale is not None:
            made.self_attn.attn.scale = shape.scale
        slots: dict[tuple[nn.Module, str], Slot] = {}
        for name, modules in parts.modules.items():
            if modules:
                slots |= _slots_of(made.get_submodule(name), modules, wiring.norm.add)
        return Made(made, slots)


def _slots_of(target: nn.Module, modules: list[nn.Module], add: float) -> dict[tuple[nn.Module, str], Slot]:
    """Where the parameters of ``modules`` go in ``target``; raises `NotNative` where it has others."""
    slots: dict[tuple[nn.Module, str], Slot] = {}
    if not isinstance(target, Layer):
        raise NotNative(f"a native {type(target).__name__} has no parameters")
    for kind in ("weight", "bias"):
        given = [(module, p) for module in modules if isinstance(p := getattr(module, kind, None), nn.Parameter)]
        wanted, start = getattr(target, kind, None), 0
        shapes = {(p.shape[1:], p.dtype) for _, p in given}
        if shapes != (set() if wanted is None else {(wanted.shape[1:], wanted.dtype)}):
            raise NotNative(f"{type(modules[0]).__name__} has a {kind} of another shape or type than a native layer's")
        for module, parameter in given:
            added = 0.0 if isinstance(target, Linear) else add
            slots[module, kind] = Slot(target, kind, start, parameter.shape, added)
            start += parameter.shape[0]
        if wanted is not None and start != wanted.shape[0]:
            raise NotNative(f"{type(modules[0]).__name__} has a {kind} of another size than a native layer's")
    return slots


def _modules_of(layer: nn.Module) -> dict[str, list[nn.Module]] | None:
    """The modules of a layer by their native names; None if one is missing, or if there are parameters beside them."""
    modules = dict(layer.named_modules())
    parts: dict[str, list[nn.Module]] = {}
    for name, alternatives in _ALTERNATIVES.items():
        names = next((names for names in alternatives if all(part in modules for part in names)), None)
        if names is None:
            return None
        parts[name] = [modules[part] for part in names]
    used = {id(p) for found in parts.values() for module in found for p in module.parameters(recurse=False)}
    return parts if used == {id(p) for p in layer.parameters()} else None


def _whole(config: ModelConfig, geometry: ModelConfig) -> ModelConfig:
    """``config``, whose layers are those of one rank, with the heads of all."""
    layers = tuple(
        dataclasses.replace(own, heads=whole.heads, kv_heads=whole.kv_heads)
        for own, whole in zip(config.layers, geometry.layers, strict=False)
    )
    return dataclasses.replace(config, layers=layers)


def _wired(
    config: ModelConfig, geometry: ModelConfig, parts: Mapping[str, list[nn.Module]], eps: float, ranks: int
) -> ModelConfig:
    """A config under which the native layer has the optional parameters that ``parts`` have."""
    qkv_bias, o_bias, mlp_bias = (
        getattr(parts[name][0], "bias", None) is not None
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    )
    family = "Qwen3" if parts["self_attn.q_norm"] else "Qwen2" if qkv_bias and not o_bias else "Llama"
    down = parts["mlp.down_proj"][0].get_parameter("weight")
    return dataclasses.replace(
        config,
        architecture=f"{family}ForCausalLM",
        intermediate_size=down.shape[1] * ranks,
        norm_eps=eps,
        hidden_act=geometry.hidden_act,
        hf={"attention_bias": qkv_bias, "mlp_bias": mlp_bias},
    )
