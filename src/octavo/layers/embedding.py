"""Token embeddings, and the head that shares their weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from octavo.kernels.select import Ops, PackedLinear
from octavo.layers.base import Layer, LoadRule, parameter


class Embedding(Layer):
    """``weight[ids]`` for ``ids[T]``. With ``tied``, `logits` multiplies by the same, single copy of the weight."""

    def __init__(self, vocab_size: int, size: int, *, tied: bool = False, dtype: torch.dtype) -> None:
        super().__init__()
        self.tied = tied
        self.weight = parameter(vocab_size, size, dtype=dtype)
        self._packed: PackedLinear | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            return self._packed.rows(ids)
        return F.embedding(ids, self.weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[S, C]`` to ``[S, vocab]``, when tied."""
        if not self.tied:
            raise RuntimeError("this embedding is not the model's head")
        if self._packed is not None:
            return self._packed(hidden)
        return self.ops.linear(hidden, self.weight)

    def load_rules(self, name: str) -> list[LoadRule]:
        return [LoadRule(f"{name}.weight", "weight", 0, self.weight.shape[0], "out")]

    def finish(self, ops: Ops) -> None:
        super().finish(ops)
        self._packed = ops.pack_linear(self.weight, None) if self.tied else None
        if self._packed is not None:
            del self.weight
