"""The one attention layer: stores keys and values in their pages, then attends over the pages."""

from __future__ import annotations

import torch

from octavo.config import LayerSpec
from octavo.layers import context
from octavo.layers.base import Layer


class Attention(Layer):
    """Attention of decoder layer number ``layer``; it knows nothing of projections, norms or rotary embeddings.

    ``scale`` multiplies the scores; 1 / sqrt(head size) if not given.
    """

    def __init__(self, spec: LayerSpec, layer: int, scale: float | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.scale = spec.head_dim**-0.5 if scale is None else scale
        self.window = spec.window
        self.softcap = spec.softcap

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``q[T, H, D]``, ``k, v[T, KH, D]`` of the running step's tokens to ``[T, H, D]``."""
        step = context.current()
        cache = step.kv_cache[self.layer]
        self.ops.store_kv_(cache, k, v, step.attention.slots)
        return self.ops.attention(q, cache, step.attention, self.scale, self.window, self.softcap)
