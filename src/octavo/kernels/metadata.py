"""What attention must know about a step, and the layout of the KV cache.

KV cache of the model: ``[layers, pages, 2, kv_heads, page_size, head_dim]``; index 0 of dimension 2 is K, 1 is V. A
layer sees its own ``[pages, 2, kv_heads, page_size, head_dim]``. One (page, K or V, head) is contiguous: a tile of
``page_size x head_dim``, which is what both the CPU and the GPU kernels stream. Slot s is token s % page_size of
page s // page_size. The last page is a dummy that padding may write to; the pool never hands it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(slots=True)
class AttentionMetadata:
    """Item b of the batch has queries ``query_start[b] : query_start[b+1]`` of the flat token axis and row ``rows[b]``
    of the block table; after this step it holds ``seq_lens[b]`` tokens, the queries being the last of them.

    All tensors are int32 and on the model's device. The first ``num_decodes`` items have one query each. None: only the
    device knows which items have one query, and which have none, being there to fill a captured step.
    """

    query_start: torch.Tensor  # [B + 1]
    seq_lens: torch.Tensor  # [B]
    rows: torch.Tensor  # [B]
    block_table: torch.Tensor  # [max rows, max pages]: the whole table; entry (rows[b], i) is the page of tokens i*ps …
    slots: torch.Tensor  # [T]: where each new token's K and V go
    num_decodes: int | None
    max_query: int
    max_seq: int


@dataclass(frozen=True, slots=True)
class HeadChange:
    """What becomes of query and key heads before attention, each part optional: an RMS norm, then a rotation."""

    q_norm: torch.Tensor | None  # [D]; both norms or none
    k_norm: torch.Tensor | None
    eps: float
    cos_sin: torch.Tensor | None  # as `reference.rotary` takes it


class PlaceHeads(Protocol):
    """Changes q and k, stores k and v in their slots, returns q."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        change: HeadChange,
        positions: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """``q[T, H, D]``, ``k, v[T, KH, D]`` may be slices of a wider row; ``positions, slots[T]`` int32."""
        ...


@dataclass(frozen=True, slots=True)
class Groups:
    """Which K of E experts each of a batch's T tokens passes: the pairs of token and expert, sorted by expert.

    Rows ``starts[e] : starts[e + 1]`` of what is sorted belong to expert e. A pair whose expert is none of 0 to E - 1
    has no row there. All tensors are int32.
    """

    rows: torch.Tensor  # [T K]: of a sorted row, its token
    places: torch.Tensor  # [T, K]: of a pair, its sorted row; of one without, a number below 0
    starts: torch.Tensor  # [E + 1]
