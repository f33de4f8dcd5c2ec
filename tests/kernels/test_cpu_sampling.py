"""Tokens and log-probabilities that the C++ extension finds against those of torch, for every instruction set."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from octavo.kernels import sampling

_cpu = pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
from octavo.kernels import cpu  # noqa: E402  # needs the extension

pytestmark = pytest.mark.usefixtures("native_isa")

DTYPES = [torch.float32, torch.bfloat16]
FILTERS = [  # top_k, top_p, min_p
    (0, 1.0, 0.0),
    (0, 1.0, 0.05),
    (0, 1.0, 1e-4),
    (0, 1.0, 1.0),
    (0, 0.95, 0.0),
    (0, 0.999, 0.0),
    (0, 0.5, 0.0),
    (0, 1e-6, 0.0),
    (0, 0.9, 1e-4),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (50, 0.9, 0.0),
    (7, 0.5, 0.2),
    (1000, 0.95, 0.0),
]


def keys(count: int, position: int = 7) -> torch.Tensor:
    return torch.from_numpy(
        sampling.noise_keys(np.arange(count, dtype=np.uint64), np.full(count, position, dtype=np.uint64))
    )


def settings(key: torch.Tensor, temperature: torch.Tensor, filters: list[tuple[int, float, float]]) -> torch.Tensor:
    """As of `sampling.sample_rows`, with ``filters`` over and over."""
    rows = [filters[i % len(filters)] for i in range(len(key))]
    top_k, top_p, min_p = (np.array(part) for part in zip(*rows, strict=True))
    numbers = np.stack((temperature.numpy(), top_p, min_p)).astype(np.float32).view(np.int32)
    packed = np.concatenate((key.numpy().T, top_k[None].astype(np.int32), numbers))
    assert list(sampling.Setting)[: len(packed)] == [0, 1, 2, 3, 4, 5] == list(range(sampling.DRAWN_BY))
    return torch.from_numpy(packed)


def sample(logits: torch.Tensor, of: torch.Tensor) -> list[int]:
    found = cpu.sample(logits, of)
    assert found is not None and found.dtype == torch.int32
    assert found[1].tolist() == [1] * len(logits)
    return found[0].tolist()


def random_logits(rows: int, vocab: int, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Rows that are further apart than they are long."""
    generator = torch.Generator().manual_seed(vocab)
    return (torch.randn(rows, vocab + 5, generator=generator) * scale).to(dtype)[:, :vocab]


@cache
def scores_of(vocab: int, dtype: torch.dtype, scale: float, heat: float) -> torch.Tensor:
    """What torch's race compares: two rows for each of `FILTERS`."""
    count = 2 * len(FILTERS)
    probs = sampling.probabilities(random_logits(count, vocab, dtype, scale), torch.full((count, 1), heat))
    ids = torch.arange(vocab, dtype=torch.int32).unsqueeze(0)
    rows = []
    for i in range(count):
        top_k, top_p, min_p = (torch.tensor([[value]]) for value in FILTERS[i % len(FILTERS)])
        filters = sampling.Filters(top_k.int(), top_p.float(), min_p.float(), vocab)
        rows.append(sampling._filter(probs[i : i + 1], filters) / sampling.exponential(keys(count)[i : i + 1], ids))
    return torch.cat(rows)


@pytest.mark.parametrize("vocab", [1, 3, 15, 16, 17, 100, 1000, 5003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "heat"), [(0.1, 1.0), (1.0, 0.7), (4.0, 1.0), (4.0, 0.01), (30.0, 1.7)])
def test_the_token_is_that_of_torch(vocab: int, dtype: torch.dtype, scale: float, heat: float) -> None:
    scores = scores_of(vocab, dtype, scale, heat)
    logits = random_logits(len(scores), vocab, dtype, scale)
    tokens = sample(logits, settings(keys(len(scores)), torch.full((len(scores),), heat), FILTERS))
    own = scores.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(own, scores.amax(-1), rtol=1e-5, atol=0.0)  # equal, but for rounding


def test_of_equal_logits_the_one_of_least_noise_is_drawn() -> None:
    rows, vocab = 16, 40_003
    key = keys(rows)
    words = key.numpy().view(np.uint32).astype(np.uint64)
    token = np.arange(vocab, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    h = (token * np.uint64(0x9E3779B1) + words[:, :1]) & low
    h = ((h ^ (h >> np.uint64(16))) * np.uint64(0x7FEB352D) + words[:, 1:]) & low
    h = ((h ^ (h >> np.uint64(15))) * np.uint64(0x846CA68B)) & low
    h ^= (h.astype(np.uint32).view(np.int32) >> 16).view(np.uint32)
    assert int(h.max()) < 2**31
    expected = [int(row.argmin()) for row in h]
    assert sample(torch.full((rows, vocab), -3.0), settings(key, torch.ones(rows), [(0, 1.0, 0.0)])) == expected


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (0, 0.9, 0.0), (300, 1.0, 0.0)])
def test_logits_in_order_are_sampled_as_any(filters: tuple[int, float, float]) -> None:
    """Ascending, almost every token is ahead of all before."""
    rows, vocab = 12, 5000
    slopes = torch.linspace(0.001, 0.2, rows).unsqueeze(1)
    logits = torch.arange(vocab).float() * slopes
    logits[::2] = logits[::2].flip(1)
    key, heat = keys(rows), torch.ones(rows)
    top_k, top_p, min_p = (torch.full((rows, 1), value) for value in filters)
    probs = sampling.probabilities(logits, heat.unsqueeze(1))
    wanted = sampling.draw_filtered(probs, key, sampling.Filters(top_k.int(), top_p.float(), min_p.float(), vocab))
    assert sample(logits, settings(key, heat, [filters])) == wanted.tolist()


@pytest.mark.parametrize("filters", FILTERS)
def test_all_that_pass_the_filters_are_drawn_and_nothing_else(filters: tuple[int, float, float]) -> None:
    draws, vocab = 3000, 37
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)).mul_(2).round_().div_(2)  # many equals
    top_k, top_p, min_p = filters
    probs = logits.double().softmax(-1)
    kept = probs >= np.float32(min_p) * probs.max()
    if 0 < top_k < vocab:
        kept &= probs >= probs.sort(descending=True).values[top_k - 1]
    descending = probs.masked_fill(~kept, 0.0).sort(descending=True).values
    below = descending.cumsum(-1) - descending < np.float32(top_p) * descending.sum()
    kept &= (probs >= descending[below][-1]) | (top_p == 1)
    tokens = sample(logits.expand(draws, vocab), settings(keys(draws), torch.full((draws,), 1.0), [filters]))
    expected = {i for i in kept.nonzero().flatten().tolist() if probs[i] * draws > 10}
    assert expected <= set(tokens) <= set(kept.nonzero().flatten().tolist())


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    rows, vocab = 2 * len(FILTERS), 3001
    logits = random_logits(rows, vocab, torch.float32, 2.0)
    of = settings(keys(rows), torch.linspace(0.5, 1.5, rows), FILTERS)
    together = sample(logits, of)
    assert [sample(logits[i : i + 1], of[:, i : i + 1])[0] for i in range(rows)] == together
    assert sample(logits.flip(0).contiguous(), of.flip(1)) == together[::-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_are_told_and_leave_others_alone(dtype: torch.dtype) -> None:
    vocab = 1003
    logits = random_logits(6, vocab, dtype, 1.0).clone()
    of = settings(keys(6), torch.tensor([1.0, 0.8, 0.0, 0.0, 1.0, 1.0]), [(0, 1.0, 0.0), (5, 0.9, 0.1)])
    before = sample(logits, of)
    assert before[2:4] == logits[2:4].argmax(-1).tolist()
    logits[0, vocab - 1], logits[1, 3], logits[2, 700], logits[4] = (
        float("nan"),
        float("inf"),
        float("nan"),
        float("-inf"),
    )
    logits[5, 10:] = float("-inf")
    found = cpu.sample(logits, of)
    assert found is not None
    assert found[1].tolist() == [0, 0, 0, 1, 0, 1]
    assert found[0, [0, 1, 2, 4]].tolist() == [0] * 4
    assert found[0, 3] == before[3]
    assert found[0, 5] < 10


def test_a_temperature_by_which_logits_overflow_takes_the_greatest() -> None:
    logits = random_logits(2, 50, torch.float32, 1.0) * 1e36
    assert sample(logits, settings(keys(2), torch.full((2,), 1e-4), [(0, 1.0, 0.0)])) == logits.argmax(-1).tolist()


def test_settings_of_other_rows_are_refused_and_other_types_are_left_to_torch() -> None:
    of = settings(keys(2), torch.ones(2), FILTERS)
    with pytest.raises(ValueError, match=r"not int32 \(6, 3\)"):
        cpu.sample(torch.zeros(3, 8), of)
    assert cpu.sample(torch.zeros(2, 8).half(), of) is None
    assert sampling.sample_rows(torch.zeros(2, 8).half(), of) is None
    assert cpu.logprobs(torch.zeros(2, 8).half(), torch.zeros(2), 1) is None


# --- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 7, 16, 300, 5003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 5, 20, 6000])
def test_log_probabilities_are_those_of_float64(vocab: int, dtype: torch.dtype, count: int) -> None:
    logits = random_logits(6, vocab, dtype, 4.0).clone()
    logits[1] = logits[1].round()  # many equals
    logits[2, : vocab // 2] = float("-inf")
    tokens = (torch.arange(6, dtype=torch.int32) * 977) % vocab
    found = cpu.logprobs(logits, tokens, count)
    assert found is not None
    count = min(count, vocab)
    assert found.shape == (6, 2 + 2 * count)
    values = logits.double().log_softmax(-1)
    own = found[:, :1].contiguous().view(torch.float32).double()
    torch.testing.assert_close(own, values.gather(1, tokens.long().unsqueeze(1)), rtol=1e-6, atol=5e-6)
    assert found[:, 1].tolist() == [
        1 + int((row > row[token]).sum()) for row, token in zip(logits.float(), tokens, strict=True)
    ]
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices  # of equals the lower first
    assert found[:, 2 : 2 + count].tolist() == order[:, :count].tolist()
    likeliest = found[:, 2 + count :].contiguous().view(torch.float32).double()
    torch.testing.assert_close(likeliest, values.gather(1, order[:, :count]), rtol=1e-6, atol=5e-6)


def test_a_row_that_is_not_finite_has_no_log_probabilities() -> None:
    logits = torch.zeros(4, 40)
    logits[0, 39], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    found = cpu.logprobs(logits, torch.zeros(4, dtype=torch.int32), 3)
    assert found is not None
    floats = found.view(torch.float32)
    assert floats[:, 0].isnan().tolist() == floats[:, 5:].isnan().all(-1).tolist() == [True, True, True, False]
    assert not found[:3, 2:5].any()


@pytest.mark.parametrize("token", [-1, 40])
def test_a_token_outside_of_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(IndexError, match="outside of the vocabulary"):
        cpu.logprobs(torch.zeros(2, 40), torch.tensor([0, token]), 1)
