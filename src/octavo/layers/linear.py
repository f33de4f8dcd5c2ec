"""Linear layers: one product for what a checkpoint keeps in several parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from octavo.kernels.select import MAX_PARTS, Ops, PackedLinear
from octavo.layers.base import Blocks, Layer, LoadRule, Shard, parameter
from octavo.parallel.group import current
from octavo.parallel.shards import Cut, cut


class Linear(Layer):
    """``x[T, in] @ weight.T + bias``, where ``weight[out, in]`` is the parts one below the other.

    ``parts`` maps checkpoint names to output sizes, in order: ``{"q_proj": 576, "k_proj": 192, "v_proj": 192}``. They
    are siblings of the layer in the checkpoint: ``….qkv_proj`` is read from ``….q_proj.weight`` and so on.

    Among several ranks, ``shard`` "out" gives each its share of every part, "in" its share of the inputs; the results
    of the latter are summed, here or, without ``sums``, by whoever takes them. All sizes are those of the whole layer.
    A part of ``units`` is cut between them only.
    """

    def __init__(
        self,
        in_size: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        shard: Shard | None = None,
        units: Mapping[str, int] | None = None,
        sums: bool = True,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.group, self.sums, units = current(), sums, units or {}
        rank, ranks = self.group.rank, self.group.size
        self.parts = dict(parts)
        self.cuts: dict[str, Cut] = {}
        if shard == "out" and ranks > 1:
            self.cuts = {part: cut(0, rows, rank, ranks, units.get(part)) for part, rows in parts.items()}
            self.parts = {part: own.size for part, own in self.cuts.items()}
        self.in_cut = cut(1, in_size, rank, ranks) if shard == "in" and ranks > 1 else None
        out_size = sum(self.parts.values())
        in_size = in_size if self.in_cut is None else self.in_cut.size
        self.weight = parameter(out_size, in_size, dtype=dtype)
        self.bias = parameter(out_size, dtype=dtype) if bias else None
        self.packed: PackedLinear | None = None
        self.dtype = dtype
        self.kinds: list[str] = []  # of blocks0, blocks1, …, which stand in the place of weight
        self.bytes_cut: Cut | None = None  # of each row of them, as `in_cut` of the values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.ops.linear(x, self.weight, self.bias) if self.packed is None else self.packed(x)
        return self.group.all_reduce(out) if self.in_cut is not None and self.sums else out

    def load_rules(self, name: str) -> list[LoadRule]:
        parent = name.rpartition(".")[0]
        prefix = f"{parent}." if parent else ""
        rules, start = [], 0
        for i, (part, rows) in enumerate(self.parts.items()):
            own = self.cuts.get(part)
            if self.kinds:
                rules.append(LoadRule(f"{prefix}{part}.weight", f"blocks{i}", 0, rows, own or self.bytes_cut, raw=True))
            else:
                rules.append(LoadRule(f"{prefix}{part}.weight", "weight", start, rows, own or self.in_cut))
            if self.bias is not None:  # a bias has no columns to cut
                rules.append(LoadRule(f"{prefix}{part}.bias", "bias", start, rows, own))
            start += rows
        return rules

    def use_blocks(self, name: str, blocks: Mapping[str, Blocks]) -> None:
        sources = [rule.source for rule in self.load_rules(name) if rule.parameter == "weight"]
        if len(sources) > MAX_PARTS or any(source not in blocks for source in sources):
            return
        if self.in_cut is not None:  # then there is one source
            self.bytes_cut = blocks[sources[0]].cut(self.in_cut)
            if self.bytes_cut is None:
                return
        self.kinds = [blocks[source].kind for source in sources]
        for i, (source, rows) in enumerate(zip(sources, self.parts.values(), strict=True)):
            nbytes = blocks[source].row_bytes if self.bytes_cut is None else self.bytes_cut.size
            setattr(self, f"blocks{i}", parameter(rows, nbytes, dtype=torch.uint8))
        del self.weight

    def finish(self, ops: Ops) -> None:
        super().finish(ops)
        if self.in_cut is not None and self.group.rank > 0:
            self.bias = None  # a sum over ranks has it once
        if self.kinds:
            parts = [(kind, self.get_parameter(f"blocks{i}").data) for i, kind in enumerate(self.kinds)]
            self.packed = ops.pack_blocks(parts, self.bias, self.dtype)
            for i in range(len(parts)):
                delattr(self, f"blocks{i}")
            del self.bias
            return
        self.packed = ops.pack_linear(self.weight, self.bias)
        if self.packed is not None:  # which is now the only copy
            del self.weight, self.bias
