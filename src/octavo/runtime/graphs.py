"""Decode steps captured once and replayed: a step of one token a row is one upload and one launch.

A graph is captured for each of a few batch sizes; a smaller batch is padded with the dummy row, whose table holds the
dummy page. Everything a replay reads lies in one int32 buffer of fixed address; nothing is patched between replays:

    token_ids | fed | positions | slots | rows | seq_lens | table_at | table_values         each [size]

A row gains at most one page in a decode step, so ``size`` table entries are enough; unused ones write the dummy row's.
The step ends with the greedy choice, fed to the next one: what a batch without other wishes needs is in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from octavo.kernels import select
from octavo.kernels.metadata import AttentionMetadata
from octavo.layers import context
from octavo.models.base import Model
from octavo.platforms.base import Platform
from octavo.runtime.tables import Ints, Tables
from octavo.types import StepPlan

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
_FIELDS = ("token_ids", "fed", "positions", "slots", "rows", "seq_lens", "table_at", "table_values")


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a replay leaves, B rows of it meant."""

    logits: torch.Tensor  # [B, tokens of the model's `vocab_part`]
    best: torch.Tensor  # [2, size], see `kernels.sampling.greedy`; already in `Tables.last_token`
    rows: torch.Tensor  # [B]


class DecodeStep:
    """The decode step of up to ``size`` rows."""

    def __init__(self, model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, size: int) -> None:
        self._tables, self._platform, self._size = tables, platform, size
        self._model, self._cache = model, cache
        self._greedy = select.ops(platform.device, model.dtype).greedy
        self._page_size = cache.shape[4]
        self._buffer = torch.zeros(len(_FIELDS) * size, dtype=torch.int32, device=platform.device)
        self._views = dict(zip(_FIELDS, torch.split(self._buffer, size), strict=True))
        self._meta = AttentionMetadata(
            query_start=torch.arange(size + 1, dtype=torch.int32, device=platform.device),
            seq_lens=self._views["seq_lens"],
            rows=self._views["rows"],
            block_table=tables.block_table,
            slots=self._views["slots"],
            num_decodes=size,
            max_query=1,
            max_seq=tables.max_len,
        )
        self._upload(_NO_ROWS, _NO_ROWS, (_NO_ROWS, _NO_ROWS))
        self._work: Callable[[], tuple[torch.Tensor, torch.Tensor]] = self.forward

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, best) of what the buffer holds, by plain launches."""
        tables, views = self._tables, self._views
        tables.block_table.view(-1)[views["table_at"]] = views["table_values"]
        last = tables.last_token[views["rows"]]
        token_ids = torch.where(views["fed"].bool(), last, views["token_ids"])
        with context.use(context.ForwardContext(self._meta, self._cache)):
            logits = self._model.own_logits(self._model(token_ids, views["positions"]))
        best = self._greedy(logits, self._model.vocab_part)
        tables.last_token[views["rows"]] = best[0]
        return logits, best

    def capture(self) -> None:
        """Makes `run` replay what `forward` launches."""
        self._work = self._platform.capture(self.forward)

    def run(self, plan: StepPlan) -> Decoded:
        """A plan in which every item has one token and samples."""
        changes = self._tables.apply(plan)
        self._upload(np.asarray(plan.rows, np.int32), np.asarray(plan.computed, np.int32), changes)
        logits, best = self._work()
        count = len(plan.rows)
        return Decoded(logits[:count], best, self._views["rows"][:count])

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


_NO_ROWS: Ints = np.zeros(0, np.int32)


class DecodeGraphs:
    """Graphs for the sizes up to ``max_rows``."""

    def __init__(self, model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, max_rows: int) -> None:
        self._sizes = _sizes(max_rows)
        # Largest first: the smaller ones then fit into its memory.
        self._steps = {size: DecodeStep(model, cache, tables, platform, size) for size in reversed(self._sizes)}
        for step in self._steps.values():
            step.capture()

    def fitting(self, plan: StepPlan) -> DecodeStep | None:
        """The smallest graph that runs ``plan``, or None if it must run eagerly."""
        count = len(plan.rows)
        if plan.starts or plan.counts[-1] != 1 or count > self._sizes[-1] or not all(plan.samples):
            return None
        if len(plan.pages) > count or any(len(grant.ids) > 1 for grant in plan.pages):
            return None
        return self._steps[next(size for size in self._sizes if size >= count)]


def warm_up(model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, max_rows: int) -> None:
    """Launches a step of each size, so that every kernel that a step may need is compiled: what capturing does too."""
    for size in _sizes(max_rows):
        DecodeStep(model, cache, tables, platform, size).forward()


def _sizes(max_rows: int) -> list[int]:
    return [size for size in SIZES if size < max_rows] + [min(max_rows, SIZES[-1])]
