"""Sums over peer memory: the kernel of one rank, whose peer the test plays; and two cards that share a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from octavo.kernels import reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and TRITON_INTERPRET is not 1"
    ),
]
SIZE, RANKS = 96, 2


class Pair:
    """Rank 0, and memory in which the test plays rank 1."""

    def __init__(self) -> None:
        from octavo.kernels.peers_triton import BUFFER_BYTES, MOST_ROWS, ROW_BYTES, PeerSums

        self.buffers = torch.zeros(RANKS, BUFFER_BYTES, dtype=torch.uint8, device=DEVICE)
        self.slots = self.buffers.view(torch.float32).view(RANKS, 2, MOST_ROWS, ROW_BYTES // 4)
        self.flags = torch.zeros(RANKS, MOST_ROWS, RANKS, dtype=torch.int32, device=DEVICE)
        addresses = [
            torch.tensor([part.data_ptr() for part in whole], device=DEVICE) for whole in (self.buffers, self.flags)
        ]
        self.sums = PeerSums(0, addresses[0], addresses[1], self)

    def other(self, epoch: int, y: torch.Tensor) -> None:
        """What rank 1 does in sum number ``epoch`` of the rows of ``y``."""
        self.slots[1, epoch % 2, : len(y), :SIZE] = y
        self.flags[0, : len(y), 1] = epoch


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_sums_alternate_between_two_buffers_and_tell_the_other_rank() -> None:
    pair = Pair()
    for epoch in (1, 2, 3):
        x, y = rows(5, epoch), rows(5, 10 + epoch)
        pair.other(epoch, y)
        torch.testing.assert_close(pair.sums.sum(x), x + y)
        assert torch.equal(pair.slots[0, epoch % 2, :5, :SIZE], x)
        assert pair.flags[1, :6, 0].tolist() == [epoch] * 5 + [0]


def test_rows_count_for_themselves() -> None:
    pair = Pair()
    pair.other(1, rows(4, 0))
    pair.sums.sum(rows(4, 1))
    x, y = rows(2, 2), rows(2, 3)
    pair.other(2, y)
    torch.testing.assert_close(pair.sums.sum(x), x + y)
    assert pair.flags[1, :4, 0].tolist() == [2, 2, 1, 1]


def test_addition_and_norm_are_those_of_the_reference() -> None:
    pair = Pair()
    x, y, residual = rows(3, 0), rows(3, 1), rows(3, 2)
    weight = rows(1, 3)[0]
    pair.other(1, y)
    found = pair.sums.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(found, reference.add_rms_norm(x + y, residual, weight, 1e-5))


def test_only_what_fits_is_taken() -> None:
    from octavo.kernels.peers_triton import MOST_ROWS, ROW_BYTES

    sums = Pair().sums
    assert sums.takes(torch.empty(MOST_ROWS, ROW_BYTES // 4, device="meta"))
    assert not sums.takes(torch.empty(MOST_ROWS + 1, 8, device="meta"))
    assert not sums.takes(torch.empty(1, ROW_BYTES // 4 + 1, device="meta"))
    assert not sums.takes(torch.empty(0, 8, device="meta"))


@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
def test_tokens_of_two_cards_equal_those_of_one(tmp_path: Path) -> None:
    from bench.tensor_parallel import CONFIGS
    from octavo import LLM, SamplingParams

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["tiny"]))
    prompts = [{"prompt_token_ids": [7 * i + j for j in range(20 + 30 * i)]} for i in range(1, 9)]
    wishes = [SamplingParams(max_tokens=40, temperature=t, seed=5) for t in (0.0, 0.8)]
    answers = []
    for ranks in (1, RANKS):
        options = {"load_format": "dummy", "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 1024}
        with LLM(str(tmp_path), tensor_parallel_size=ranks, **options) as llm:
            answers.append(
                [[o.outputs[0].token_ids for o in llm.generate(prompts, wish, use_tqdm=False)] for wish in wishes]
            )
    assert answers[0] == answers[1]
