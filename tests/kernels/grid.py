"""The cases on which every implementation of attention is held against the same naive one, in float64.

for case in grid.ATTENTION: ...
got = kernel(*case.batch(dtype, device).arguments())     same arguments as kernels.reference.attention
grid.assert_close(got, case.batch(...).expected())
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from octavo.kernels.metadata import AttentionMetadata

# (tokens computed before the step, tokens of the step), decodes first as in a step plan.
DECODES = ((0, 1), (1, 1), (15, 1), (16, 1), (37, 1), (100, 1))
PREFILLS = ((0, 2), (0, 33), (7, 9), (16, 16), (30, 50))

# Largest difference allowed from the float64 answer, by type; queries, keys and values are about one in size.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One shape of attention over one batch of sequences."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    items: tuple[tuple[int, int], ...] = DECODES + PREFILLS

    def __str__(self) -> str:
        options = [f"window{self.window}"] if self.window is not None else []
        options += [f"cap{self.softcap:g}"] if self.softcap is not None else []
        options += ["sinks"] if self.sinks else []
        kind = {DECODES: "decode", PREFILLS: "prefill"}.get(self.items, "mixed" if len(self.items) > 1 else "one")
        shape = f"h{self.heads}kv{self.kv_heads}d{self.head_dim}p{self.page_size}"
        return "-".join([kind, shape, *options])

    def batch(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Batch:
        return Batch(self, dtype, torch.device(device), seed)


ATTENTION = [
    Case(),
    Case(items=DECODES),
    Case(items=PREFILLS),
    Case(items=((0, 1),)),
    Case(heads=4, kv_heads=4),
    Case(heads=6, kv_heads=1),
    Case(heads=9, kv_heads=3),
    Case(heads=14, kv_heads=2),
    Case(head_dim=16),
    Case(head_dim=32),
    Case(head_dim=80),
    Case(head_dim=96),
    Case(head_dim=128),
    Case(heads=2, kv_heads=1, head_dim=256),
    Case(page_size=8),
    Case(page_size=32),
    Case(window=1),
    Case(window=16),
    Case(window=20, items=DECODES),
    Case(window=1000),
    Case(softcap=3.0),
    Case(sinks=True),
    Case(sinks=True, items=DECODES),
    Case(window=9, softcap=5.0, sinks=True),
]


class Batch:
    """Random queries, keys and values of a `Case`, the keys and values in pages of shuffled order.

    Every slot that no token of the batch owns holds NaN, so that a kernel which reads one shows it.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        self.lengths = [computed + count for computed, count in case.items]
        self.counts = [count for _, count in case.items]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        self.query = normal(sum(self.counts), case.heads, case.head_dim)
        self.keys = [normal(length, case.kv_heads, case.head_dim) for length in self.lengths]
        self.values = [normal(length, case.kv_heads, case.head_dim) for length in self.lengths]
        self.sinks = normal(case.heads) if case.sinks else None
        self.scale = case.head_dim**-0.5
        self.block_table, self.rows = self._scatter(generator)
        self.meta = self._metadata(device)
        self.cache = self._cache(dtype, device)

    def arguments(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata, float, int | None, float | None, torch.Tensor | None]:
        """Of `octavo.kernels.reference.attention`."""
        case = self.case
        return self.query, self.cache, self.meta, self.scale, case.window, case.softcap, self.sinks

    def fill_up(self, tokens: int, items: int) -> None:
        """Makes it a captured step's batch: so many more tokens of nobody, and items without a query."""
        device, meta = self.query.device, self.meta

        def more(values: torch.Tensor, count: int, value: int) -> torch.Tensor:
            return torch.cat((values, torch.full((count,), value, dtype=torch.int32, device=device)))

        self.query = torch.cat((self.query, torch.full_like(self.query[:1], float("nan")).expand(tokens, -1, -1)))
        self.meta = replace(
            meta,
            query_start=more(meta.query_start, items, int(meta.query_start[-1])),
            seq_lens=more(meta.seq_lens, items, 1),
            rows=more(meta.rows, items, self.rows[0]),
            slots=more(meta.slots, tokens, self.num_pages * self.case.page_size - 1),
            num_decodes=None,
        )

    def round_to_float8(self) -> None:
        """Makes the cache one of 8-bit floats; what is `expected` is then computed from the rounded keys and values."""
        self.cache = self.cache.to(torch.float8_e4m3fn)
        kept, dtype = torch.float8_e4m3fn, self.query.dtype
        self.keys = [key.to(kept).to(dtype) for key in self.keys]
        self.values = [value.to(kept).to(dtype) for value in self.values]

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the step's tokens, ``[T, KH, D]``: those that `meta.slots` places."""
        keys = [key[-count:] for key, count in zip(self.keys, self.counts, strict=True)]
        values = [value[-count:] for value, count in zip(self.values, self.counts, strict=True)]
        return torch.cat(keys), torch.cat(values)

    def expected(self) -> torch.Tensor:
        """The answer ``[T, H, D]`` in float64."""
        case, starts = self.case, self.meta.query_start.tolist()
        queries = [self.query[first:last] for first, last in itertools.pairwise(starts)]
        return torch.cat(
            [
                naive(query, keys, values, self.scale, case.window, case.softcap, self.sinks)
                for query, keys, values in zip(queries, self.keys, self.values, strict=True)
            ]
        )

    def _scatter(self, generator: torch.Generator) -> tuple[torch.Tensor, list[int]]:
        """Page ids in random order, rows of the block table in random order with one row between unused."""
        size = self.case.page_size
        needed = [-(-length // size) for length in self.lengths]
        ids = torch.randperm(sum(needed) + 3, generator=generator).tolist()
        self.num_pages = len(ids) + 1  # the last one is the dummy that padding may write to
        rows = torch.randperm(len(needed) + 1, generator=generator)[: len(needed)].tolist()
        table = torch.full((len(needed) + 1, max(needed) + 2), self.num_pages - 1, dtype=torch.int32)
        for row, count in zip(rows, needed, strict=True):
            table[row, :count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int32)
        return table, rows

    def _slots(self, b: int) -> torch.Tensor:
        position = torch.arange(self.lengths[b])
        size = self.case.page_size
        return self.block_table[self.rows[b], position // size].long() * size + position % size

    def _metadata(self, device: torch.device) -> AttentionMetadata:
        def int32(values: list[int] | torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int32).to(device)

        starts = [0]
        for count in self.counts:
            starts.append(starts[-1] + count)
        slots = torch.cat([self._slots(b)[-count:] for b, count in enumerate(self.counts)])
        return AttentionMetadata(
            query_start=int32(starts),
            seq_lens=int32(self.lengths),
            rows=int32(self.rows),
            block_table=self.block_table.to(device),
            slots=int32(slots),
            num_decodes=self._leading_ones(),
            max_query=max(self.counts),
            max_seq=max(self.lengths),
        )

    def _leading_ones(self) -> int:
        return next((b for b, count in enumerate(self.counts) if count != 1), len(self.counts))

    def _cache(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size, heads, dim = self.case.page_size, self.case.kv_heads, self.case.head_dim
        flat = torch.full((self.num_pages * size, 2, heads, dim), float("nan"), dtype=dtype, device=device)
        for b, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            flat[self._slots(b).to(device)] = torch.stack((key, value), dim=1)
        return flat.view(self.num_pages, size, 2, heads, dim).permute(0, 2, 3, 1, 4).contiguous()


def naive(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence, token by token and head by head, in float64: nothing to get wrong."""
    count, heads, _ = query.shape
    length, kv_heads, _ = keys.shape
    query, keys, values = query.double(), keys.double(), values.double()
    out = torch.empty_like(query)
    for i in range(count):
        position = length - count + i
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            kv_head = head * kv_heads // heads
            scores = keys[first : position + 1, kv_head] @ query[i, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks[head].double().view(1)))
            weights = scores.softmax(0)[: position + 1 - first]
            out[i, head] = weights @ values[first : position + 1, kv_head]
    return out


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """``got`` has the type of the kernel, ``expected`` is `Batch.expected`."""
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[got.dtype], rtol=TOLERANCE[got.dtype])
