"""Whether a decoder of Transformers computes what native Llama layers do, found by example.

The proof needs no weights of the model: a copy of its decoder in float32 with random weights, strong enough for sharp
attention, runs over a few tokens at positions far apart. Each native layer has to add to the hidden states what its
counterpart added, and nothing else may happen to them on their way from the embedding through all layers and the last
norm. What that shows is a matter of the code and the config, since weights steer no control flow, so the checkpoint is
read into the native layers at once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.kernels.select import REFERENCE, Ops
from octavo.layers.base import Layer
from octavo.layers.norm import RMSNorm
from octavo.models.hf.experts import is_registered
from octavo.models.hf.native import Builder, Filling, NotNative, Slot, Wiring
from octavo.models.hf.probe import Call, same, small_context, spread, watch
from octavo.models.llama import Decoder, LlamaDecoderLayer


class NativeDecoder(Decoder):
    """The model's own embedding, native layers that were proven, and a native norm."""


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
    builder = Builder(config, geometry, max_len)
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


def _tried(body: nn.Module, builder: Builder, positions: torch.Tensor) -> list[Wiring]:
    """How each native layer of the decoder ``body`` has to be wired; raises `NotNative`."""
    trial = with_random_weights(body, positions.device)
    try:
        seen = watch(trial, builder.config, torch.float32, positions)
    except Exception as error:  # code that is not ours
        raise NotNative(f"it could not be tried in float32 ({type(error).__name__}: {error})") from error
    parts = [builder.parts(layer) for layer in _layers(trial)]
    of_kind: dict[Hashable, list[int]] = {}
    for index, layer in enumerate(_layers(trial)):
        if layer not in seen:
            raise NotNative(f"layer {index} ({type(layer).__name__}) was not called")
        of_kind.setdefault(parts[index].kind, []).append(index)
    calls, wirings = [seen[layer] for layer in _layers(trial)], dict[int, Wiring]()
    for indices in of_kind.values():  # which have the same random weights, so that one native layer does for all
        for wiring, made in builder.candidates(parts[indices[0]], positions.device):
            left = [index for index in indices if index not in wirings]
            same_there = _add_the_same(made, [calls[index] for index in left], builder.config, positions)
            wirings |= {index: wiring for index, found in zip(left, same_there, strict=True) if found}
            if wirings.keys() >= set(indices):
                break
    for index, layer in enumerate(_layers(trial)):
        if index not in wirings:
            raise NotNative(f"layer {index} ({type(layer).__name__}) computes something else than a native layer")
    _check_links(trial, seen, builder)
    return [wirings[index] for index in range(len(calls))]


def _check_links(trial: nn.Module, seen: Mapping[nn.Module, Call], builder: Builder) -> None:
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


def with_random_weights(body: nn.Module, device: torch.device, *, experts: bool = True) -> nn.Module:
    """A copy of ``body`` in float32 on ``device``; weights of one name and shape are the same in all layers.

    Without ``experts`` those that Transformers has a registry for have no memory, and cannot run.
    """
    known: dict[Hashable, nn.Parameter] = {}
    bare = {id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False) for parameter in body.parameters()}
    trial, generator = copy.deepcopy(body, bare), torch.Generator(device).manual_seed(0)
    embedding = trial.get_input_embeddings()  # type: ignore[operator]
    for name, module in trial.named_modules():
        for kind, old in list(module.named_parameters(recurse=False)):
            key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name, count=1), kind, old.shape)
            if key not in known and (experts or not is_registered(module)):
                rows = _overlapping if module is embedding and kind == "weight" else _random
                known[key] = nn.Parameter(rows(old.shape, generator), requires_grad=False)
            setattr(module, kind, known.get(key, old))
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


def _add_the_same(
    made: LlamaDecoderLayer, calls: list[Call], config: ModelConfig, positions: torch.Tensor
) -> list[bool]:
    """Whether ``made`` adds to the hidden states what each layer called added; in the sum a difference would drown.

    All calls are computed at once, as sequences of their own.
    """
    hidden = torch.cat([call.hidden[0] for call in calls])
    with small_context(config, torch.float32, positions.device, len(calls)):
        x, residual = made(hidden.clone(), None, positions.repeat(len(calls)))
        x = made.mlp.down_proj.group.all_reduce(x)
    added = ((residual - hidden) + x).split(len(positions))
    return [
        same(found, call.result[0] - call.hidden[0], rounded_at=call.result[0])
        for found, call in zip(added, calls, strict=True)
    ]
