"""Gated activations."""

from __future__ import annotations

import torch

from octavo.errors import UnsupportedModel
from octavo.layers.base import Layer
from octavo.layers.linear import Linear

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
                "Leave --model-impl at auto: the Transformers backend has all of them.",
            )
        self.operator = _OPERATORS[name]

    def of_product(self, product: Linear, x: torch.Tensor) -> torch.Tensor:
        """The activation of ``product(x)``."""
        if product.packed is not None:
            return self.forward(product(x))
        gelu = self.operator == "gelu_tanh_and_mul"
        out: torch.Tensor = self.ops.gated_linear(x, product.weight, product.bias, gelu)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.operator == "silu_and_mul":
            return self.ops.silu_and_mul(x)
        return self.ops.gelu_tanh_and_mul(x)
