"""Steps of ranks as they are made on cards: a replayed one leaves each rank its own part of the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.parallel.group import SINGLE, Group
from octavo.platforms.base import T
from octavo.platforms.cpu import CpuPlatform
from octavo.runtime import loader
from octavo.runtime.runner import Runner, RunnerLimits
from octavo.types import RowStart, Sampling, StepPlan
from tests.parallel.ranks import Ranks
from tests.parallel.test_native import built
from tools import tiny

PROMPT = [5, 9, 200, 17, 41]


class Replaying(CpuPlatform):
    """A CPU that is said to have graphs."""

    captures = True

    def capture(self, work: Callable[[], T]) -> Callable[[], T]:
        return work


def started(row: int, **wishes: Any) -> RowStart:
    return RowStart(row, PROMPT, len(PROMPT), [row], Sampling(max_tokens=20, **{"temperature": 0.0, **wishes}))


# (rows that start, rows that end, tokens computed so far by row, whether rank 0 must look at the logits, its drafts)
STEPS: list[tuple[list[RowStart], list[int], dict[int, int], bool, dict[int, list[int]]]] = [
    ([started(0)], [], {0: 0}, True, {}),  # prompts are never replayed
    ([], [], {0: 5}, False, {}),
    ([started(1, logprobs=2)], [], {0: 6, 1: 0}, True, {}),
    ([], [], {0: 7, 1: 5}, True, {}),
    ([], [1], {0: 8}, False, {}),
    ([started(2, temperature=0.8, seed=3)], [], {0: 9, 2: 0}, True, {}),
    ([], [], {0: 10, 2: 5}, True, {}),
    ([], [2], {0: 11}, False, {}),
    ([], [], {0: 12}, True, {0: [7, 30, 8]}),
    ([], [], {0: 13}, False, {0: [30]}),  # the first of two drafts holds
    ([], [], {0: 14}, False, {}),
]


def run(group: Group, folder: Path) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-probabilities of them) of each step, on rank 0."""
    model = built(folder)
    loader.fill_dummy(model, 3)
    announced: list[int] = []
    cache = torch.zeros(model.config.cache_shape(5, 16))
    runner = Runner(
        model,
        cache,
        Replaying(),
        RunnerLimits(max_rows=4, max_tokens=64, max_len=16),
        group=group,
        announce=(lambda: announced.append(number)) if group.size > 1 else None,
    )
    found = []
    for number, (starts, ended, computed, looks, inputs) in enumerate(STEPS):  # noqa: B007 (announce has it)
        new = {start.row for start in starts}
        runner.step(
            StepPlan(
                starts=starts,
                pages=[],
                rows=list(computed),
                counts=[len(PROMPT) if row in new else len(inputs.get(row, [0])) for row in computed],
                computed=list(computed.values()),
                samples=[len(inputs.get(row, [0])) for row in computed],
                ended=ended,
                inputs={list(computed).index(row): tokens for row, tokens in inputs.items()},
            )
        )
        if group.rank == 0:
            result = runner.sample().result()
            found.append((result.tokens, [entry.logprob for entry in result.logprobs.values()]))
        elif looks:
            runner.take_tokens()
    if group.size > 1 and group.rank == 0:
        assert announced == [number for number, step in enumerate(STEPS) if step[3]]
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("vocab", [384, 387])  # of 387 four ranks have 97, 97, 97 and 96
def test_logits_are_gathered_only_where_somebody_looks_at_them(
    vocab: int, size: int, ranks: Ranks, tmp_path: Path
) -> None:
    folder = tiny.make(tmp_path, "llama", vocab_size=vocab)
    wanted, (found, *_) = run(SINGLE, folder), ranks.call(size, run, folder)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    assert len({token for tokens, _ in found for token in tokens}) > 3
    for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert [len(logprobs) for _, logprobs in found] == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
