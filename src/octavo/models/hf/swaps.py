"""The engine's own layers inside a loaded Transformers model, wherever they compute the same.

Nothing is recognised by its source or its class. The model runs once over a few tokens (`models.hf.probe`); then, from
the whole to the parts: the decoder as native layers (`models.hf.native`), single decoder layers, norms, products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.kernels.select import PackedLinear, ops
from octavo.layers.base import Layer
from octavo.layers.embedding import Embedding
from octavo.models.hf.native import NativeDecoder, Prover, native_norm
from octavo.models.hf.probe import Call, same, same_after, small_context, spread, watch
from octavo.models.llama import LlamaDecoderLayer


class Product(Layer):
    """A packed product in place of ``nn.Linear``."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x)


class Head(Layer):
    """The head that shares its weight with ``embedding``."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.embedding.logits(hidden)


class NativeLayer(nn.Module):
    """A native layer where the model calls its own: hidden states ``[1, T, C]`` in and out."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, *args: Any, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        x, residual = self.layer(hidden_states[0], None, position_ids[0].int())
        return (residual + self.layer.mlp.down_proj.group.all_reduce(x)).unsqueeze(0)


def swap(
    model: Any, body: nn.Module, config: ModelConfig, geometry: ModelConfig, max_len: int
) -> tuple[NativeDecoder | None, str]:
    """Replaces modules of ``model`` and its decoder ``body``; returns the decoder that runs in its place, if it can be
    replaced as a whole, and a line for the log.

    ``config`` has the layers as traced, ``geometry`` those read from config.json, with their rotary settings.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    device = next(model.parameters()).device
    positions = spread(max_len, device)
    done: Counter[str] = Counter()
    with torch.inference_mode():
        _pack_head(model, dtype, done)
        seen = watch(body, config, dtype, positions)
        whole = _swap_layers(body, seen, Prover(config, geometry, max_len, positions), done)
        if whole is not None:
            with small_context(config, dtype, device):
                found = whole(seen[body].kwargs["input_ids"][0], positions)
            if same_after(len(whole.layers), found, seen[body].result[0]):
                done["decoder"] += 1
                _drop_layers(body)
                return whole, _told(done)
        _swap_norms(body, seen, device, dtype, done)
        _pack_products(body, seen, dtype, done)
    return None, _told(done)


def swap_norms(body: nn.Module, config: ModelConfig, max_len: int) -> str:
    """Replaces the norms of ``body`` that can share their weight with ours; returns a line for the log."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    device = next(body.parameters()).device
    done: Counter[str] = Counter()
    with torch.inference_mode():
        seen = watch(body, config, dtype, spread(max_len, device))
        _swap_norms(body, seen, device, dtype, done, shared=True)
    return _told(done)


def _told(done: Counter[str]) -> str:
    return "replaced by our own: " + (", ".join(f"{count} {what}" for what, count in done.items()) or "nothing")


def _swap_layers(
    body: nn.Module, seen: dict[nn.Module, Call], prover: Prover, done: Counter[str]
) -> NativeDecoder | None:
    """Native layers for decoder layers; for all of them with embedding and norm, the decoder that they make up."""
    lists = [module for module in body.children() if isinstance(module, nn.ModuleList) and len(module)]
    if len(lists) != 1:
        return None
    layers, ours = lists[0], []
    for index, layer in enumerate(layers):
        made = prover.native(layer, seen)
        if made is not None:
            ours.append(made)
            layers[index] = NativeLayer(made)
            done["decoder layers"] += 1
    if len(ours) != len(layers):
        return None
    leaves = [module for module in body.children() if module in seen and not list(module.children())]
    norms = [
        norm for leaf in leaves if (norm := native_norm(leaf, seen[leaf], ours[0].input_layernorm.ops)) is not None
    ]
    if len(norms) != 1:
        return None
    return NativeDecoder(body.get_input_embeddings(), ours, norms[0])  # type: ignore[operator]


def _drop_layers(body: nn.Module) -> None:
    """The wrappers around native layers, which the whole decoder holds itself."""
    for name, module in list(body.named_children()):
        if isinstance(module, nn.ModuleList):
            setattr(body, name, nn.ModuleList())


def _children(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(root.modules()):
        if not isinstance(parent, (Layer, NativeLayer)):
            yield from ((parent, name, child) for name, child in list(parent.named_children()))


def _swap_norms(
    body: nn.Module,
    seen: dict[nn.Module, Call],
    device: torch.device,
    dtype: torch.dtype,
    done: Counter[str],
    *,
    shared: bool = False,
) -> None:
    for parent, name, module in _children(body):
        if module in seen and not isinstance(module, Layer):
            norm = native_norm(module, seen[module], ops(device, dtype))
            if norm is not None and (not shared or norm.weight.data_ptr() == module.get_parameter("weight").data_ptr()):
                setattr(parent, name, norm)
                done["norms"] += 1


def _pack_products(body: nn.Module, seen: dict[nn.Module, Call], dtype: torch.dtype, done: Counter[str]) -> None:
    for parent, name, module in _children(body):
        if type(module) is nn.Linear and module in seen and module.weight.dtype is dtype:
            bias = None if module.bias is None else module.bias.data
            packed = ops(module.weight.device, dtype).pack_linear(module.weight.data, bias)
            if packed is not None and same(packed(seen[module].args[0]), seen[module].output):
                setattr(parent, name, Product(packed))
                done["products"] += 1


def _pack_head(model: Any, dtype: torch.dtype, done: Counter[str]) -> None:
    """The head, and with a tied one the embedding: one packed copy for both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None or head.weight.dtype is not dtype:
        return
    chosen = ops(head.weight.device, dtype)
    if head.weight is not embedding.weight:
        packed = chosen.pack_linear(head.weight.data, None)
        if packed is not None:
            model.set_output_embeddings(Product(packed))
            done["head"] += 1
    elif type(embedding) is nn.Embedding:
        made = Embedding(*head.weight.shape, tied=True, dtype=dtype)
        made.weight = nn.Parameter(head.weight.data, requires_grad=False)
        made.finish(chosen)
        if next(made.parameters(), None) is None:  # it was packed
            model.set_input_embeddings(made)
            model.set_output_embeddings(Head(made))
            done["head with embedding"] += 1
