"""Packs a plan into one int32 buffer, copied to the device once; everything a step needs there is a view of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels.metadata import AttentionMetadata
from octavo.platforms.base import Platform
from octavo.runtime.tables import Ints, Tables
from octavo.types import StepPlan

Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class StepInputs:
    """Device tensors of one step; T tokens, S items that sample."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    logits_at: torch.Tensor  # [S]: the last token of each item that samples
    sampled_rows: torch.Tensor  # [S]
    attention: AttentionMetadata


def pack(plan: StepPlan, tables: Tables, platform: Platform, page_size: int) -> StepInputs:
    """Applies the plan's deltas to ``tables`` and lays out its tokens, item after item."""
    table_at, table_values = tables.apply(plan)
    rows, counts, computed = (np.asarray(x, np.int32) for x in (plan.rows, plan.counts, plan.computed))
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(computed - starts[:-1], counts)
    pages = tables.host_table[np.repeat(rows, counts), positions // page_size]
    token_ids, fed = _token_ids(plan, tables, rows, computed, starts)
    samples = np.asarray(plan.samples, bool)
    parts = {
        "token_ids": token_ids,
        "positions": positions,
        "slots": pages * page_size + positions % page_size,
        "rows": rows,
        "query_start": starts,
        "seq_lens": computed + counts,
        "logits_at": starts[1:][samples] - 1,
        "sampled_rows": rows[samples],
        "fed_at": starts[:-1][fed],
        "fed_rows": rows[fed],
        "table_at": table_at,
        "table_values": table_values,
    }
    views = _upload(parts, platform)
    if len(table_at):
        tables.block_table.view(-1)[views["table_at"]] = views["table_values"]
    if fed.any():
        views["token_ids"][views["fed_at"]] = tables.last_token[views["fed_rows"]]
    attention = AttentionMetadata(
        query_start=views["query_start"],
        seq_lens=views["seq_lens"],
        rows=views["rows"],
        block_table=tables.block_table,
        slots=views["slots"],
        num_decodes=int((counts == 1).sum()),
        max_query=int(counts.max()),
        max_seq=int((computed + counts).max()),
    )
    return StepInputs(views["token_ids"], views["positions"], views["logits_at"], views["sampled_rows"], attention)


def _token_ids(plan: StepPlan, tables: Tables, rows: Ints, computed: Ints, starts: Ints) -> tuple[Ints, Bools]:
    """(ids[T] as far as the host knows them, fed[B]: items whose one token is the row's last sampled one)."""
    token_ids = np.zeros(starts[-1], np.int32)
    fed = np.zeros(len(rows), np.int32)
    single = next((b for b, count in enumerate(plan.counts) if count > 1), len(rows))
    tables.feed(rows[:single], computed[:single], token_ids[:single], fed[:single])
    for b in range(single, len(rows)):
        known = tables.known[plan.rows[b]]
        token_ids[starts[b] : starts[b + 1]] = known[plan.computed[b] : plan.computed[b] + plan.counts[b]]
    return token_ids, fed.astype(bool)


def _upload(parts: dict[str, Ints], platform: Platform) -> dict[str, torch.Tensor]:
    buffer = platform.host_buffer(sum(len(part) for part in parts.values()))
    np.concatenate(list(parts.values()), out=buffer.numpy())
    device = buffer.to(platform.device, non_blocking=True)
    return dict(zip(parts, torch.split(device, [len(part) for part in parts.values()]), strict=True))
