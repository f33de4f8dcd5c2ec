"""The one implicit state: what the step's forward needs besides its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.kernels.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tokens whose hidden states a model is to return: after them nothing of a last layer is computed but K and V
    of the others."""

    tokens: torch.Tensor  # int32 [S], ascending
    rows: torch.Tensor  # int32 [S]: of the block table, each token's

    def attention(self, step: AttentionMetadata, positions: torch.Tensor) -> AttentionMetadata:
        """Of these tokens as the only queries of ``step``, each an item of its own; ``positions[T]``."""
        count = len(self.rows)
        return AttentionMetadata(
            query_start=torch.arange(count + 1, dtype=torch.int32, device=self.rows.device),
            seq_lens=positions[self.tokens] + 1,
            rows=self.rows,
            block_table=step.block_table,
            slots=step.slots[self.tokens],
            num_decodes=count,
            max_query=1,
            max_seq=step.max_seq,
        )


@dataclass(slots=True)
class ForwardContext:
    """``kv_cache`` is the whole ``[layers, pages, 2, kv_heads, page_size, head_dim]`` (see `kernels.metadata`).

    ``wanted``: see there; None: all tokens are.
    """

    attention: AttentionMetadata
    kv_cache: torch.Tensor
    wanted: Wanted | None = None

    def of_wanted(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[T, C]`` of all tokens to ``[S, C]``."""
        return hidden if self.wanted is None else hidden[self.wanted.tokens]


_current: ForwardContext | None = None


def current() -> ForwardContext:
    """The context of the running forward; an error outside of one."""
    if _current is None:
        raise RuntimeError("no forward is running: wrap the call in layers.context.use(...)")
    return _current


class use:  # noqa: N801
    """Makes ``context`` the current one; nesting is an error. A class, since a generator costs each step more."""

    def __init__(self, context: ForwardContext) -> None:
        self._context = context

    def __enter__(self) -> None:
        global _current
        if _current is not None:
            raise RuntimeError("a forward is already running")
        _current = self._context

    def __exit__(self, *error: object) -> None:
        global _current
        _current = None
