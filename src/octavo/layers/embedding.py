"""Token embeddings, the head that may share their weight, and how ranks divide the vocabulary between them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from octavo.kernels.select import Ops, PackedLinear
from octavo.layers.base import Blocks, Layer, LoadRule, parameter
from octavo.parallel.group import Group, current
from octavo.parallel.shards import Cut, cut


class Embedding(Layer):
    """``weight[ids]`` for ``ids[T]``. With ``tied``, `logits` multiplies by the same, single copy of the weight.

    Each rank holds a range of the vocabulary.
    """

    def __init__(self, vocab_size: int, size: int, *, tied: bool = False, dtype: torch.dtype) -> None:
        super().__init__()
        self.tied = tied
        self.vocab_size = vocab_size
        self.group = current()
        self.cut = vocab_cut(vocab_size, self.group)
        self.weight = parameter(vocab_size if self.cut is None else self.cut.size, size, dtype=dtype)
        self.packed: PackedLinear | None = None
        self.dtype = dtype
        self.kind: str | None = None  # of blocks0, which stands in the place of weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.cut is None:
            return self._rows(ids)
        local = ids - self.cut.first
        own = (local >= 0) & (local < self.cut.size)
        rows = self._rows(local.clamp(0, self.cut.size - 1))
        return self.group.all_reduce(rows.masked_fill_(~own.unsqueeze(-1), 0))

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return self.packed.rows(ids)
        return F.embedding(ids, self.weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[S, C]`` to ``[S, vocab]``, when tied."""
        if not self.tied:
            raise RuntimeError("this embedding is not the model's head")
        own = self.packed(hidden) if self.packed is not None else self.ops.linear(hidden, self.weight)
        return gather_vocab(own, self.vocab_size, self.group)

    def load_rules(self, name: str) -> list[LoadRule]:
        rows = self.vocab_size if self.cut is None else self.cut.size
        if self.kind is not None:
            return [LoadRule(f"{name}.weight", "blocks0", 0, rows, self.cut, raw=True)]
        return [LoadRule(f"{name}.weight", "weight", 0, rows, self.cut)]

    def use_blocks(self, name: str, blocks: Mapping[str, Blocks]) -> None:
        found = blocks.get(f"{name}.weight")
        if found is not None:
            self.kind, rows = found.kind, self.weight.shape[0]
            self.blocks0 = parameter(rows, found.row_bytes, dtype=torch.uint8)
            del self.weight

    def finish(self, ops: Ops) -> None:
        super().finish(ops)
        if self.kind is not None:
            self.packed = ops.pack_blocks([(self.kind, self.blocks0.data)], None, self.dtype)
            del self.blocks0
            return
        self.packed = ops.pack_linear(self.weight, None) if self.tied else None
        if self.packed is not None:
            del self.weight


def vocab_cut(vocab_size: int, group: Group) -> Cut | None:
    """The range of tokens that this rank holds, None alone. The last rank's may be shorter."""
    return cut(0, vocab_size, group.rank, group.size) if group.size > 1 else None


def gather_vocab(own: torch.Tensor, vocab_size: int, group: Group) -> torch.Tensor:
    """Logits ``[S, vocab_size]`` from each rank's, which are those of its `vocab_cut`."""
    if group.size == 1:
        return own
    share = -(-vocab_size // group.size)
    if own.shape[-1] < share:
        own = F.pad(own, (0, share - own.shape[-1]))
    return group.all_gather(own)[..., :vocab_size]
