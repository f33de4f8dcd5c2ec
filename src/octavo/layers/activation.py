"""Gated activations."""

from __future__ import annotations

import torch

from octavo.errors import UnsupportedModel
from octavo.layers.base import Layer

# Transformers' names of an activation -> the operator.
_OPERATORS = {
    "silu": "silu_and_mul",
    "swish": "silu_and_mul",
    "gelu_pytorch_tanh": "gelu_tanh_and_mul",
    "gelu_new": "gelu_tanh_and_mul",
}


class GatedActivation(Layer):
    """``act(x[:, :I]) * x[:, I:]`` for ``x[T, 2 I]``; ``name`` is the config's ``hidden_act``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in _OPERATORS:
            raise UnsupportedModel(
                f"hidden_act is {name!r}; the native models know {', '.join(sorted(_OPERATORS))}.",
                "Use a model with one of these.",
            )
        self.operator = _OPERATORS[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.operator == "silu_and_mul":
            return self.ops.silu_and_mul(x)
        return self.ops.gelu_tanh_and_mul(x)
