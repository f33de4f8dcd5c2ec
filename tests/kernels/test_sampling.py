"""The functions of `kernels.sampling` against naive float64 ones, and the noise against statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from octavo.kernels import sampling

VOCAB = 1000
CHI_SQUARE_LIMIT = 5.0  # standard deviations


def keys(seeds: list[int], positions: list[int]) -> torch.Tensor:
    words = sampling.noise_keys(np.array(seeds, np.uint64), np.array(positions, np.uint64))
    return torch.from_numpy(words)


def filters(rows: list[tuple[int, float, float]], vocab: int) -> sampling.Filters:
    top_k, top_p, min_p = zip(*rows, strict=True)
    everything = any(p < 1 and k == 0 for k, p, _ in rows)
    return sampling.Filters(
        torch.tensor(top_k, dtype=torch.int32).unsqueeze(1),
        torch.tensor(top_p).unsqueeze(1),
        torch.tensor(min_p).unsqueeze(1),
        vocab if everything else max(1, *top_k),
    )


def naive_kept(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Which tokens of ``logits[V]`` may be drawn."""
    probs = logits.double().softmax(-1)
    kept = probs >= min_p * probs.max()
    if top_k:
        kept &= logits >= logits.sort(descending=True).values[min(top_k, len(logits)) - 1]
    if top_p < 1:
        inside = probs.masked_fill(~kept, 0.0)
        order = inside.sort(descending=True)
        before = order.values.cumsum(-1) - order.values
        last = order.values[before < np.float32(top_p) * inside.sum()][-1]
        kept &= probs >= last
    return set(kept.nonzero().flatten().tolist())


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Distance of the statistic from its mean, in standard deviations."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("vocab", [1, 7, 511, 513, 1024, 5000, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_finds_the_lowest_of_equals(vocab: int, dtype: torch.dtype) -> None:
    x = torch.randint(0, 5, (8, vocab), generator=torch.Generator().manual_seed(vocab)).to(dtype)
    index, value = sampling.argmax(x)
    assert index.tolist() == [row.index(max(row)) for row in x.tolist()]
    assert value.tolist() == x.amax(-1).tolist()


def test_argmax_lets_nan_win_wherever_it_is() -> None:
    x = torch.zeros(3, 1001)
    x[0, 3], x[1, 700], x[2, 1000] = float("nan"), float("nan"), float("nan")
    assert sampling.argmax(x)[1].isnan().all()


@pytest.mark.parametrize(
    "row",
    [
        (1, 1.0, 0.0),
        (50, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 0.5, 0.0),
        (0, 0.999, 0.0),
        (0, 1.0, 0.1),
        (0, 1.0, 1e-4),
        (40, 0.8, 0.05),
        (400, 0.95, 0.0),
        (400, 1.0, 1e-3),
        (0, 0.9, 1e-4),
        (VOCAB, 0.7, 0.0),
    ],
)
@pytest.mark.parametrize("scale", [0.2, 2.0, 50.0])
@pytest.mark.parametrize("coarse", [False, True])
def test_filters_keep_what_the_naive_ones_keep(row: tuple[int, float, float], scale: float, coarse: bool) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * scale
    if coarse:  # many equal logits, as bfloat16 has them
        logits = (logits * 4).round() / 4
    probs = sampling.probabilities(logits, torch.ones(1, 1))
    naive = {token for token in naive_kept(logits[0], *row) if probs[0, token] > 0}
    for thresholds in (sampling._row_thresholds, sampling._sorted_thresholds):
        kept = (probs >= thresholds(probs, filters([row], VOCAB))) & (probs > 0)
        assert set(kept[0].nonzero().flatten().tolist()) == naive


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("coarse", [False, True])
def test_the_shortcut_draws_what_the_whole_vocabulary_would(scale: float, coarse: bool) -> None:
    rows = [(0, 0.9, 0.0), (20, 1.0, 0.0), (300, 0.99, 0.0), (0, 1.0, 0.02), (0, 0.99, 0.001), (7, 0.5, 0.2)] * 20
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(len(rows), VOCAB, generator=generator) * scale
    if coarse:
        logits = logits.round()
    probs = sampling.probabilities(logits, torch.ones(len(rows), 1))
    every, key = filters(rows, VOCAB), keys(list(range(len(rows))), [9] * len(rows))
    short = sampling.draw_filtered(probs, key, every)
    assert short.tolist() == sampling.draw(sampling._filter(probs, every), key).tolist()
    for token, logit, row in zip(short.tolist(), logits, rows, strict=True):
        assert token in naive_kept(logit, *row)


def test_tokens_equal_to_the_kth_all_stay() -> None:
    probs = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    kept = sampling._filter(probs, filters([(2, 1.0, 0.0)], 4))
    assert (kept > 0).tolist() == [[True, True, True, True]]
    kept = sampling._filter(probs, filters([(1, 1.0, 0.0)], 4))
    assert (kept > 0).tolist() == [[True, False, False, False]]


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])  # of the first two, the first has 0.57
    assert (sampling._filter(probs, filters([(2, 0.5, 0.0)], 4)) > 0).tolist() == [[True, False, False, False]]
    assert (sampling._filter(probs, filters([(0, 0.5, 0.0)], 4)) > 0).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_the_weights(vary: str) -> None:
    draws, vocab = 20_000, 40
    probs = torch.randn(vocab, generator=torch.Generator().manual_seed(4)).softmax(-1)
    if vary == "seed":
        key = keys(list(range(draws)), [17] * draws)
    else:
        key = keys([1234] * draws, list(range(draws)))
    tokens = sampling.draw(probs.expand(draws, vocab), key)
    counts = np.bincount(tokens.numpy(), minlength=vocab)
    assert abs(chi_square(counts, probs.double().numpy() * draws)) < CHI_SQUARE_LIMIT


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, -1), (2**32, 0)])
def test_draws_of_neighbouring_keys_are_independent(step: tuple[int, int]) -> None:
    draws, vocab = 20_000, 8
    seeds, positions = np.arange(draws) * 3 + 1, np.full(draws, 50)
    weights = torch.ones(draws, vocab)
    first = sampling.draw(weights, keys(seeds.tolist(), positions.tolist()))
    second = sampling.draw(weights, keys((seeds + step[0]).tolist(), (positions + step[1]).tolist()))
    pairs = np.bincount((first * vocab + second).numpy(), minlength=vocab * vocab)
    assert abs(chi_square(pairs, np.full(vocab * vocab, draws / vocab**2))) < CHI_SQUARE_LIMIT


def test_noise_is_exponential_and_uncorrelated_over_the_vocabulary() -> None:
    noise = sampling.exponential(keys([0, 1], [0, 0]), torch.arange(200_000, dtype=torch.int32).unsqueeze(0))
    assert noise.isfinite().all()
    assert (noise > 0).all()
    for row in noise.double().numpy():
        bins = np.histogram(np.exp(-row), bins=256, range=(0, 1))[0]
        assert abs(chi_square(bins, np.full(256, len(row) / 256))) < CHI_SQUARE_LIMIT
    a, b = noise.double().numpy()
    for x, y in ((a, b), (a[:-1], a[1:]), (a[:-256], a[256:])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / len(x) ** 0.5


def test_every_bit_of_seed_and_position_changes_half_of_the_noise_bits() -> None:
    ids = torch.arange(2000, dtype=torch.int32).unsqueeze(0)

    def top_bits(seed: int, position: int) -> np.ndarray:
        uniform = torch.exp(-sampling.exponential(keys([seed], [position]), ids).double())
        return (uniform * 2**16).long().numpy().astype(np.uint16)

    base = top_bits(12, 34)
    inputs = [(12 ^ 1 << bit, 34) for bit in range(64)] + [(12, 34 ^ 1 << bit) for bit in range(31)]
    for seed, position in inputs:
        share = np.unpackbits((base ^ top_bits(seed, position)).view(np.uint8)).mean()
        assert abs(share - 0.5) < 0.02


def mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def python_noise(seed: int, position: int, token: int) -> float:
    key = mix64((mix64(seed) + position) % 2**64)
    h = (token * 0x9E3779B1 + key) % 2**32
    h = ((h ^ (h >> 16)) * 0x7FEB352D + (key >> 32)) % 2**32
    h = ((h ^ (h >> 15)) * 0x846CA68B) % 2**32
    h = (h ^ (h >> 16) ^ (0xFFFF0000 if h >> 31 else 0)) % 2**32
    return -math.log1p(-(h + 0.5) / 2**31)


def test_noise_is_the_documented_function() -> None:
    """A seed would mean another text if this changed."""
    for seed, position in ((0, 0), (42, 7), (2**64 - 1, 131_071)):
        noise = sampling.exponential(keys([seed], [position]), torch.arange(3000, dtype=torch.int32).unsqueeze(0))
        expected = torch.tensor([python_noise(seed, position, token) for token in range(3000)])
        torch.testing.assert_close(-torch.expm1(-noise[0]), -torch.expm1(-expected), rtol=1e-6, atol=2e-7)
    assert mix64(0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0


def test_a_single_token_left_is_drawn_whatever_the_noise() -> None:
    weights = torch.zeros(5000, 3)
    weights[:, 1] = 1e-30
    assert set(sampling.draw(weights, keys(list(range(5000)), [0] * 5000)).tolist()) == {1}


def test_ranks_count_likelier_tokens_only() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    own, rank, ids, values = sampling.logprobs(logits.expand(4, 4), torch.arange(4), 2)
    assert rank.tolist() == [4, 1, 1, 3]
    torch.testing.assert_close(own, logits[0].log_softmax(-1))
    assert [set(row) for row in ids.tolist()] == [{1, 2}] * 4
    assert values.shape == (4, 2)
