"""Exchanges over peer memory: the kernel of one rank, whose peer the test plays; and two cards that share a model."""

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

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        from octavo.kernels.peers_triton import MOST_ROWS, PeerMemory, buffer_bytes

        self.buffers = torch.zeros(RANKS, buffer_bytes(RANKS) // 8, dtype=torch.int64, device=DEVICE)
        self.slots = self.buffers.view(RANKS, 2, MOST_ROWS, RANKS, -1)  # whose, parity, row, from whom
        addresses = torch.tensor([part.data_ptr() for part in self.buffers], device=DEVICE)
        self.memory = PeerMemory(0, addresses, self)
        self.dtype = dtype

    def rows(self, count: int, seed: int, size: int = SIZE) -> torch.Tensor:
        return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, self.dtype)

    def other(self, epoch: int, y: torch.Tensor) -> None:
        """What rank 1 does in exchange number ``epoch`` of the rows of ``y``."""
        words = y.view(torch.int32).long() & 0xFFFFFFFF | epoch << 32
        self.slots[0, epoch % 2, : len(y), 1, : words.shape[1]] = words

    def sent(self, epoch: int, count: int) -> tuple[torch.Tensor, list[int]]:
        """What rank 0 has written to rank 1 of ``count`` rows, and the numbers that it gave it."""
        words = self.slots[1, epoch % 2, :count, 0, : SIZE * self.dtype.itemsize // 4]
        return words.int().view(self.dtype), (words >> 32).unique().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exchanges_alternate_between_two_buffers_and_are_numbered(dtype: torch.dtype) -> None:
    pair = Pair(dtype)
    for epoch in (1, 2, 3):
        x, y = pair.rows(5, epoch), pair.rows(5, 10 + epoch)
        pair.other(epoch, y)
        torch.testing.assert_close(pair.memory.sum(x), (x.double() + y.double()).to(dtype))
        values, numbers = pair.sent(epoch, 5)
        assert torch.equal(values, x)
        assert numbers == [epoch]
    assert not pair.slots[1, :, 5:].any()
    assert not pair.slots[1, :, :, 1].any()


def test_rows_count_for_themselves() -> None:
    pair = Pair()
    pair.other(1, pair.rows(4, 0))
    pair.memory.sum(pair.rows(4, 1))
    x, y = pair.rows(2, 2), pair.rows(2, 3)
    pair.other(2, y)
    torch.testing.assert_close(pair.memory.sum(x), x + y)
    assert [pair.sent(epoch, 4)[1] for epoch in (1, 2)] == [[1], [0, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addition_and_norm_are_those_of_the_reference(dtype: torch.dtype) -> None:
    pair = Pair(dtype)
    x, y, residual = (pair.rows(3, seed) for seed in range(3))
    weight = pair.rows(1, 3)[0]
    pair.other(1, y)
    normed, total = pair.memory.add_rms_norm(x, residual, weight, 1e-5)
    wanted = reference.add_rms_norm((x.float() + y.float()).to(dtype), residual, weight, 1e-5)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(normed, wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total, wanted[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [2, 6, SIZE])
def test_gathered_parts_lie_side_by_side_bit_by_bit(size: int) -> None:
    pair = Pair()
    x, y = pair.rows(3, 0, size), pair.rows(3, 1, size)
    x[1, 0], y[0, 1] = float("nan"), float("-inf")
    x[2, :2] = torch.tensor([7, -9], dtype=torch.int32, device=DEVICE).view(torch.float32)  # no numbers
    pair.other(1, y)
    assert torch.equal(pair.memory.gather(x).view(torch.int32), torch.cat((x, y), 1).view(torch.int32))


def test_only_what_fits_is_taken() -> None:
    from octavo.kernels.peers_triton import MOST_ROWS, ROW_BYTES

    memory = Pair().memory
    assert memory.takes(torch.empty(MOST_ROWS, ROW_BYTES // 4, device="meta"))
    assert not memory.takes(torch.empty(MOST_ROWS + 1, 8, device="meta"))
    assert not memory.takes(torch.empty(1, ROW_BYTES // 4 + 1, device="meta"))
    assert not memory.takes(torch.empty(0, 8, device="meta"))
    assert not memory.takes(torch.empty(1, 3, dtype=torch.bfloat16, device="meta"))


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
