"""Token embeddings, the head that may share their weight, and how ranks divide the vocabulary between them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from octavo.kernels.sampling import WHOLE, VocabPart
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
            return self.ops.embed(ids, self.weight, None) if self.packed is None else self.packed.rows(ids)
        if self.packed is None:
            return self.group.all_reduce(self.ops.embed(ids, self.weight, self.cut.first))
        local = ids - self.cut.first
        own = (local >= 0) & (local < self.cut.size)
        rows = self.packed.rows(local.clamp(0, self.cut.size - 1))
        return self.group.all_reduce(rows.masked_fill_(~own.unsqueeze(-1), 0))

    def own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[S, C]`` to those of the tokens that this rank holds, when tied."""
        if not self.tied:
            raise RuntimeError("this embedding is not the model's head")
        return self.packed(hidden) if self.packed is not None else self.ops.linear(hidden, self.weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[S, C]`` to ``[S, vocab]``, when tied."""
        return gather_vocab(
            equal_parts(self.own_logits(hidden), self.vocab_size, self.group), self.vocab_size, self.group
        )

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


def vocab_part(vocab_size: int, group: Group) -> VocabPart:
    """This rank's, for the choice of a token without the others' logits."""
    found = vocab_cut(vocab_size, group)
    return WHOLE if found is None else VocabPart(found.first, group.all_gather)


def equal_parts(own: torch.Tensor, vocab_size: int, group: Group) -> torch.Tensor:
    """``own``, the logits of this rank's `vocab_cut`, as many as any rank's: what is missing is -inf."""
    missing = -(-vocab_size // group.size) - own.shape[-1]
    return F.pad(own, (0, missing), value=float("-inf")) if missing else own


def gather_vocab(own: torch.Tensor, vocab_size: int, group: Group) -> torch.Tensor:
    """Logits ``[S, vocab_size]`` from each rank's `equal_parts`."""
    return own if group.size == 1 else group.all_gather(own)[..., :vocab_size]
