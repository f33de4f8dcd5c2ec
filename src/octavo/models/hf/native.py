"""The native Llama layer in place of a decoder layer of Transformers, where both compute the same.

A layer with the parts of Llama's is a candidate. The proof is by example: a copy of it in float32 with random weights,
strong enough for sharp attention, and our layer filled with these give the same for random hidden states at positions
far apart. Layers of one class, window and rotation share that proof; each is then compared with its own weights, too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.errors import OctavoError
from octavo.kernels.select import Ops, ops
from octavo.layers.base import Layer
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import shared_rotaries
from octavo.models.hf.attention import PagedAttention
from octavo.models.hf.probe import Call, same, small_context
from octavo.models.llama import LlamaDecoderLayer
from octavo.parallel.group import current
from octavo.parallel.shards import heads_of_rank


class NativeDecoder(nn.Module):
    """Embedding, native layers, norm: the forward of `models.llama.LlamaModel` around layers that were proven."""

    def __init__(self, embedding: nn.Module, layers: list[LlamaDecoderLayer], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``token_ids[T]`` at ``positions[T]`` to ``[T, C]``."""
        x, residual = self.embed_tokens(token_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, positions)
        x, _ = self.norm.add(x, residual)
        return x


class Prover:
    """Makes native layers out of those of one model. ``geometry`` is its config as read, with rotary settings."""

    def __init__(self, config: ModelConfig, geometry: ModelConfig, max_len: int, positions: torch.Tensor) -> None:
        self._config = config
        self._geometry = geometry
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._device = positions.device
        self._positions = positions
        self._proven: dict[tuple[Any, ...], bool | None] = {}
        self._rotaries = shared_rotaries(geometry.layers, max_len)
        for rotary in self._rotaries:
            if rotary is not None:
                rotary.materialise(self._device)

        self._ranks = current().size
        self._whole = config if self._ranks == 1 else _whole(config, geometry)

    def native(self, layer: nn.Module, seen: Mapping[nn.Module, Call]) -> LlamaDecoderLayer | None:
        """The native layer that computes what ``layer`` does, or None."""
        attention = next((m for m in layer.modules() if isinstance(m, PagedAttention)), None)
        if attention is None or layer not in seen or attention.index >= len(self._rotaries):
            return None
        if not attention.shape.plain:
            return None
        rotary = self._rotaries[attention.index]
        key = (type(layer), attention.shape, id(rotary))
        if key not in self._proven:
            self._proven[key] = self._prove(layer, attention, seen)
        rotates = self._proven[key]
        if rotates is None:
            return None
        made = self._make(layer, attention, rotates, self._dtype)
        call = seen[layer]
        if made is None or not self._adds_the_same(made, call.hidden, call.result):
            return None
        return made

    def _prove(self, layer: nn.Module, attention: PagedAttention, seen: Mapping[nn.Module, Call]) -> bool | None:
        """Whether the native layer has to rotate to be the same; None if it never is."""
        if self._make(layer, attention, True, self._dtype) is None:
            return None
        call = seen[layer]
        wide, generator = copy.deepcopy(layer).float(), torch.Generator(self._device).manual_seed(0)
        for module in wide.modules():
            if isinstance(module, Layer):
                module.finish(ops(self._device, torch.float32))
        for parameter in wide.parameters():
            parameter.normal_(generator=generator)
            if parameter.dim() == 1:
                parameter.mul_(0.3).add_(0.7)
            else:
                parameter.mul_(2 * parameter.shape[-1] ** -0.5)
        hidden = torch.empty(call.hidden.shape, device=self._device).normal_(generator=generator)
        kwargs = {name: _exact(value, seen) for name, value in call.kwargs.items() if name != "hidden_states"}
        args = (hidden, *(_exact(value, seen) for value in call.args[1:]))
        with small_context(self._config, torch.float32, self._device):
            wanted = wide(*args, **kwargs)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        for rotates in (True, False):
            made = self._make(wide, attention, rotates, torch.float32)
            if made is not None and self._adds_the_same(made, hidden, wanted):
                return rotates
        return None

    def _adds_the_same(self, made: LlamaDecoderLayer, hidden: torch.Tensor, wanted: torch.Tensor) -> bool:
        """Compares what the layers add to ``hidden``; in the sum a difference would drown.

        Only what rounding that sum loses may be missing besides: the values of a few channels can be large.
        """
        with small_context(self._config, hidden.dtype, self._device):
            x, residual = made(hidden[0].clone(), None, self._positions)
            x = made.mlp.down_proj.group.all_reduce(x)
        return same((residual - hidden[0]) + x, (wanted - hidden)[0], rounded_at=wanted[0])

    def _make(
        self, layer: nn.Module, attention: PagedAttention, rotates: bool, dtype: torch.dtype
    ) -> LlamaDecoderLayer | None:
        """A native layer with the weights of ``layer``, or None if it has other parts than Llama's."""
        shape, spec = attention.shape, self._config.layers[attention.index]
        if (shape.kv_heads, shape.head_dim, shape.key_dim) != (spec.kv_heads, spec.head_dim, shape.value_dim):
            return None
        if heads_of_rank(self._whole.layers[attention.index], self._ranks) != spec:
            return None  # each rank has all heads
        parts = _parts(layer)
        norm = _norm_formula(parts) if parts is not None else None
        if parts is None or norm is None:
            return None
        rotary = self._rotaries[attention.index] if rotates else None
        try:
            made = LlamaDecoderLayer(
                _wired(self._whole, self._geometry, parts, norm.eps, self._ranks), attention.index, rotary, dtype
            )
        except OctavoError:  # an activation that the native layer does not have
            return None
        if attention.shape.scale is not None:
            made.self_attn.attn.scale = attention.shape.scale
        if not _fill(made, parts, norm.add):
            return None
        chosen: Ops = ops(self._device, dtype)
        for module in made.modules():
            if isinstance(module, Layer):
                module.finish(chosen)
        return made


def _exact(value: Any, seen: Mapping[nn.Module, Call]) -> Any:
    """An argument of a layer in float32; a rotary table is made again, as it was rounded to the model's type."""
    for module, call in seen.items():
        if value is call.output and isinstance(value, tuple):
            return module(*(_exact(x, {}) for x in call.args), **{k: _exact(x, {}) for k, x in call.kwargs.items()})
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    return value


Parts = dict[str, list[nn.Module]]
"""By the native layer's name of a part, the modules whose weights make it up."""

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


def _parts(layer: nn.Module) -> Parts | None:
    """The modules of a layer by their native names; None if one is missing, or if there are parameters beside them."""
    modules = dict(layer.named_modules())
    parts: Parts = {}
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


def _wired(config: ModelConfig, geometry: ModelConfig, parts: Parts, eps: float, ranks: int) -> ModelConfig:
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


def _fill(made: LlamaDecoderLayer, parts: Parts, add: float) -> bool:
    """Gives ``made`` the weights of ``parts``, those of norms with ``add`` added; False where shapes differ."""
    for name, modules in parts.items():
        target = made.get_submodule(name) if modules else None
        for kind in ("weight", "bias"):
            given = [p for module in modules if (p := getattr(module, kind, None)) is not None]
            wanted = getattr(target, kind, None)
            if not given and wanted is None:
                continue
            if not given or wanted is None or sum(p.shape[0] for p in given) != wanted.shape[0]:
                return False
            value = given[0].data.clone() if len(given) == 1 else torch.cat([p.data for p in given])
            if value.shape != wanted.shape or value.dtype != wanted.dtype:
                return False
            if not isinstance(target, Linear):
                value = value + add
            setattr(target, kind, nn.Parameter(value, requires_grad=False))
    return True


@dataclass(frozen=True)
class NormFormula:
    """``x / sqrt(mean(x * x) + eps) * (weight + add)``; Gemma adds 1."""

    eps: float
    add: float


def norm_formula(module: nn.Module) -> NormFormula | None:
    """The formula of ``module`` if it is an RMS norm with one weight.

    Found with random weights, on inputs so small that the epsilon counts.
    """
    weight = getattr(module, "weight", None)
    if [name for name, _ in module.named_parameters()] != ["weight"] or not isinstance(weight, torch.Tensor):
        return None
    if weight.dim() != 1 or list(module.children()):
        return None
    wide = copy.deepcopy(module).float()
    strong = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.device)
    wide.weight = nn.Parameter(strong, requires_grad=False)
    small = torch.linspace(-3e-3, 2e-3, 5 * weight.shape[0], device=weight.device).view(1, 5, -1)
    wanted = wide(small)
    exact = ops(weight.device, torch.float32)
    for formula in (NormFormula(eps, add) for eps in _epsilons(module) for add in (0.0, 1.0)):
        if same(exact.rms_norm(small, strong + formula.add, formula.eps), wanted):
            return formula
    return None


def _norm_formula(parts: Parts) -> NormFormula | None:
    """The formula that all norms of a layer have."""
    found = {norm_formula(module) for name, modules in parts.items() if name.endswith("norm") for module in modules}
    return found.pop() if len(found) == 1 else None


def native_norm(module: nn.Module, call: Call, chosen: Ops) -> RMSNorm | None:
    """`RMSNorm` with the weight of ``module``, if it computes the same, by formula and for the input of ``call``.

    The weight is the same memory, unless the formula adds something to it.
    """
    weight: Any = getattr(module, "weight", None)
    x: Any = call.args[0] if call.args else None
    if not all(isinstance(tensor, torch.Tensor) for tensor in (weight, x, call.output)):
        return None
    if not x.dtype == weight.dtype == call.output.dtype or x.shape[-1:] != weight.shape:
        return None
    formula = norm_formula(module)
    if formula is None:
        return None
    made = RMSNorm(weight.shape[0], formula.eps, dtype=weight.dtype)
    value = weight.data + formula.add if formula.add else weight.data
    made.weight = nn.Parameter(value, requires_grad=False)
    made.finish(chosen)
    return made if same(made(x), call.output) else None


def _epsilons(module: nn.Module) -> list[float]:
    """What may be the epsilon: every small number that the module keeps."""
    found = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2]
    return list(dict.fromkeys(found))
