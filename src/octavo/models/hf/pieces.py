"""Whether a decoder whose mixers run sequence by sequence computes what it computes without a cache, found by example.

A copy in float32 with random weights (see `models.hf.proof`) first takes whole sequences, one by one, as it is. Then
its mixers are wrapped, and the same sequences come in pieces of all sizes, interleaved, several in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.kernels.metadata import AttentionMetadata
from octavo.layers import context
from octavo.models.hf.mixers import Mixers
from octavo.models.hf.probe import PAGE, same
from octavo.models.hf.proof import with_random_weights
from octavo.models.hf.trace import NotPaged, without_experts

# How many tokens each step has of which sequence, single ones first. The last sequence takes the row of the first.
STEPS: tuple[dict[int, int], ...] = (
    {0: 5},
    {0: 1, 1: 7},
    {0: 1, 1: 1},
    {1: 1, 0: 4},
    {1: 3, 0: 2},
    {0: 1, 1: 1},
    {2: 1, 1: 2},
    {1: 1, 2: 6},
    {2: 1},
)
ROWS = (2, 0, 2)  # of the sequences
NUM_ROWS = 3


@torch.inference_mode()
def prove(mixers: Mixers, body: nn.Module, config: ModelConfig, takes_positions: bool, device: torch.device) -> None:
    """Finds out how ``mixers``, of the decoder ``body``, take pieces; raises `NotPaged` if they cannot."""
    lengths = [sum(step.get(number, 0) for step in STEPS) for number in range(len(ROWS))]
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(config.vocab_size, (length,), generator=generator).to(device) for length in lengths]
    try:
        trial = with_random_weights(body, device, experts=False)
        exact = {key: shape.in_float32() for key, shape in mixers.shapes.items()}
        tried, run = Mixers(mixers.traced, exact), _Run(trial, config, takes_positions, device)
        with without_experts(trial):
            wanted = [run([_Item(0, 0, tokens)]) for tokens in sequences]
            tried.install(trial)
            for tried.token_by_token in (False, True):
                if all(map(same, _in_pieces(run, tried, sequences), wanted)):
                    mixers.token_by_token = tried.token_by_token
                    return
    except Exception as error:  # code that is not ours
        raise NotPaged(f"it cannot be run in pieces ({type(error).__name__}: {error})") from error
    raise NotPaged("its states do not carry over from one piece of a sequence to the next")


@dataclass(frozen=True)
class _Item:
    """``tokens`` of a row, the first of which is number ``first`` of its sequence."""

    row: int
    first: int
    tokens: torch.Tensor


class _Run:
    """A decoder with pages of its own, enough for one sequence in each row."""

    def __init__(self, body: nn.Module, config: ModelConfig, takes_positions: bool, device: torch.device) -> None:
        self._body = body
        self._takes_positions = takes_positions
        self._cache = torch.zeros(config.cache_shape(2 * NUM_ROWS, PAGE), device=device)
        self._table = torch.arange(2 * NUM_ROWS, dtype=torch.int32, device=device).view(NUM_ROWS, 2)

    def __call__(self, items: Sequence[_Item], mixers: Mixers | None = None) -> torch.Tensor:
        """Hidden states ``[T, C]`` of the tokens of a step."""
        counts = torch.tensor([len(item.tokens) for item in items])
        firsts = torch.tensor([item.first for item in items])
        positions = torch.cat([torch.arange(len(item.tokens)) + item.first for item in items])
        rows = torch.tensor([item.row for item in items])
        pages = self._table.cpu()[rows.repeat_interleave(counts), positions // PAGE]
        ints = (torch.cat([torch.zeros(1), counts.cumsum(0)]), firsts + counts, rows, pages * PAGE + positions % PAGE)
        device = self._table.device
        query_start, seq_lens, rows, slots = (part.to(device, torch.int32) for part in ints)
        meta = AttentionMetadata(
            query_start,
            seq_lens,
            rows,
            self._table,
            slots,
            num_decodes=int((counts == 1).sum()),
            max_query=int(counts.max()),
            max_seq=2 * PAGE,
        )
        if mixers is not None:
            mixers.begin(meta)
        ids = torch.cat([item.tokens for item in items]).unsqueeze(0)
        known = {"position_ids": positions.unsqueeze(0).to(device)} if self._takes_positions else {}
        with context.use(context.ForwardContext(meta, self._cache)):
            found: torch.Tensor = self._body(input_ids=ids, use_cache=False, **known)[0][0]
        return found


def _in_pieces(run: _Run, mixers: Mixers, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states of each of ``sequences``, computed as `STEPS` says."""
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for step in STEPS:
        items = []
        for number, count in step.items():
            if done[number] == 0:
                mixers.release(ROWS[number])
            items.append(_Item(ROWS[number], done[number], sequences[number][done[number] : done[number] + count]))
            done[number] += count
        hidden = torch.split(run(items, mixers), [len(item.tokens) for item in items])
        for number, part in zip(step, hidden, strict=True):
            found[number].append(part)
    return [torch.cat(parts) for parts in found]
