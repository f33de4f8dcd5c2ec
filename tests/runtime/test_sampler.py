"""The sampler against a naive one, row by row in float64, on batches in which every row wants something else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from octavo.kernels import sampling as kernels
from octavo.runtime.base import TokenMask
from octavo.runtime.sampled import Sampled
from octavo.runtime.sampler import Sampler
from octavo.runtime.sampling_rows import SampleItem
from octavo.types import Sampling

VOCAB = 700
CPU = torch.device("cpu")
PROMPT = [5, 6, 7, 5]


def params(**fields: object) -> Sampling:
    return Sampling(max_tokens=100, **fields)  # type: ignore[arg-type]


def random_logits(count: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sample_one(logits: torch.Tensor, sampling: Sampling, tokens: list[int] | None = None, prompt_len: int = 4) -> int:
    tokens = PROMPT if tokens is None else tokens
    sampler = Sampler(logits.shape[-1], CPU)
    sampler.start(0, tokens, prompt_len, sampling)
    return sampler.sample(logits.view(1, -1), [SampleItem(0, len(tokens))]).finish()[0][0]


def naive_logits(logits: torch.Tensor, s: Sampling, tokens: list[int], prompt_len: int) -> torch.Tensor:
    """All edits of one row, written after the documentation of the parameters."""
    x = logits.double().tolist()
    output = tokens[prompt_len:]
    for token in range(len(x)):
        banned = bool(s.allowed_token_ids) and token not in s.allowed_token_ids
        for word in s.bad_words:
            prefix = list(word[:-1])
            banned |= token == word[-1] and tokens[len(tokens) - len(prefix) :] == prefix
        banned |= len(output) < s.min_tokens and token in s.masked_until_min
        if banned:
            x[token] = -math.inf
            continue
        x[token] += s.logit_bias.get(token, 0.0)
        if token in tokens:
            x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
        x[token] -= s.frequency_penalty * output.count(token) + s.presence_penalty * (token in output)
    return torch.tensor(x, dtype=torch.float64)


def naive_sample(logits: torch.Tensor, s: Sampling, tokens: list[int], prompt_len: int) -> int:
    x = naive_logits(logits, s, tokens, prompt_len)
    if s.greedy:
        return int(x.argmax())
    probs = (x / s.temperature).softmax(-1)
    kept = probs >= s.min_p * probs.max()
    if s.top_k > 0:
        kept &= probs >= probs.sort(descending=True).values[min(s.top_k, len(x)) - 1]
    inside = probs.masked_fill(~kept, 0.0)
    descending = inside.sort(descending=True).values
    below = descending.cumsum(-1) - descending < s.top_p * inside.sum()
    kept &= (probs >= descending[below][-1]) | (s.top_p == 1)
    keys = kernels.noise_keys(np.array([s.seed], np.uint64), np.array([len(tokens)], np.uint64))
    noise = kernels.exponential(torch.from_numpy(keys), torch.arange(len(x), dtype=torch.int32).unsqueeze(0))[0]
    return int((probs.masked_fill(~kept, 0.0) / noise.double()).argmax())


MIXED = [
    params(temperature=0.0),
    params(seed=1),
    params(seed=2, temperature=0.3),
    params(seed=3, temperature=3.0, top_p=0.95),
    params(seed=4, top_k=5),
    params(seed=5, top_k=300, top_p=0.9),
    params(seed=6, min_p=0.05),
    params(seed=7, top_p=0.4, top_k=50, min_p=0.01, temperature=1.5),
    params(temperature=0.0, repetition_penalty=1.8),
    params(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.7),
    params(seed=8, repetition_penalty=0.7, frequency_penalty=-0.5, top_p=0.8),
    params(temperature=0.0, logit_bias={3: 9.0, 4: -50.0}),
    params(seed=9, allowed_token_ids=(10, 20, 30, 40)),
    params(seed=10, allowed_token_ids=(10, 20), logit_bias={10: -1.0, 11: 100.0}),
    params(temperature=0.0, min_tokens=6, masked_until_min=tuple(range(300)), logit_bias={2: 20.0}),
    params(seed=11, bad_words=((5,), (5, 6), (7, 8, 9)), top_k=20),
    params(temperature=0.0, bad_words=((7, 5, 1), (5, 1), (1,)), logit_bias={1: 40.0, 2: 30.0}),
    params(seed=-3, temperature=0.8),
]


def generate(sampler: Sampler, rows: list[int], steps: list[torch.Tensor], overlap: bool = False) -> list[list[int]]:
    """Feeds one logits tensor a step to the started ``rows``, whose prompts are `PROMPT`."""
    pending: list[Sampled] = []
    out: list[list[int]] = [[] for _ in rows]
    for number, logits in enumerate(steps):
        pending.append(sampler.sample(logits, [SampleItem(row, len(PROMPT) + number) for row in rows]))
        if not overlap or number + 1 == len(steps):
            for sampled in pending:
                tokens = sampled.finish()[0]
                for i, token in enumerate(tokens):
                    out[i].append(token)
            pending.clear()
    return out


@pytest.mark.parametrize("overlap", [False, True])
def test_every_parameter_agrees_with_the_naive_sampler_in_a_mixed_batch(overlap: bool) -> None:
    sampler = Sampler(VOCAB, CPU)
    rows = [3 * i + 1 for i in range(len(MIXED))]
    for row, sampling in zip(rows, MIXED, strict=True):
        sampler.start(row, PROMPT, len(PROMPT), sampling)
    steps = [random_logits(len(MIXED), seed) for seed in range(12)]
    got = generate(sampler, rows, steps, overlap)
    for i, sampling in enumerate(MIXED):
        tokens = list(PROMPT)
        for logits in steps:
            tokens.append(naive_sample(logits[i], msgspec_seed(sampling), tokens, len(PROMPT)))
        assert got[i] == tokens[len(PROMPT) :], sampling


def test_without_the_extension_the_same_tokens_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [random_logits(len(MIXED), seed) for seed in range(20, 26)]
    allowed = mask_of({i: {*range(i, VOCAB, 3)} for i in range(1, len(MIXED), 2)})
    outcomes = []
    for native in (kernels._native_sample, None):
        monkeypatch.setattr(kernels, "_native_sample", native)
        sampler = Sampler(VOCAB, CPU)
        for row, sampling in enumerate(MIXED):
            sampler.start(row, PROMPT, len(PROMPT), sampling)
        free = generate(sampler, list(range(len(MIXED))), steps)
        items = [SampleItem(row, 20) for row in range(len(MIXED))]
        outcomes.append((free, sampler.sample(steps[0], items, mask=allowed).finish()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("fields", [{"temperature": 1.3}, {"top_p": 0.8}, {"min_p": 0.02, "top_k": 60}])
def test_tokens_are_drawn_as_often_as_they_are_likely(fields: dict[str, Any]) -> None:
    draws, vocab = 20_000, 64
    sampling = params(seed=3, **fields)
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(6))
    probs = (logits.double() / sampling.temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept = (probs[order].cumsum(-1) - probs[order] < sampling.top_p) & (probs[order] >= sampling.min_p * probs.max())
    if sampling.top_k > 0:
        kept[sampling.top_k :] = False
    expected = (probs[order[kept]] / probs[order[kept]].sum() * draws).numpy()
    sampler = Sampler(vocab, CPU)
    sampler.start(0, [1], 1, sampling)
    tokens = sampler.sample(logits.expand(draws, vocab), [SampleItem(0, at) for at in range(draws)]).finish()[0]
    counts = np.bincount(tokens, minlength=vocab)[order.numpy()]
    assert counts[: len(expected)].sum() == draws
    statistic = ((counts[: len(expected)] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def msgspec_seed(sampling: Sampling) -> Sampling:
    """A negative seed stands for itself modulo 2^64."""
    return sampling if sampling.seed >= 0 else params(temperature=sampling.temperature, seed=sampling.seed % 2**64)


def test_a_row_samples_the_same_alone_in_a_batch_and_elsewhere() -> None:
    steps = [random_logits(len(MIXED), seed) for seed in range(4)]
    together = Sampler(VOCAB, CPU)
    for i, sampling in enumerate(MIXED):
        together.start(i, PROMPT, len(PROMPT), sampling)
    expected = generate(together, list(range(len(MIXED))), steps)
    for i, sampling in enumerate(MIXED):
        alone = Sampler(VOCAB, CPU)
        alone.start(77 - i, PROMPT, len(PROMPT), sampling)
        assert generate(alone, [77 - i], [logits[i : i + 1] for logits in steps]) == [expected[i]]


def test_a_preempted_row_goes_on_as_if_it_had_not_been() -> None:
    steps = [random_logits(len(MIXED), seed) for seed in range(10)]
    rows = list(range(len(MIXED)))
    sampler = Sampler(VOCAB, CPU)
    for row, sampling in enumerate(MIXED):
        sampler.start(row, PROMPT, len(PROMPT), sampling)
    expected = generate(sampler, rows, steps)
    for row, sampling in enumerate(MIXED):
        sampler.end(row)
        sampler.start(row, PROMPT + expected[row][:5], len(PROMPT), sampling)
    for number in range(5, 10):
        items = [SampleItem(row, len(PROMPT) + number) for row in rows]
        assert sampler.sample(steps[number], items).finish()[0] == [tokens[number] for tokens in expected]


def test_a_row_starts_clean_after_another_sequence() -> None:
    sampler = Sampler(VOCAB, CPU)
    sampling = params(temperature=0.0, repetition_penalty=2.0, presence_penalty=2.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 9] = 1.0
    for _ in range(3):
        sampler.start(0, [1], 1, sampling)
        assert sampler.sample(logits, [SampleItem(0, 1)]).finish()[0] == [9]
        assert sampler.sample(logits, [SampleItem(0, 2)]).finish()[0] != [9]
        sampler.end(0)


def test_seeds_decide_the_draw_and_nothing_else_does() -> None:
    logits = torch.zeros(VOCAB)
    first = [sample_one(logits, params(seed=seed)) for seed in range(50)]
    assert first == [sample_one(logits, params(seed=seed)) for seed in range(50)]
    assert len(set(first)) > 40
    positions = {sample_one(logits, params(seed=1), [0] * n, 1) for n in range(1, 51)}
    assert len(positions) > 40


def test_temperature_zero_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(VOCAB)
    logits[[30, 600]] = 1.0
    assert sample_one(logits, params(temperature=0.0, seed=9)) == 30


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(1, 0)[0]
    for temperature in (1e-3, 1e-6, 1e-40):
        assert sample_one(logits, params(temperature=temperature, seed=3)) == int(logits.argmax())


def test_top_k_draws_from_all_tokens_equal_to_the_kth() -> None:
    logits = torch.zeros(VOCAB)
    logits[:10] = 5.0
    drawn = {sample_one(logits, params(top_k=3, seed=seed)) for seed in range(200)}
    assert drawn == set(range(10))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_logits_are_reported_and_leave_other_rows_alone(value: float) -> None:
    logits = random_logits(len(MIXED), 5)
    sampler = Sampler(VOCAB, CPU)
    for row, sampling in enumerate(MIXED):
        sampler.start(row, PROMPT, len(PROMPT), sampling)
    expected = generate(sampler, list(range(len(MIXED))), [logits])
    for broken in range(len(MIXED)):
        other = logits.clone()
        if value < 0:
            other[broken] = value
        else:
            other[broken, 20] = value
        for row, sampling in enumerate(MIXED):
            sampler.start(row, PROMPT, len(PROMPT), sampling)
        items = [SampleItem(row, len(PROMPT)) for row in range(len(MIXED))]
        tokens, _, bad = sampler.sample(other, items).finish()
        assert bad == [broken]
        assert tokens[broken] == 0
        assert [t for i, t in enumerate(tokens) if i != broken] == [t for i, (t,) in enumerate(expected) if i != broken]


def test_a_row_to_which_no_token_is_left_is_bad() -> None:
    sampler = Sampler(VOCAB, CPU)
    sampler.start(0, PROMPT, 4, params(allowed_token_ids=(3,), bad_words=((3,),), top_p=0.9, logprobs=1))
    sampler.start(1, PROMPT, 4, params(allowed_token_ids=(3,), top_p=0.9))
    tokens, logprobs, bad = sampler.sample(random_logits(2, 1), [SampleItem(0, 4), SampleItem(1, 4)]).finish()
    assert (tokens, logprobs, bad) == ([0, 3], {}, [0])


def test_masked_tokens_with_minus_infinity_from_the_model_are_never_drawn() -> None:
    logits = torch.full((VOCAB,), float("-inf"))
    logits[[8, 9]] = 0.0
    drawn = {sample_one(logits, params(seed=seed, top_p=0.99)) for seed in range(40)}
    assert drawn == {8, 9}


def test_min_tokens_lets_the_end_through_once_reached() -> None:
    sampling = params(temperature=0.0, min_tokens=2, masked_until_min=(1,))
    logits = torch.zeros(1, VOCAB)
    logits[0, 1] = 5.0
    sampler = Sampler(VOCAB, CPU)
    sampler.start(0, PROMPT, len(PROMPT), sampling)
    assert generate(sampler, [0], [logits] * 4) == [[0, 0, 1, 1]]


def test_batches_too_large_to_work_on_at_once_sample_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [random_logits(len(MIXED) * 2, seed) for seed in range(2)]
    results = []
    for limit in (1 << 24, 3 * VOCAB):
        monkeypatch.setattr("octavo.runtime.sampler._MAX_ELEMENTS", limit)
        sampler = Sampler(VOCAB, CPU)
        for row, sampling in enumerate(MIXED * 2):
            sampler.start(row, PROMPT, len(PROMPT), sampling)
        results.append(generate(sampler, list(range(len(MIXED) * 2)), steps))
        prompt = sampler.prompt_logprobs(steps[0], list(range(len(MIXED) * 2)), 1)
        assert [entry.token for entry in prompt] == list(range(len(MIXED) * 2))
    assert results[0] == results[1]


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(len(MIXED), 3)
    before = logits.clone()
    sampler = Sampler(VOCAB, CPU)
    for row, sampling in enumerate(MIXED):
        sampler.start(row, PROMPT, len(PROMPT), sampling)
    generate(sampler, list(range(len(MIXED))), [logits])
    assert torch.equal(logits, before)


def test_bfloat16_logits_are_edited_in_float32() -> None:
    logits = torch.zeros(VOCAB, dtype=torch.bfloat16)
    logits[:] = 256.0
    assert sample_one(logits, params(temperature=0.0, logit_bias={6: 0.01})) == 6


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    logits = random_logits(4, 8)
    wanted = [
        params(temperature=0.0, logprobs=3, allowed_token_ids=(100,)),
        params(temperature=0.0),
        params(seed=2, temperature=2.5, logprobs=0),
        params(temperature=0.0, logprobs=20, repetition_penalty=1.7),
    ]
    sampler = Sampler(VOCAB, CPU)
    for row, sampling in enumerate(wanted):
        sampler.start(row, PROMPT, 4, sampling)
    tokens, found, bad = sampler.sample(logits, [SampleItem(row, 4) for row in range(4)]).finish()
    assert not bad
    assert sorted(found) == [0, 2, 3]
    for item, entry in found.items():
        expected = logits[item].double().log_softmax(-1)
        assert entry.token == tokens[item]
        assert entry.logprob == pytest.approx(float(expected[entry.token]), abs=1e-5)
        assert entry.rank == expected.argsort(descending=True).tolist().index(entry.token) + 1
        count = wanted[item].logprobs or 0
        assert entry.top_ids == expected.topk(count).indices.tolist()
        assert entry.top_logprobs == pytest.approx(expected.topk(count).values.tolist(), abs=1e-5)


def test_prompt_logprobs_are_of_the_targets() -> None:
    logits = random_logits(6, 9).bfloat16()
    targets = [1, 2, 3, 699, 0, 5]
    found = Sampler(VOCAB, CPU).prompt_logprobs(logits, targets, 2)
    expected = logits.double().log_softmax(-1)
    assert [entry.token for entry in found] == targets
    for row, entry in zip(expected, found, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        assert entry.rank == int((row > row[entry.token]).sum()) + 1
        assert entry.top_logprobs == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)


def test_penalties_follow_sequences_that_outgrow_their_tables() -> None:
    wanted = [params(temperature=0.0, repetition_penalty=1.0 + row / 10, frequency_penalty=0.2) for row in range(1, 8)]
    prompts = [[(row * 31 + i) % VOCAB for i in range(100 * row)] for row in range(7)]
    sampler = Sampler(VOCAB, CPU)
    for row, sampling in enumerate(wanted):
        sampler.start(row, prompts[row], len(prompts[row]), sampling)
    known = [list(prompt) for prompt in prompts]
    for step in range(30):
        logits = random_logits(7, step % 3, scale=1.0)
        expected = [naive_sample(logits[r], wanted[r], known[r], len(prompts[r])) for r in range(7)]
        tokens = sampler.sample(logits, [SampleItem(r, len(known[r])) for r in range(7)]).finish()[0]
        assert tokens == expected
        for sequence, token in zip(known, tokens, strict=True):
            sequence.append(token)
    long = list(range(VOCAB - 1)) * 3
    sampler.start(3, long, 5, wanted[3])
    logits = random_logits(1, 77)
    assert sampler.sample(logits, [SampleItem(3, len(long))]).finish()[0] == [
        naive_sample(logits[0], wanted[3], long, 5)
    ]


def test_rows_may_be_ended_twice_and_out_of_order() -> None:
    sampler = Sampler(VOCAB, CPU)
    penalised = params(temperature=0.0, repetition_penalty=1.5, logprobs=1)
    for row in (9, 2, 30):
        sampler.start(row, PROMPT, 4, penalised)
    sampler.end(2)
    sampler.end(2)
    sampler.start(2, PROMPT, 4, params(temperature=0.0))
    tokens, found, _ = sampler.sample(random_logits(2, 4), [SampleItem(30, 4), SampleItem(2, 4)]).finish()
    assert len(tokens) == 2
    assert list(found) == [0]


# --- masks of grammars ------------------------------------------------------------------------------------------------


def mask_of(allowed: dict[int, set[int]]) -> TokenMask:
    """Items to the tokens that they may sample."""
    bits = np.zeros((len(allowed), -(-VOCAB // 32)), np.uint32)
    for at, tokens in enumerate(allowed.values()):
        for token in tokens:
            bits[at, token // 32] |= np.uint32(1 << token % 32)
    return TokenMask.of(list(allowed), bits.view(np.int32))


@pytest.mark.parametrize("greedy", [True, False])
def test_a_mask_leaves_its_tokens_and_concerns_its_items_alone(greedy: bool) -> None:
    logits = random_logits(5, 11)
    before = logits.clone()
    kinds = [params(seed=i, temperature=0.0 if greedy else 0.9, top_p=1.0 if i % 2 else 0.9) for i in range(5)]
    allowed = {1: {3, 40, 699}, 3: {0, 31, 32, 65}, 4: {650}}
    free, under = Sampler(VOCAB, CPU), Sampler(VOCAB, CPU)
    for row, kind in enumerate(kinds):
        for sampler in (free, under):
            sampler.start(row, PROMPT, 4, kind)
    items = [SampleItem(row, 4) for row in range(5)]
    unmasked = free.sample(logits, items).finish()[0]
    tokens, _, bad = under.sample(logits, items, mask=mask_of(allowed)).finish()
    assert bad == []
    assert torch.equal(logits, before)
    for item, token in enumerate(tokens):
        if item not in allowed:
            assert token == unmasked[item]
            continue
        assert token in allowed[item]
        kept = sorted(allowed[item])
        alone = torch.full((VOCAB,), -math.inf)
        alone[kept] = logits[item, kept]
        assert token == sample_one(alone, kinds[item])


def test_a_mask_comes_before_penalties_and_does_not_touch_logprobs() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 8, 9]] = torch.tensor([5.0, 4.0, 9.0])
    sampler = Sampler(VOCAB, CPU)
    sampler.start(0, PROMPT, 4, params(temperature=0.0, logit_bias={8: 2.0}, logprobs=1))
    tokens, logprobs, _ = sampler.sample(logits, [SampleItem(0, 4)], mask=mask_of({0: {7, 8}})).finish()
    assert tokens == [8]
    assert (logprobs[0].rank, logprobs[0].top_ids) == (3, [9])
    assert logprobs[0].logprob == pytest.approx(float(logits.log_softmax(-1)[0, 8]))


def test_an_empty_mask_makes_its_item_bad_and_no_other() -> None:
    sampler = Sampler(VOCAB, CPU)
    for row in range(2):
        sampler.start(row, PROMPT, 4, params(temperature=0.0))
    logits = random_logits(2, 12)
    tokens, _, bad = sampler.sample(logits, [SampleItem(0, 4), SampleItem(1, 4)], mask=mask_of({0: set()})).finish()
    assert bad == [0]
    assert tokens[1] == int(logits[1].argmax())


def test_a_mask_changes_nothing_for_items_that_sample_what_it_allows_and_is_not_asked_for() -> None:
    logits = random_logits(2, 13)
    sampler = Sampler(VOCAB, CPU)
    for row in range(2):
        sampler.start(row, PROMPT, 4, params(seed=row, temperature=float(row)))
    items = [SampleItem(0, 4), SampleItem(1, 4)]
    free = sampler.sample(logits, items).finish()[0]
    asked: list[int] = []

    def bits(places: Sequence[int]) -> Any:
        asked.extend(places)
        return mask_of({0: {5}}).bits([0])

    mask = TokenMask([0, 1], lambda place, token: place == 1 and token == free[1], bits)
    assert sampler.sample(logits, items, mask=mask).finish()[0] == [5, free[1]]
    assert asked == [0]


def test_few_tokens_are_looked_at_alone_with_the_same_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    allowed = {i: {*range(i, VOCAB, 97 + i)} for i in range(0, len(MIXED), 2)}
    for most in (512, 0):
        monkeypatch.setattr("octavo.runtime.sample_groups._FEW_OCTETS", most)
        sampler = Sampler(VOCAB, CPU)
        for row, sampling in enumerate(MIXED):
            sampler.start(row, PROMPT, len(PROMPT), sampling)
        items = [SampleItem(row, len(PROMPT)) for row in range(len(MIXED))]
        outcomes.append(
            [sampler.sample(random_logits(len(MIXED), s), items, mask=mask_of(allowed)).finish() for s in range(4)]
        )
    assert outcomes[0] == outcomes[1]
