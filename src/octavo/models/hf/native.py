"""Native Llama layers in place of a decoder of Transformers, where both compute the same.

A layer with the parts of Llama's is a candidate. The proof is by example and needs no weights of the model: a copy of
the decoder in float32 with random weights, strong enough for sharp attention, runs over a few tokens at positions far
apart. Each native layer has to add to the hidden states what its counterpart added, and nothing else may happen to them
on their way from the embedding through all layers and the last norm. What that shows is a matter of the code and the
config, since weights steer no control flow, so the checkpoint is read into the native layers at once.
"""

from __future__ import annotations

import copy
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
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import Rotary, shared_rotaries
from octavo.models.hf.attention import PagedAttention
from octavo.models.hf.norms import Formulas, NormFormula, formula_of_kind
from octavo.models.hf.probe import Call, same, small_context, spread, watch
from octavo.models.llama import Decoder, LlamaDecoderLayer
from octavo.parallel.group import current
from octavo.parallel.shards import heads_of_rank

Key = TypeVar("Key", bound=Hashable)


class NotNative(Exception):
    """Why a decoder keeps its own layers, as a clause."""


class NativeDecoder(Decoder):
    """The model's own embedding, native layers that were proven, and a native norm."""


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


@dataclass(frozen=True)
class Proven:
    """A decoder that computes what the model's own does, without memory yet; ``slots`` by the model's parameters."""

    decoder: NativeDecoder
    slots: Mapping[str, Slot]

    def filling(self, device: torch.device, ops: Ops) -> Filling[str]:
        """What gives the layers memory and content."""
        for layer in self.decoder.modules():
            if isinstance(layer, Layer) and next(layer.parameters(), None) is None:
                layer.finish(ops)
        return Filling(self.slots, device, ops)


@torch.inference_mode()
def prove(
    model: nn.Module, body_name: str, config: ModelConfig, geometry: ModelConfig, max_len: int, device: torch.device
) -> Proven:
    """The native decoder that computes what the decoder ``body_name`` of ``model`` does; raises `NotNative`.

    ``model`` has no memory for its parameters yet. ``config`` has the layers as traced, ``geometry`` those read from
    config.json, with their rotary settings. Takes memory for one decoder layer in float32, twice.
    """
    body = model.get_submodule(body_name)
    layers, last = _layers(body), _last_norm(body)
    builder = _Builder(config, geometry, max_len)
    parts = [builder.parts(layer) for layer in layers]
    for rotary in builder.tables:
        rotary.materialise(device)
    wirings = _tried(body, builder, spread(max_len, device))

    names = {module: f"{body_name}.{name}" if body_name else name for name, module in body.named_modules()}
    made = [builder.build(own, wiring, builder.dtype) for own, wiring in zip(parts, wirings, strict=True)]
    slots: dict[str, Slot] = {}
    for one in made:
        slots |= {f"{names[module]}.{kind}": slot for (module, kind), slot in one.slots.items()}
    formula = builder.formula(last)
    norm = RMSNorm(last.get_parameter("weight").shape[0], formula.eps, dtype=builder.dtype)
    slots[f"{names[last]}.weight"] = Slot(norm, "weight", 0, norm.weight.shape, formula.add)
    embedding: nn.Module = body.get_input_embeddings()  # type: ignore[operator]
    return Proven(NativeDecoder(embedding, [one.layer for one in made], norm), slots)


def _layers(body: nn.Module) -> nn.ModuleList:
    lists = [module for module in body.children() if isinstance(module, nn.ModuleList) and len(module)]
    if len(lists) != 1:
        raise NotNative(f"{type(body).__name__} has {len(lists)} lists of layers")
    return lists[0]


def _last_norm(body: nn.Module) -> nn.Module:
    """The one module beside the layers that can be a norm."""
    found = [
        module
        for module in body.children()
        if not list(module.children()) and [weight.dim() for weight in module.parameters()] == [1]
    ]
    if len(found) != 1:
        raise NotNative(f"{type(body).__name__} has {len(found)} norms with one weight beside its layers")
    return found[0]


def drop_layers(body: nn.Module) -> None:
    """The layers and the norm of ``body`` that a native decoder stands for."""
    names = {module: name for name, module in body.named_children()}
    setattr(body, names[_layers(body)], nn.ModuleList())
    setattr(body, names[_last_norm(body)], nn.Identity())


# --- the trial ------------------------------------------------------------------------------------------------------


def _tried(body: nn.Module, builder: _Builder, positions: torch.Tensor) -> list[_Wiring]:
    """How each native layer of the decoder ``body`` has to be wired; raises `NotNative`."""
    trial = _with_random_weights(body, positions.device)
    try:
        seen = watch(trial, builder.config, torch.float32, positions)
    except Exception as error:  # code that is not ours
        raise NotNative(f"it could not be tried in float32 ({type(error).__name__}: {error})") from error
    candidates: dict[Hashable, list[tuple[_Wiring, LlamaDecoderLayer]]] = {}
    wirings = []
    for index, layer in enumerate(_layers(trial)):
        parts = builder.parts(layer)
        if layer not in seen:
            raise NotNative(f"layer {index} ({type(layer).__name__}) was not called")
        if parts.kind not in candidates:  # layers of one kind have the same random weights, too
            candidates[parts.kind] = list(builder.candidates(parts, positions.device))
        for wiring, made in candidates[parts.kind]:
            if _adds_the_same(made, seen[layer], builder.config, positions):
                wirings.append(wiring)
                break
        else:
            raise NotNative(f"layer {index} ({type(layer).__name__}) computes something else than a native layer")
    _check_links(trial, seen, builder)
    return wirings


def _check_links(trial: nn.Module, seen: Mapping[nn.Module, Call], builder: _Builder) -> None:
    """Nothing happens to hidden states between the embedding, the layers, the last norm and the result."""
    embedding, norm = trial.get_input_embeddings(), _last_norm(trial)  # type: ignore[operator]
    layers = list(_layers(trial))
    if embedding not in seen or norm not in seen:
        raise NotNative("its embedding or its last norm is not called")
    ends = [seen[embedding].output, *(seen[layer].result for layer in layers), seen[norm].result]
    begins = [*(seen[layer].hidden for layer in layers), seen[norm].hidden, seen[trial].result]
    for number, (end, begin) in enumerate(zip(ends, begins, strict=True)):
        if not torch.equal(end, begin):
            raise NotNative(f"hidden states change after its {'embedding' if number == 0 else f'layer {number - 1}'}")
    formula = builder.formula(norm)
    ours = REFERENCE.rms_norm(seen[norm].hidden, norm.get_parameter("weight") + formula.add, formula.eps)
    if not same(ours, seen[norm].result):
        raise NotNative(f"its last norm ({type(norm).__name__}) computes something else than an RMS norm")


def _with_random_weights(body: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``body`` in float32 on ``device``; weights of one name and shape are the same in all layers."""
    trial, generator = copy.deepcopy(body), torch.Generator(device).manual_seed(0)
    embedding = trial.get_input_embeddings()  # type: ignore[operator]
    known: dict[Hashable, nn.Parameter] = {}
    for root in (*_layers(trial), trial):
        for name, module in root.named_modules():
            for kind, old in list(module.named_parameters(recurse=False)):
                if root is trial and not old.is_meta:
                    continue  # a layer's
                key = (root is trial, name, kind, old.shape)
                if key not in known:
                    rows = _overlapping if module is embedding and kind == "weight" else _random
                    known[key] = nn.Parameter(rows(old.shape, generator), requires_grad=False)
                setattr(module, kind, known[key])
    for module in trial.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, (buffer.float() if buffer.is_floating_point() else buffer).to(device))
        if isinstance(module, Layer):
            module.finish(REFERENCE)  # it is the formula that is proven; kernels would have to be compiled, too
    return trial


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Matrices that make attention sharp, weights of norms and biases about 0.7."""
    made = torch.empty(shape, device=generator.device).normal_(generator=generator)
    return made.mul_(0.3).add_(0.7) if len(shape) == 1 else made.mul_(2 * shape[-1] ** -0.5)


def _overlapping(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Rows of an embedding, each one number further in the same memory: ids need different rows, not gigabytes."""
    numbers = torch.empty(shape[0] + shape[1], device=generator.device).normal_(generator=generator)
    return numbers.as_strided(shape, (1, 1))


def _adds_the_same(made: LlamaDecoderLayer, call: Call, config: ModelConfig, positions: torch.Tensor) -> bool:
    """Compares what the layers add to the hidden states; in the sum a difference would drown."""
    hidden, wanted = call.hidden[0], call.result[0]
    with small_context(config, torch.float32, positions.device):
        x, residual = made(hidden.clone(), None, positions)
        x = made.mlp.down_proj.group.all_reduce(x)
    return same((residual - hidden) + x, wanted - hidden, rounded_at=wanted)


# --- native layers --------------------------------------------------------------------------------------------------

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
class _Wiring:
    """What the parts of a layer do not tell."""

    rotates: bool
    norm: NormFormula


@dataclass(frozen=True)
class _Parts:
    """A layer by the native names of its parts; ``kind``: layers of one kind differ in their weights alone, or show
    a difference when they run."""

    attention: PagedAttention
    modules: Mapping[str, list[nn.Module]]
    kind: Hashable

    def norms(self) -> list[nn.Module]:
        return [module for name, found in self.modules.items() if name.endswith("norm") for module in found]


@dataclass(frozen=True)
class _Made:
    layer: LlamaDecoderLayer
    slots: dict[tuple[nn.Module, str], Slot]  # by the module and the name of its parameter


class _Builder:
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

    def parts(self, layer: nn.Module) -> _Parts:
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
        parts = _Parts(attention, modules, (type(layer), shape, spec, id(self._rotaries[index]), sizes))
        if len({self.formula(norm) for norm in parts.norms()}) != 1:
            raise NotNative(f"{what} has norms of several kinds")
        return parts

    def candidates(self, parts: _Parts, device: torch.device) -> Iterator[tuple[_Wiring, LlamaDecoderLayer]]:
        """Layers in float32 with the weights of ``parts``, as they may be wired."""
        formula = self.formula(parts.norms()[0])
        for rotates in (True, False):
            made = self.build(parts, _Wiring(rotates, formula), torch.float32)
            filling = Filling(made.slots, device, REFERENCE)
            for module, kind in made.slots:
                filling.place((module, kind), module.get_parameter(kind))
            yield _Wiring(rotates, formula), made.layer

    def build(self, parts: _Parts, wiring: _Wiring, dtype: torch.dtype) -> _Made:
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
        return _Made(made, slots)


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
