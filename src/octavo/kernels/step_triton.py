"""What a step does besides its model, in Triton: it takes in what changed, and leaves its tokens for the next one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.pdl import chained, release, wait

_BLOCK = 256


@triton.jit(
    do_not_specialize=["tokens", "changes"],
    do_not_specialize_on_alignment=["token_ptr", "fed_ptr", "at_ptr", "value_ptr"],
)
def _take_in_kernel(
    token_ptr, fed_ptr, last_ptr, table_ptr, at_ptr, value_ptr, tokens, changes,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    release(CHAINED)
    wait(CHAINED)
    changed = i < changes
    tl.store(table_ptr + tl.load(at_ptr + i, changed, 0), tl.load(value_ptr + i, changed, 0), changed)
    fed = tl.load(fed_ptr + i, i < tokens, -1)
    tl.store(token_ptr + i, tl.load(last_ptr + fed, fed >= 0, 0), fed >= 0)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["at_ptr", "value_ptr"])
def _put_kernel(target_ptr, at_ptr, value_ptr, count, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    release(CHAINED)
    wait(CHAINED)
    live = i < count
    tl.store(target_ptr + tl.load(at_ptr + i, live, 0), tl.load(value_ptr + i, live, 0), live)


def take_in_(
    token_ids: torch.Tensor,
    fed_rows: torch.Tensor,
    last_token: torch.Tensor,
    table: torch.Tensor,
    table_at: torch.Tensor,
    table_values: torch.Tensor,
) -> None:
    """See `reference.take_in_`."""
    tokens, changes, chain = len(token_ids), len(table_at), chained(token_ids.device)
    _take_in_kernel[(triton.cdiv(max(tokens, changes), _BLOCK),)](
        token_ids, fed_rows, last_token, table, table_at, table_values, tokens, changes, _BLOCK, chain,
        num_warps=4, launch_pdl=chain,
    )  # fmt: skip


def put_(target: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
    """See `reference.put_`."""
    chain = chained(target.device)
    if len(at):
        _put_kernel[(triton.cdiv(len(at), _BLOCK),)](
            target, at, values, len(at), _BLOCK, chain, num_warps=4, launch_pdl=chain
        )
