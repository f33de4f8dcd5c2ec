"""Mixtures of experts: of many gated MLPs each token passes a few, chosen by a router."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.kernels.metadata import Groups
from octavo.kernels.select import ExpertOps


class GroupedProduct:
    """The products of one kind, such as all "down" ones, of the experts: ``weight[E, out, in]``, ``bias[E, out]``.

    It packs them where that is worth it; the caller then keeps none of them, if ``packed`` is not None.
    """

    def __init__(self, ops: ExpertOps, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.linear = ops.linear
        self.packed = ops.pack(weight, bias)
        self.weight = weight if self.packed is None else None
        self.bias = bias if self.packed is None else None

    def __call__(self, x: torch.Tensor, groups: Groups, *, by_token: bool) -> torch.Tensor:
        """See `kernels.reference.grouped_linear`."""
        if self.packed is not None:
            return self.packed(x, groups, by_token=by_token)
        assert self.weight is not None
        return self.linear(x, self.weight, self.bias, groups, by_token=by_token)


def mixture(
    ops: ExpertOps,
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    up: GroupedProduct,
    activation: Callable[[torch.Tensor], torch.Tensor],
    down: GroupedProduct,
    after: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """What the ``experts[T, K]`` of ``count`` make of ``x[T, C]``, summed by ``weights[T, K]``: ``[T, C]``.

    Each is ``down(activation(up(x)))``, and ``after`` that. Tokens without an expert of these numbers get zeros.
    """
    groups = ops.group(experts, count)
    inner = activation(up(x, groups, by_token=True))
    out = down(inner, groups, by_token=False)
    return ops.combine(out if after is None else after(out), weights, groups)
