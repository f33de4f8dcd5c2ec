"""Decode steps captured once and replayed: a step of one token a row is one upload and one launch.

A graph is captured for each of a few batch sizes; a smaller batch is padded with the dummy row, whose table holds the
dummy page. Everything a replay reads lies in one int32 buffer of fixed address; nothing is patched between replays:

    token_ids | fed | positions | slots | rows | seq_lens | table_at | table_values         each [size]

A row gains at most one page in a decode step, so ``size`` table entries are enough; unused ones write the dummy row's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from octavo.kernels.metadata import AttentionMetadata
from octavo.layers import context
from octavo.models.base import Model
from octavo.platforms.base import Platform
from octavo.runtime.tables import Ints, Tables
from octavo.types import StepPlan

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_FIELDS = ("token_ids", "fed", "positions", "slots", "rows", "seq_lens", "table_at", "table_values")


class DecodeGraph:
    """The decode step of up to ``size`` rows, captured at construction."""

    def __init__(self, model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, size: int) -> None:
        self._tables, self._platform, self._size = tables, platform, size
        self._page_size, self._max_len = cache.shape[4], tables.max_len
        self._buffer = torch.zeros(len(_FIELDS) * size, dtype=torch.int32, device=platform.device)
        views = dict(zip(_FIELDS, torch.split(self._buffer, size), strict=True))
        self._rows = views["rows"]
        meta = AttentionMetadata(
            query_start=torch.arange(size + 1, dtype=torch.int32, device=platform.device),
            seq_lens=views["seq_lens"],
            rows=views["rows"],
            block_table=tables.block_table,
            slots=views["slots"],
            num_decodes=size,
            max_query=1,
            max_seq=self._max_len,
        )

        def forward() -> torch.Tensor:
            tables.block_table.view(-1)[views["table_at"]] = views["table_values"]
            last = tables.last_token[views["rows"]]
            token_ids = torch.where(views["fed"].bool(), last, views["token_ids"])
            with context.use(context.ForwardContext(meta, cache)):
                return model.logits(model(token_ids, views["positions"]))

        self._upload(np.zeros(0, np.int32), np.zeros(0, np.int32), tables.apply(_NOTHING))
        self._replay: Callable[[], torch.Tensor] = platform.capture(forward)

    def run(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B, vocab], rows [B]) of a plan in which every item has one token and samples."""
        changes = self._tables.apply(plan)
        self._upload(np.asarray(plan.rows, np.int32), np.asarray(plan.computed, np.int32), changes)
        count = len(plan.rows)
        return self._replay()[:count], self._rows[:count]

    def _upload(self, rows: Ints, computed: Ints, changes: tuple[Ints, Ints]) -> None:
        tables, page_size, count = self._tables, self._page_size, len(rows)
        host = self._platform.host_buffer(len(self._buffer))
        fields = dict(zip(_FIELDS, host.numpy().reshape(len(_FIELDS), self._size), strict=True))
        fields["token_ids"][:], fields["fed"][:], fields["positions"][:] = 0, 0, 0
        fields["rows"][:], fields["seq_lens"][:] = tables.dummy_row, 1
        fields["slots"][:] = tables.dummy_page * page_size
        fields["table_at"][:], fields["table_values"][:] = tables.dummy_entry, tables.dummy_page
        tables.feed(rows, computed, fields["token_ids"][:count], fields["fed"][:count])
        fields["positions"][:count] = computed
        fields["rows"][:count] = rows
        fields["seq_lens"][:count] = computed + 1
        page = tables.host_table[rows, computed // page_size]
        fields["slots"][:count] = page * page_size + computed % page_size
        for name, values in zip(("table_at", "table_values"), changes, strict=True):
            fields[name][: len(values)] = values
        self._buffer.copy_(host, non_blocking=True)


_NOTHING = StepPlan(step=0, starts=[], pages=[], rows=[], counts=[], computed=[], samples=[], ended=[])


class DecodeGraphs:
    """Graphs for the sizes up to ``max_rows``; none where the platform captures nothing."""

    def __init__(self, model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, max_rows: int) -> None:
        sizes = [size for size in SIZES if size < max_rows] + [min(max_rows, SIZES[-1])]
        # Largest first: the smaller ones then fit into its memory.
        self._graphs = {size: DecodeGraph(model, cache, tables, platform, size) for size in reversed(sizes)}
        self._sizes = sizes

    def fitting(self, plan: StepPlan) -> DecodeGraph | None:
        """The smallest graph that runs ``plan``, or None if it must run eagerly."""
        count = len(plan.rows)
        if plan.starts or plan.counts[-1] != 1 or count > self._sizes[-1] or not all(plan.samples):
            return None
        if len(plan.pages) > count or any(len(grant.ids) > 1 for grant in plan.pages):
            return None
        return self._graphs[next(size for size in self._sizes if size >= count)]
