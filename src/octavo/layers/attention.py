"""The one attention layer: stores keys and values in their pages, then attends over the pages."""

from __future__ import annotations

import torch

from octavo.config import LayerSpec
from octavo.kernels.metadata import HeadChange
from octavo.layers import context
from octavo.layers.base import Layer

UNCHANGED = HeadChange(q_norm=None, k_norm=None, eps=0.0, cos_sin=None)


class Attention(Layer):
    """Attention of decoder layer number ``layer``; what is done to heads before it is in a `HeadChange`.

    ``scale`` multiplies the scores; 1 / sqrt(head size) if not given.
    """

    def __init__(self, spec: LayerSpec, layer: int, scale: float | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.scale = spec.head_dim**-0.5 if scale is None else scale
        self.window = spec.window
        self.softcap = spec.softcap

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        change: HeadChange = UNCHANGED,
        wanted: context.Wanted | None = None,
    ) -> torch.Tensor:
        """``q[T, H, D]``, ``k, v[T, KH, D]`` of the running step's tokens at ``positions[T]`` to ``[T, H, D]``, or of
        the ``wanted`` tokens alone to ``[S, H, D]``."""
        step = context.current()
        cache, queries = step.kv_cache[self.layer], step.attention
        q = self.ops.place_heads_(q, k, v, change, positions, cache, queries.slots)
        if wanted is not None:
            q, queries = q[wanted.tokens], wanted.attention(queries, positions)
        return self.ops.attention(q, cache, queries, self.scale, self.window, self.softcap)
