"""Linear layers: one product for what a checkpoint keeps in several parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from octavo.kernels.select import Ops, PackedLinear
from octavo.layers.base import Layer, LoadRule, Shard, parameter


class Linear(Layer):
    """``x[T, in] @ weight.T + bias``, where ``weight[out, in]`` is the parts one below the other.

    ``parts`` maps checkpoint names to output sizes, in order: ``{"q_proj": 576, "k_proj": 192, "v_proj": 192}``. They
    are siblings of the layer in the checkpoint: ``….qkv_proj`` is read from ``….q_proj.weight`` and so on.
    """

    def __init__(
        self,
        in_size: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        shard: Shard | None = None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        out_size = sum(parts.values())
        self.parts = dict(parts)
        self.shard = shard
        self.weight = parameter(out_size, in_size, dtype=dtype)
        self.bias = parameter(out_size, dtype=dtype) if bias else None
        self.packed: PackedLinear | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return self.packed(x)
        return self.ops.linear(x, self.weight, self.bias)

    def load_rules(self, name: str) -> list[LoadRule]:
        parent = name.rpartition(".")[0]
        prefix = f"{parent}." if parent else ""
        rules, start = [], 0
        for part, rows in self.parts.items():
            rules.append(LoadRule(f"{prefix}{part}.weight", "weight", start, rows, self.shard))
            if self.bias is not None:  # a bias has no columns to cut
                shard: Shard | None = "out" if self.shard == "out" else None
                rules.append(LoadRule(f"{prefix}{part}.bias", "bias", start, rows, shard))
            start += rows
        return rules

    def finish(self, ops: Ops) -> None:
        super().finish(ops)
        self.packed = ops.pack_linear(self.weight, self.bias)
        if self.packed is not None:  # which is now the only copy
            del self.weight, self.bias
