"""Mixtures of experts: of many gated MLPs each token passes a few, chosen by a router."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.kernels.metadata import Groups
from octavo.kernels.select import ExpertOps, Ops
from octavo.layers.activation import GatedActivation
from octavo.layers.base import Layer, LoadRule, parameter
from octavo.parallel.group import current
from octavo.parallel.shards import cut

ATTRIBUTE = "octavo_experts"
"""Where a module of Transformers' keeps the products that run its experts (`models.hf.experts`); they have `nbytes`."""


class GroupedProduct:
    """The products of one kind, such as all "down" ones, of the experts: ``weight[E, out, in]``, ``bias[E, out]``.

    It packs them where that is worth it; the caller then keeps none of them, if ``packed`` is not None.
    """

    def __init__(self, ops: ExpertOps, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.linear = ops.linear
        self.packed = ops.pack(weight, bias)
        self.weight = weight if self.packed is None else None
        self.bias = bias if self.packed is None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        held = self.packed if self.packed is not None else self.weight
        return 0 if held is None else held.nbytes

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


class Experts(Layer):
    """``count`` gated MLPs: ``down(act(gate x) * up x)``, each with ``inner`` values between its products.

    ``parts`` are the checkpoint's names of gate, up and down; expert e has ``….experts.e.gate_proj.weight`` and so on.
    Among several ranks each has a part of every expert and returns its summand.
    """

    def __init__(
        self,
        count: int,
        size: int,
        inner: int,
        activation: str,
        parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        group = current()
        self.count, self.size, self.parts = count, size, parts
        self.cuts = [cut(dim, inner, group.rank, group.size) for dim in (0, 0, 1)] if group.size > 1 else [None] * 3
        self.inner = inner if self.cuts[0] is None else self.cuts[0].size
        self.gate_up_proj = parameter(count * 2 * self.inner, size, dtype=dtype)
        self.down_proj = parameter(count * size, self.inner, dtype=dtype)
        self.act_fn = GatedActivation(activation)

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``x[T, size]`` by the ``experts`` and their ``weights[T, K]``."""
        return mixture(self.ops.experts, x, experts, weights, self.count, self.up, self.act_fn, self.down)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, once they are loaded."""
        return self.up.nbytes + self.down.nbytes

    def load_rules(self, name: str) -> list[LoadRule]:
        rules, (gate, up, down) = [], self.parts
        for expert in range(self.count):
            for place, part in enumerate((gate, up)):
                start = (2 * expert + place) * self.inner
                source = f"{name}.{expert}.{part}.weight"
                rules.append(LoadRule(source, "gate_up_proj", start, self.inner, self.cuts[place]))
            source = f"{name}.{expert}.{down}.weight"
            rules.append(LoadRule(source, "down_proj", expert * self.size, self.size, self.cuts[2]))
        return rules

    def finish(self, ops: Ops) -> None:
        super().finish(ops)
        self.up = GroupedProduct(ops.experts, self.gate_up_proj.data.view(self.count, -1, self.size), None)
        self.down = GroupedProduct(ops.experts, self.down_proj.data.view(self.count, self.size, -1), None)
        del self.gate_up_proj, self.down_proj  # which the products hold, packed or not
