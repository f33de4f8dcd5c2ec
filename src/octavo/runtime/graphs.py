"""Steps captured once and replayed: one upload and one launch, where the host would need longer than the card.

A step of one token a row is captured whole, for each of a few batch sizes; it ends with the greedy choice, fed to the
next one: what a batch without other wishes needs is in the graph. Of steps with prompts the forward is captured, for
a few numbers of tokens; their logits differ in number and are few.

Smaller steps are padded: with items of the dummy row, whose table holds the dummy page, and which have one query in
the first kind and none in the second. Everything a replay reads lies in one int32 buffer of fixed address.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from octavo.kernels import select
from octavo.kernels.sampling import Setting
from octavo.models.base import Model
from octavo.platforms.base import Captured, Platform
from octavo.runtime.inputs import Arrays, StepInputs, inputs_of
from octavo.runtime.memory import step_bytes
from octavo.runtime.tables import NONE, Ints, Tables
from octavo.types import StepPlan

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
MOST_WORK = 10**13  # operations of a step with prompts: with more, the card takes longer than the host to launch it
FEW_ROWS = 64  # products of no more rows have kernels for 16, 32 and 64 of them
TABLE_CHANGES = 1024  # entries of the block table that such a step may change

Fields = dict[str, int]
"""The parts of a buffer, int32, by their sizes."""


class _Buffer:
    """Memory of fixed address that a captured step reads; what nobody asked for is the dummy row's."""

    def __init__(self, fields: Fields, tables: Tables, platform: Platform, page_size: int) -> None:
        self._platform = platform
        padding = {
            "fed_rows": -1,
            "slots": tables.dummy_page * page_size,
            "rows": tables.dummy_row,
            "seq_lens": 1,
            "table_at": tables.dummy_entry,
            "table_values": tables.dummy_page,
        }
        self._empty = np.concatenate([np.full(size, padding.get(name, 0), np.int32) for name, size in fields.items()])
        self._starts = dict(zip(fields, np.cumsum([0, *fields.values()]).tolist(), strict=False))
        self._device = torch.zeros(len(self._empty), dtype=torch.int32, device=platform.device)
        self.views = dict(zip(fields, torch.split(self._device, list(fields.values())), strict=True))
        self.fill({})

    def fill(self, parts: Arrays) -> None:
        """Uploads ``parts``, each padded to its size."""
        host = self._platform.host_buffer(len(self._empty))
        array = host.numpy()
        array[:] = self._empty
        for name, part in parts.items():
            start = self._starts[name]
            array[start : start + len(part)] = part
        self._device.copy_(host, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a replay leaves, B rows of it meant."""

    logits: torch.Tensor  # [B, tokens of the model's `vocab_part`]
    best: torch.Tensor  # [2, size], see `kernels.sampling.greedy`; already in `Tables.last_token`
    rows: torch.Tensor  # [B]
    settings: torch.Tensor  # as of `StepInputs`


class DecodeStep:
    """The decode step of up to ``size`` rows.

    A row gains at most one page in it, so ``size`` entries of the block table are enough.
    """

    def __init__(self, model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, size: int) -> None:
        self._tables, self._platform, self._model, self._cache = tables, platform, model, cache
        self._ops = select.ops(platform.device, model.dtype)
        self._page_size = cache.shape[4]
        names = ("token_ids", "fed_rows", "positions", "slots", "rows", "seq_lens", "table_at", "table_values")
        fields = {**dict.fromkeys(names, size), "settings": len(Setting) * size}
        self._buffer = _Buffer(fields, tables, platform, self._page_size)
        starts = torch.arange(size + 1, dtype=torch.int32, device=platform.device)
        views = {**self._buffer.views, "query_start": starts, "logits_at": starts[1:] - 1}
        views["sampled_rows"] = views["rows"]
        self._inputs = inputs_of(views, tables, num_decodes=size, max_query=1, max_seq=tables.max_len)
        self._work: Callable[[], tuple[torch.Tensor, torch.Tensor]] = self.forward

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, best) of what the buffer holds, by plain launches."""
        logits = self._model.own_logits(self._inputs.forward(self._model, self._ops, self._tables, self._cache))
        best = self._ops.greedy(logits, self._model.vocab_part)
        self._ops.put_(self._tables.last_token, self._inputs.sampled_rows, best[0])
        return logits, best

    def capture(self) -> None:
        """Makes `run` replay what `forward` launches."""
        self._work = self._platform.capture(self.forward)

    def run(self, plan: StepPlan, settings: Ints) -> Decoded:
        """A plan in which every item has one token and samples; for ``settings`` see `StepInputs`."""
        changes = self._tables.apply(plan)
        self._upload(plan, changes, settings)
        logits, best = self._work()
        count, inputs = len(plan.rows), self._inputs
        return Decoded(logits[:count], best, inputs.sampled_rows[:count], inputs.settings[: len(settings)])

    def _upload(self, plan: StepPlan, changes: tuple[Ints, Ints], settings: Ints) -> None:
        tables, page_size = self._tables, self._page_size
        rows, computed = np.asarray(plan.rows, np.int32), np.asarray(plan.computed, np.int32)
        token_ids, fed_rows = np.zeros_like(rows), np.empty_like(rows)
        tables.feed(plan, rows, computed, token_ids, fed_rows)
        slots = tables.host_table[rows, computed // page_size] * page_size + computed % page_size
        parts = {
            "token_ids": token_ids,
            "fed_rows": fed_rows,
            "positions": computed,
            "slots": slots,
            "rows": rows,
            "seq_lens": computed + 1,
            "table_at": changes[0],
            "table_values": changes[1],
            "settings": settings,
        }
        self._buffer.fill(parts)


class PromptForward:
    """The forward of up to ``tokens`` tokens of up to ``rows`` items."""

    def __init__(
        self, model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, tokens: int, rows: int
    ) -> None:
        self._tables, self._platform, self._model, self._cache = tables, platform, model, cache
        self._ops, self.rows = select.ops(platform.device, model.dtype), rows
        of_tokens = ("token_ids", "fed_rows", "positions", "slots", "logits_at", "sampled_rows")
        of_items = ("rows", "seq_lens")
        changes = dict.fromkeys(("table_at", "table_values"), TABLE_CHANGES)
        fields = {**dict.fromkeys(of_tokens, tokens), **dict.fromkeys(of_items, rows), "query_start": rows + 1}
        fields["settings"] = len(Setting) * rows
        self._buffer = _Buffer({**fields, **changes}, tables, platform, cache.shape[4])
        self._inputs = inputs_of(self._buffer.views, tables, num_decodes=None, max_query=tokens, max_seq=tables.max_len)
        self._work: Callable[[], torch.Tensor] = self.forward

    def forward(self) -> torch.Tensor:
        """Hidden states of what the buffer holds, by plain launches."""
        return self._inputs.forward(self._model, self._ops, self._tables, self._cache)

    def capture(self) -> None:
        """Makes `run` replay what `forward` launches."""
        self._work = self._platform.capture(self.forward)

    def run(self, parts: Arrays) -> tuple[torch.Tensor, StepInputs]:
        """(hidden states, inputs) of a step; of the inputs what comes after the forward has its own sizes."""
        starts = np.full(self.rows + 1, len(parts["token_ids"]), np.int32)  # items without a query are at the end
        starts[: len(parts["query_start"])] = parts["query_start"]
        if len(parts["settings"]) > len(Setting) * self.rows:  # drafts are sampled, too
            parts = {**parts, "settings": NONE}
        self._buffer.fill({**parts, "query_start": starts})
        views = {**self._buffer.views}
        for name in ("logits_at", "sampled_rows", "settings"):
            views[name] = views[name][: len(parts[name])]
        attention = self._inputs.attention
        inputs = inputs_of(
            views, self._tables, num_decodes=None, max_query=attention.max_query, max_seq=attention.max_seq
        )
        return self._work(), inputs


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


class PromptGraphs:
    """Graphs for steps of up to ``max_tokens`` tokens that the card has done before the host could launch them."""

    def __init__(
        self, model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, max_rows: int, max_tokens: int
    ) -> None:
        self._tokens = _token_counts(model, max_tokens)
        self._forwards: dict[int, PromptForward] = {}
        for tokens in reversed(self._tokens):
            forward = PromptForward(model, cache, tables, platform, tokens, min(tokens, max(max_rows, TOKENS[0])))
            forward.capture()
            self._forwards[tokens] = forward

    def fitting(self, parts: Arrays) -> PromptForward | None:
        """The smallest graph that runs a step, or None if it must run eagerly."""
        count = len(parts["token_ids"])
        if count > self._tokens[-1] or len(parts["table_at"]) > TABLE_CHANGES:
            return None
        forward = self._forwards[next(tokens for tokens in self._tokens if tokens >= count)]
        return forward if len(parts["rows"]) <= forward.rows else None


def captured(model: Model, max_rows: int, max_tokens: int, ranks: int) -> Captured:
    """What `DecodeGraphs` and, with one rank, `PromptGraphs` keep. Each step leaves its result; what is between is
    memory that all share, since one runs at a time."""
    sizes = _sizes(max_rows) if model.config.has_head else []
    tokens = _token_counts(model, max_tokens) if ranks == 1 else []
    logits, hidden = -(-model.config.vocab_size // ranks), model.config.hidden_size
    values = sum(sizes) * logits + sum(tokens) * hidden
    return Captured(min(1.0, max(sizes + tokens) / max_tokens), values * model.dtype.itemsize)


def warm_up(model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, max_rows: int) -> None:
    """Launches a step of each size, so that every kernel that a step may need is compiled: what capturing does too.

    A piece of a prompt may have more tokens than there are rows, hence larger steps, too."""
    for size in sorted({*_sizes(max_rows), *(size for size in SIZES if size <= FEW_ROWS)}):
        DecodeStep(model, cache, tables, platform, size).forward()


def warm_up_prompts(model: Model, cache: torch.Tensor, tables: Tables, platform: Platform, max_rows: int) -> None:
    """As `warm_up` for what `PromptGraphs` captures; with few items their keys are split."""
    for rows in {min(TOKENS[0], max_rows), max_rows}:
        PromptForward(model, cache, tables, platform, TOKENS[0], rows).forward()


def _token_counts(model: Model, max_tokens: int) -> list[int]:
    most = min(max_tokens, MOST_WORK // max(1, step_bytes(model)))
    return [tokens for tokens in TOKENS if tokens <= most] or [min(most, TOKENS[0])]


def _sizes(max_rows: int) -> list[int]:
    return [size for size in SIZES if size < max_rows] + [min(max_rows, SIZES[-1])]
