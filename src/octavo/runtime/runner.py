"""Executes step plans on one device: plan to inputs, forward, logits, sampled tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from octavo.kernels import select
from octavo.kernels.metadata import AttentionMetadata
from octavo.layers import context
from octavo.models.base import Model
from octavo.parallel.group import SINGLE, Group
from octavo.platforms.base import Platform
from octavo.runtime.base import Pending, TokenMask
from octavo.runtime.graphs import DecodeGraphs, PromptGraphs, warm_up, warm_up_prompts
from octavo.runtime.inputs import HostSteps, StepInputs, lay_out, send
from octavo.runtime.memory import cache_dtype
from octavo.runtime.sampled import Sampled
from octavo.runtime.sampler import NoSampler, Sampler
from octavo.runtime.sampling_rows import SampleItem
from octavo.runtime.tables import NONE, Ints, Tables
from octavo.types import StepPlan, StepResult, TokenLogprobs

PROMPT_LOGITS_ROWS = 128  # logits of a prompt are computed in pieces: a row is a whole vocabulary in float32


@dataclass(slots=True)
class Launched:
    """A step between its forward and the reading of its tokens."""

    sampled: Sampled | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]

    def ready(self) -> bool:
        """Whether `result` need not wait."""
        return self.sampled is None or self.sampled.ready()

    def result(self) -> StepResult:
        tokens, logprobs, bad = ([], {}, []) if self.sampled is None else self.sampled.finish()
        return StepResult(tokens=tokens, logprobs=logprobs, prompt_logprobs=self.prompt_logprobs, bad=bad)


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """``max_rows`` sequences of up to ``max_len`` tokens, ``max_tokens`` in a step."""

    max_rows: int
    max_tokens: int
    max_len: int


class Runner:
    """``cache`` as in `kernels.metadata`. With ``graphs``, steps are captured now where the platform can.

    Of a ``group``, rank 0 samples. Tokens that other ranks do not find themselves are broadcast to them; they call
    `take_tokens` for it, which ``announce`` tells them.
    """

    def __init__(
        self,
        model: Model,
        cache: torch.Tensor,
        platform: Platform,
        limits: RunnerLimits,
        *,
        graphs: bool = True,
        group: Group = SINGLE,
        announce: Callable[[], None] | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._platform = platform
        self._page_size = cache.shape[4]
        dummy_page = cache.shape[1] - 1
        self._tables = Tables(limits.max_rows, limits.max_len, self._page_size, dummy_page, platform.device)
        self._host_steps = HostSteps(self._tables, self._page_size) if platform.device.type == "cpu" else None
        self._ops = ops = select.ops(platform.device, model.dtype)
        self._group, self._announce = group, announce
        leads = group.rank == 0
        self._sampler = Sampler(model.config.vocab_size, platform.device, ops) if leads else NoSampler()
        self._scored: dict[int, tuple[list[int], int]] = {}  # row -> (prompt, how many alternatives)
        self._logits: torch.Tensor | None = None
        self._best: torch.Tensor | None = None  # of a replayed step
        self._graphs: DecodeGraphs | None = None
        self._prompt_graphs: PromptGraphs | None = None
        if platform.captures:
            self._prepare(limits, graphs)

    @torch.inference_mode()
    def _prepare(self, limits: RunnerLimits, graphs: bool) -> None:
        """Captures steps or launches each kind of them once, so that none waits for a compiler."""
        model, on = self._model, (self._model, self._cache, self._tables, self._platform, limits.max_rows)
        if graphs and model.capturable:
            self._graphs = DecodeGraphs(*on)
            if self._group.size == 1:  # what ranks send each other of many tokens is not captured
                self._prompt_graphs = PromptGraphs(*on, limits.max_tokens)
        elif model.own_cache is None:
            warm_up(*on)
        self._sampler.warm_up(model.dtype)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> None:
        """Launches the forward of ``plan`` and the logits of the items that sample."""
        for row in plan.ended:
            self._sampler.end(row)
            self._model.release(row)
            self._scored.pop(row, None)
        for start in plan.starts:
            self._sampler.start(start.row, start.tokens, start.prompt_len, start.sampling)
            if start.sampling.prompt_logprobs is not None:
                self._scored[start.row] = (start.tokens[: start.prompt_len], start.sampling.prompt_logprobs)
        self._plan = plan
        self._prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self._samples = _samples(plan)
        graph = self._graphs.fitting(plan) if self._graphs and not self._scored else None
        if graph is not None:
            decoded = graph.run(plan, self._sampler.settings(self._samples))
            self._logits, self._best, self._sampled_rows = decoded.logits, decoded.best, decoded.rows
            self._settings = decoded.settings
        else:
            self._forward(plan)

    def _forward(self, plan: StepPlan) -> None:
        hidden, inputs = self._hidden(plan, every=bool(self._scored), settings=self._sampler.settings(self._samples))
        if self._scored:
            self._prompt_logprobs = self._score_prompts(plan, hidden)
            hidden = hidden[inputs.logits_at]
        self._sampled_rows, self._best, self._settings = inputs.sampled_rows, None, inputs.settings
        self._logits = self._model.logits(hidden) if any(plan.samples) else None

    def _hidden(self, plan: StepPlan, *, every: bool, settings: Ints = NONE) -> tuple[torch.Tensor, StepInputs]:
        """Hidden states of every token, or of those after which one is sampled."""
        kept = self._host_steps.fill(plan) if self._host_steps is not None else None
        if kept is not None:
            return kept.run(self._model, self._cache), kept
        parts = lay_out(plan, self._tables, self._page_size, settings)
        graph = self._prompt_graphs.fitting(parts) if self._prompt_graphs is not None else None
        if graph is not None:
            hidden, inputs = graph.run(parts)
            return hidden if every else hidden[inputs.logits_at], inputs
        inputs = send(parts, self._tables, self._platform)
        every = every or len(parts["logits_at"]) == len(parts["token_ids"])
        return inputs.forward(self._model, self._ops, self._tables, self._cache, every=every), inputs

    @torch.inference_mode()
    def sample(self, mask: TokenMask | None = None) -> Pending:
        """Launches sampling for the last `step`; its rows' next input is the sampled token, read or not."""
        plan = self._plan
        sampled = None
        if self._logits is not None:
            where = self._samples
            if mask is not None:
                places = list(accumulate(plan.samples, initial=0))  # of each item's first sample
                mask = dataclasses.replace(mask, items=[places[b] for b in mask.items])
            found = self._best is not None and not self._sampler.looks_at_logits(where, mask)
            if not found and self._announce is not None:
                self._announce()
            logits = self._logits if found else self._whole_logits(self._logits)
            settings = self._settings if len(self._settings) else None
            sampled = self._sampler.sample(logits, where, self._best, mask, settings)
            if not found:
                self._ops.put_(self._tables.last_token, self._sampled_rows, sampled.tokens)
                if self._announce is not None:
                    self._group.broadcast_(sampled.tokens)
        self._logits = self._best = None
        return Launched(sampled, self._prompt_logprobs)

    @torch.inference_mode()
    def take_tokens(self) -> None:
        """Receives what rank 0 sampled for the last `step`."""
        if self._logits is not None:
            self._whole_logits(self._logits)
        tokens = torch.empty(len(self._sampled_rows), dtype=torch.int32, device=self._platform.device)
        self._group.broadcast_(tokens)
        self._ops.put_(self._tables.last_token, self._sampled_rows, tokens)

    def _whole_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """A replayed step leaves each rank its own part of them, which is enough where all rows are greedy."""
        return logits if self._best is None else self._model.whole_logits(logits)

    def _score_prompts(self, plan: StepPlan, hidden: torch.Tensor) -> dict[int, list[TokenLogprobs]]:
        """Log-probabilities of the prompt tokens that this step's chunks predict."""
        scores: dict[int, list[TokenLogprobs]] = {}
        start = 0
        for b, (row, count, computed) in enumerate(zip(plan.rows, plan.counts, plan.computed, strict=True)):
            prompt, alternatives = self._scored.get(row, ([], 0))
            targets = prompt[computed + 1 : computed + count + 1]
            if targets:
                scores[b] = self._score(hidden[start : start + len(targets)], targets, alternatives)
            start += count
        return scores

    def _score(self, hidden: torch.Tensor, targets: list[int], alternatives: int) -> list[TokenLogprobs]:
        entries: list[TokenLogprobs] = []
        for first in range(0, len(targets), PROMPT_LOGITS_ROWS):
            piece = slice(first, first + PROMPT_LOGITS_ROWS)
            logits = self._model.logits(hidden[piece])
            entries += self._sampler.prompt_logprobs(logits, targets[piece], alternatives)
        return entries


def _samples(plan: StepPlan) -> list[SampleItem]:
    return [
        SampleItem(row, position)
        for row, count, computed, samples in zip(plan.rows, plan.counts, plan.computed, plan.samples, strict=True)
        for position in range(computed + count - samples + 1, computed + count + 1)
    ]


def rehearse(model: Model, num_tokens: int, max_rows: int, page_size: int, platform: Platform) -> None:
    """Compiles the kernels of all kinds of steps at once, where a device has such: one after the other, when they are
    first launched, takes several times as long. Only of models that look at no tensor, which would be undefined."""
    if not platform.captures or not model.capturable:
        return
    device, ops = platform.device, select.ops(platform.device, model.dtype)

    def steps() -> None:
        if model.config.has_head:  # first, since what takes longest to compile is best begun with
            Sampler(model.config.vocab_size, device, ops).warm_up(model.dtype)
        largest_step(model, min(num_tokens, 256), max_rows, page_size, platform)
        if not model.config.has_head:
            return
        cache = torch.zeros(model.config.cache_shape(2, page_size), dtype=cache_dtype(model.config), device=device)
        tables = Tables(max_rows, page_size, page_size, 1, device)
        warm_up(model, cache, tables, platform, max_rows)
        warm_up_prompts(model, cache, tables, platform, max_rows)

    with torch.inference_mode():
        ops.rehearse(steps)


def largest_step(model: Model, num_tokens: int, max_rows: int, page_size: int, platform: Platform) -> None:
    """Runs a forward of ``num_tokens`` tokens with random ids, in sequences as long as the model takes, on a cache of
    its own, to see what it allocates."""
    config, device, longest = model.config, platform.device, min(num_tokens, model.max_len)
    starts = [*range(0, num_tokens, longest), num_tokens]
    sequences, pages = len(starts) - 1, -(-longest // page_size)
    with torch.inference_mode():
        cache = torch.zeros(config.cache_shape(sequences * pages, page_size), dtype=cache_dtype(config), device=device)
        token = torch.arange(num_tokens, dtype=torch.int32, device=device)
        positions, rows = token % longest, torch.arange(sequences, dtype=torch.int32, device=device)
        query_start = torch.tensor(starts, dtype=torch.int32, device=device)
        meta = AttentionMetadata(
            query_start=query_start,
            seq_lens=query_start.diff(),
            rows=rows,
            block_table=torch.arange(sequences * pages, dtype=torch.int32, device=device).view(sequences, pages),
            slots=positions + token // longest * (pages * page_size),
            num_decodes=0,
            max_query=longest,
            max_seq=longest,
        )
        token_ids = torch.randint(config.vocab_size, (num_tokens,), dtype=torch.int32, device=device)
        with context.use(context.ForwardContext(meta, cache)):
            hidden = model(token_ids, positions)
        if config.has_head:
            model.logits(hidden[: min(max_rows, num_tokens)]).float()
        for row in range(sequences):
            model.release(row)
