"""Root mean square normalisation."""

from __future__ import annotations

import torch

from octavo.layers.base import Layer, parameter
from octavo.parallel.group import current


class RMSNorm(Layer):
    """``x / rms(x) * weight`` over the last dimension, of hidden states ``[T, C]`` or of heads ``[T, H, D]``."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.group = current()
        self.weight = parameter(size, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``residual + x`` and the sum itself, in one pass; no residual counts as zero.

        With a residual, ``x`` is this rank's summand, and the ranks' are summed first.
        """
        if residual is None:
            return self(x), x
        if self.group.size > 1:
            return self.group.add_rms_norm(x, residual, self.weight, self.eps, self.ops)
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)

    def fill_dummy(self, name: str, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)
