"""The engine's own layers inside a loaded Transformers model, wherever they compute the same.

Nothing is recognised by its source or its class. Where the decoder is not native as a whole (`models.hf.proof`), it
runs once over a few tokens (`models.hf.probe`), and norms and products that give the same are replaced.
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
from octavo.models.hf.norms import Formulas, native_norm
from octavo.models.hf.probe import Call, same, spread, watch
from octavo.models.hf.proof import NativeDecoder


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


def swap(model: Any, body: nn.Module, config: ModelConfig, max_len: int) -> str:
    """Replaces modules of ``model`` and its decoder ``body``, whose layers are ``config``'s; a line for the log."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    device = next(model.parameters()).device
    done: Counter[str] = Counter()
    with torch.inference_mode():
        _pack_head(model, dtype, done)
        seen = watch(body, config, dtype, spread(max_len, device))
        _swap_norms(body, seen, device, dtype, done)
        _pack_products(body, seen, dtype, done)
    return _told(done)


def swap_decoder(model: Any, body: nn.Module, native: NativeDecoder) -> str:
    """Lets go of what ``native`` does in place of the decoder ``body`` of ``model``; returns a line for the log."""
    done: Counter[str] = Counter()
    with torch.inference_mode():
        _pack_head(model, native.norm.weight.dtype, done)
    native.embed_tokens = body.get_input_embeddings()  # type: ignore[operator]
    done["decoder layers"] = len(native.layers)
    done["decoder"] = 1
    return _told(done)


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


def _children(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(root.modules()):
        if not isinstance(parent, Layer):
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
    formulas: Formulas = {}
    for parent, name, module in _children(body):
        if module in seen and not isinstance(module, Layer):
            norm = native_norm(module, seen[module], ops(device, dtype), formulas)
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
