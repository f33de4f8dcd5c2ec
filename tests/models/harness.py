"""Runs a native model over pages without scheduler or worker: metadata and cache are made here, pages are scattered."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from octavo.hub.checkpoint import open_checkpoint
from octavo.hub.configs import model_config, read_hf_dict
from octavo.hub.quantised.checkpoint import unquantised
from octavo.hub.resolve import resolve
from octavo.kernels.metadata import AttentionMetadata
from octavo.layers import context
from octavo.models import registry
from octavo.models.base import Model
from octavo.runtime import loader


def native(
    folder: Path, max_len: int, dtype: str = "auto", *, keep_blocks: bool = False, impl: str = "native"
) -> Model:
    """The native model (or that of ``impl``) of a local folder or file, loaded on the CPU."""
    source = resolve(str(folder))
    config = model_config(read_hf_dict(source, {}), dtype=dtype, generation={})
    model_class, _ = registry.choose(config, impl)
    model = model_class(config, max_len)
    checkpoint = unquantised(open_checkpoint(source), config.hf)
    loader.load(model, checkpoint, torch.device("cpu"), keep_blocks=keep_blocks)
    return model


class Paged:
    """A model and its pages. Sequences are rows of the block table; `step` computes some tokens of some of them."""

    def __init__(self, model: Model, *, page_size: int = 8, num_pages: int = 96, rows: int = 8, seed: int = 0) -> None:
        shape = model.config.cache_shape(num_pages, page_size)
        self.model = model
        self.page_size = page_size
        # NaN shows a read of a slot that nobody wrote.
        self.kv_cache = torch.full(shape, float("nan"), dtype=model.dtype)
        self.block_table = torch.full((rows, num_pages), num_pages - 1, dtype=torch.int32)
        self.lengths: dict[int, int] = {}
        self._free_pages = list(range(num_pages - 1))
        self._free_rows = list(range(rows))
        shuffle = random.Random(seed).shuffle
        shuffle(self._free_pages)
        shuffle(self._free_rows)

    def start(self, *, prefix_of: int | None = None, pages: int = 0) -> int:
        """A new row; its first ``pages`` pages are those of row ``prefix_of``, already computed."""
        row = self._free_rows.pop()
        if prefix_of is not None:
            self.block_table[row, :pages] = self.block_table[prefix_of, :pages]
        self.lengths[row] = pages * self.page_size
        return row

    def stop(self, row: int) -> None:
        """The end of a row, which a later `start` may use again."""
        self.model.release(row)
        del self.lengths[row]
        self._free_rows.append(row)

    @torch.inference_mode()
    def step(self, chunks: Mapping[int, Sequence[int]], asking: Sequence[int] | None = None) -> dict[int, torch.Tensor]:
        """Computes the next tokens of each row; returns their logits ``[count, vocab]`` by row.

        The model is asked for all of them, or for the last of each of the rows ``asking``: ``[1, vocab]`` of these.
        """
        order = sorted(chunks, key=lambda row: len(chunks[row]) != 1)  # decodes first
        positions = [self._grow(row, len(chunks[row])) for row in order]
        ids = torch.tensor([token for row in order for token in chunks[row]], dtype=torch.int32)
        meta, wanted, counts = self._metadata(order, positions), None, [len(chunks[row]) for row in order]
        if asking is not None:
            asked = torch.tensor([row in asking for row in order])
            wanted = context.Wanted(meta.query_start[1:][asked] - 1, meta.rows[asked])
            order = [row for row in order if row in asking]
            counts = [1] * len(order)
        with context.use(context.ForwardContext(meta, self.kv_cache, wanted)):
            hidden = self.model(ids, torch.cat(positions))
        logits = self.model.logits(hidden).float()
        return dict(zip(order, torch.split(logits, counts), strict=True))

    def greedy(self, row: int, prompt: Sequence[int], count: int) -> list[int]:
        """Computes ``prompt`` in one step, then ``count`` likeliest tokens one at a time."""
        tokens: list[int] = []
        logits = self.step({row: prompt})[row]
        for _ in range(count):
            tokens.append(int(logits[-1].argmax()))
            logits = self.step({row: tokens[-1:]})[row]
        return tokens

    def _grow(self, row: int, count: int) -> torch.Tensor:
        """Pages for ``count`` more tokens of ``row``; the positions of these tokens."""
        start = self.lengths[row]
        self.lengths[row] = end = start + count
        for index in range(-(-start // self.page_size), -(-end // self.page_size)):
            self.block_table[row, index] = self._free_pages.pop()
        return torch.arange(start, end, dtype=torch.int32)

    def _metadata(self, order: Sequence[int], positions: Sequence[torch.Tensor]) -> AttentionMetadata:
        counts = [len(position) for position in positions]
        starts = torch.tensor([0, *counts]).cumsum(0)
        size = self.page_size
        slots = [
            self.block_table[row, position // size] * size + position % size
            for row, position in zip(order, positions, strict=True)
        ]
        lengths = [self.lengths[row] for row in order]
        return AttentionMetadata(
            query_start=starts.int(),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            rows=torch.tensor(order, dtype=torch.int32),
            block_table=self.block_table,
            slots=torch.cat(slots),
            num_decodes=counts.count(1),
            max_query=max(counts),
            max_seq=max(lengths),
        )
