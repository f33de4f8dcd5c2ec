"""What a step's forward reads, as one int32 buffer copied to the device once; everything there is a view of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from octavo.kernels.metadata import AttentionMetadata
from octavo.kernels.select import Ops
from octavo.layers import context
from octavo.models.base import Model
from octavo.platforms.base import Platform
from octavo.runtime.tables import NONE, Ints, Tables
from octavo.types import StepPlan

Arrays = dict[str, Ints]
"""The parts of the buffer on the host: fields of `StepInputs` and of its ``attention``."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Device tensors of one step, int32; T tokens, S samples, P changed entries of the block table."""

    token_ids: torch.Tensor  # [T]
    fed_rows: torch.Tensor  # [T]: the row whose last sampled token is meant instead, or -1
    positions: torch.Tensor  # [T]
    logits_at: torch.Tensor  # [S]: tokens after which one is sampled, the last of their items
    sampled_rows: torch.Tensor  # [S]
    table_at: torch.Tensor  # [P], of the flat table
    table_values: torch.Tensor  # [P]
    settings: torch.Tensor  # `kernels.sampling.Setting` of each sample, flat, or empty where nobody has sent them
    attention: AttentionMetadata

    def forward(
        self, model: Model, ops: Ops, tables: Tables, cache: torch.Tensor, *, every: bool = True
    ) -> torch.Tensor:
        """Hidden states of all tokens, or else of those at ``logits_at``; the tables on the device take the changes
        before."""
        self.take_in(ops, tables)
        return self.run(model, cache, None if every else context.Wanted(self.logits_at, self.sampled_rows))

    def take_in(self, ops: Ops, tables: Tables) -> None:
        """Completes ``token_ids``, and changes the block table."""
        ops.take_in_(
            self.token_ids,
            self.fed_rows,
            tables.last_token,
            tables.block_table.view(-1),
            self.table_at,
            self.table_values,
        )

    def run(self, model: Model, cache: torch.Tensor, wanted: context.Wanted | None = None) -> torch.Tensor:
        """Hidden states of what is taken in, see `layers.context.ForwardContext`."""
        with context.use(context.ForwardContext(self.attention, cache, wanted)):
            hidden: torch.Tensor = model(self.token_ids, self.positions)
        return hidden


def lay_out(plan: StepPlan, tables: Tables, page_size: int, settings: Ints = NONE) -> Arrays:
    """Applies the plan's deltas to ``tables`` and lays out its tokens, item after item; for ``settings`` see
    `StepInputs`.

    To attention each token of an item with drafts is an item of its own, so that it is summed as it is without drafts.
    """
    table_at, table_values = tables.apply(plan)
    rows, counts, computed = (np.asarray(x, np.int32) for x in (plan.rows, plan.counts, plan.computed))
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(computed - starts[:-1], counts)
    pages = tables.host_table[np.repeat(rows, counts), positions // page_size]
    token_ids, fed_rows = _token_ids(plan, tables, rows, computed, starts)
    samples = np.asarray(plan.samples, np.int32)
    ends = np.cumsum(samples, dtype=np.int32)  # of each item's samples
    pieces = np.where(samples == counts, counts, 1)
    sizes = np.repeat(counts // pieces, pieces)
    query_start = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=query_start[1:])
    return {
        "token_ids": token_ids,
        "fed_rows": fed_rows,
        "positions": positions,
        "slots": pages * page_size + positions % page_size,
        "rows": np.repeat(rows, pieces),
        "query_start": query_start,
        "seq_lens": positions[query_start[1:] - 1] + 1,
        "logits_at": np.arange(samples.sum(), dtype=np.int32) + np.repeat(starts[1:] - ends, samples),
        "sampled_rows": np.repeat(rows, samples),
        "table_at": table_at,
        "table_values": table_values,
        "settings": settings,
    }


def send(parts: Arrays, tables: Tables, platform: Platform) -> StepInputs:
    """``parts`` on the device."""
    counts = np.diff(parts["query_start"])
    buffer = platform.host_buffer(sum(len(part) for part in parts.values()))
    np.concatenate(list(parts.values()), out=buffer.numpy())
    device = buffer.to(platform.device, non_blocking=True)
    views = dict(zip(parts, torch.split(device, [len(part) for part in parts.values()]), strict=True))
    return inputs_of(
        views,
        tables,
        num_decodes=int((counts == 1).sum()),
        max_query=int(counts.max()),
        max_seq=int(parts["seq_lens"].max()),
    )


def inputs_of(
    views: dict[str, torch.Tensor], tables: Tables, *, num_decodes: int | None, max_query: int, max_seq: int
) -> StepInputs:
    """From the parts of a buffer on the device; for the numbers see `AttentionMetadata`."""
    attention = AttentionMetadata(
        query_start=views["query_start"],
        seq_lens=views["seq_lens"],
        rows=views["rows"],
        block_table=tables.block_table,
        slots=views["slots"],
        num_decodes=num_decodes,
        max_query=max_query,
        max_seq=max_seq,
    )
    own = ("token_ids", "fed_rows", "positions", "logits_at", "sampled_rows", "table_at", "table_values", "settings")
    return StepInputs(**{name: views[name] for name in own}, attention=attention)


def _token_ids(plan: StepPlan, tables: Tables, rows: Ints, computed: Ints, starts: Ints) -> tuple[Ints, Ints]:
    """(ids[T] as far as the host knows them, fed_rows[T]), see `StepInputs`."""
    token_ids = np.zeros(starts[-1], np.int32)
    fed_rows = np.full(starts[-1], -1, np.int32)
    single = next((b for b, count in enumerate(plan.counts) if count > 1), len(rows))
    tables.feed(plan, rows[:single], computed[:single], token_ids[:single], fed_rows[:single])
    for b in range(single, len(rows)):
        known = tables.known[plan.rows[b]][plan.computed[b] : plan.computed[b] + plan.counts[b]]
        token_ids[starts[b] : starts[b + 1]] = plan.inputs.get(b, known)
    return token_ids, fed_rows


class HostSteps:
    """Inputs of steps in which every row goes on with the token it sampled last, where the device is the host.

    They are kept for each number of rows and filled in place: made anew for each token, they cost a small model more
    than its attention. Numbers are worked out one by one: behind a forward, which has emptied the processor's caches,
    each function of numpy takes as long as a hundred of them.
    """

    def __init__(self, tables: Tables, page_size: int) -> None:
        self._tables = tables
        self._page_size = page_size
        self._last_token: Ints = tables.last_token.numpy()
        self._kept: dict[int, tuple[Arrays, StepInputs]] = {}

    def fill(self, plan: StepPlan) -> StepInputs | None:
        """As `lay_out` and `send`, with nothing left to take in; what it returned before for as many rows is
        overwritten. None, and nothing done, for other plans."""
        if plan.starts or plan.counts[-1] != 1 or not all(plan.samples):  # single tokens come first
            return None
        known, table, size = self._tables.known, self._tables.host_table, self._page_size
        places = list(zip(plan.rows, plan.computed, strict=True))
        if any(at < len(known[row]) for row, at in places):
            return None
        self._tables.apply(plan)
        arrays, inputs = self._kept.get(len(places)) or self._make(len(places))
        arrays["rows"][:] = plan.rows
        arrays["positions"][:] = plan.computed
        arrays["slots"][:] = [table.item(row, at // size) * size + at % size for row, at in places]
        arrays["seq_lens"][:] = [at + 1 for _, at in places]
        np.take(self._last_token, arrays["rows"], out=arrays["token_ids"])
        for b, tokens in plan.inputs.items():
            arrays["token_ids"][b] = tokens[0]
        return inputs

    def _make(self, count: int) -> tuple[Arrays, StepInputs]:
        names = ("token_ids", "positions", "slots", "rows", "seq_lens")
        arrays = {name: np.zeros(count, np.int32) for name in names}
        views = {name: torch.from_numpy(array) for name, array in arrays.items()}
        views |= {"query_start": torch.arange(count + 1, dtype=torch.int32), "sampled_rows": views["rows"]}
        views["logits_at"] = views["query_start"][:count]
        unused = ("fed_rows", "table_at", "table_values", "settings")
        views |= dict.fromkeys(unused, torch.zeros(0, dtype=torch.int32))
        inputs = inputs_of(views, self._tables, num_decodes=count, max_query=1, max_seq=self._tables.max_len)
        self._kept[count] = arrays, inputs
        return arrays, inputs
