"""Attention of an adopted Transformers model: its calls to the attention interface, over the engine's pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from octavo.kernels.reference import store_kv_ as reference_store_kv_
from octavo.layers import context
from octavo.layers.base import Layer

NAME = "octavo"
"""Our entry in Transformers' attention registry. It has none in the mask registry, so no mask is built."""

ATTRIBUTE = "octavo_attention"
"""Where an attention module of the model keeps its `PagedAttention`."""


@dataclass(frozen=True)
class AttentionShape:
    """What one attention module was seen to do. ``window`` as in `config.LayerSpec`."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    scale: float | None = None
    plain: bool = True  # neither soft-capping nor sinks

    @property
    def head_dim(self) -> int:
        """The head size in the cache, where K and V have the same."""
        return max(self.key_dim, self.value_dim)


class PagedAttention(Layer):
    """Attention number ``index`` of a model. It uses the first heads and dimensions of its layer of the cache."""

    def __init__(self, index: int, shape: AttentionShape) -> None:
        super().__init__()
        self.index = index
        self.shape = shape

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``q[T, H, D]``, ``k[T, KH, D]``, ``v[T, KH, DV]`` to ``[T, H, DV]``; D and DV may differ."""
        step, shape = context.current(), self.shape
        scale = shape.key_dim**-0.5 if scale is None else scale
        q, k, v = (_widened(x, shape.head_dim) for x in (q, k, v))
        cache = step.kv_cache[self.index]
        if cache.shape[2] == shape.kv_heads and cache.shape[4] == shape.head_dim:
            self.ops.store_kv_(cache, k, v, step.attention.slots)
        else:
            cache = cache[:, :, : shape.kv_heads, :, : shape.head_dim]
            reference_store_kv_(cache, k, v, step.attention.slots)
        out = self.ops.attention(q, cache, step.attention, scale, shape.window, softcap, sinks)
        return out[..., : shape.value_dim]


def _widened(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``x`` with zeros up to ``dim``: they add nothing to a score, and the outputs they make are cut off again."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of Transformers' interface, for ``query[1, H, T, D]``; returns ``[1, T, H, D]``.

    What is in ``rest`` was found to have no meaning here when the model was traced (`models.hf.trace`).
    """
    attention: PagedAttention = getattr(module, ATTRIBUTE)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention(q, k, v, scaling, softcap, s_aux).unsqueeze(0), None


def register() -> None:
    """Makes `NAME` known to Transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
