"""Sampling by rows in Triton: the tokens of the CPU, without a wait for the device; in Triton's interpreter too."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from octavo.kernels import select
from octavo.runtime.base import TokenMask
from octavo.runtime.sampled import Sampled
from octavo.runtime.sampler import Sampler
from octavo.runtime.sampling_rows import SampleItem
from octavo.types import Sampling

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter divides where a card would mask
]
needs_card = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")

VOCAB = 5003
STEPS = 8 if DEVICE == "cuda" else 1
PROMPT = [5, 6, 7, 5]
PLAIN = [
    Sampling(max_tokens=9, temperature=0.0),
    Sampling(max_tokens=9, seed=1),
    Sampling(max_tokens=9, seed=2, top_k=50),
    Sampling(max_tokens=9, seed=3, top_p=0.9, temperature=2.0),
    Sampling(max_tokens=9, seed=4, min_p=0.05),
    Sampling(max_tokens=9, seed=5, min_p=0.001, top_k=3000, top_p=0.99),
    Sampling(max_tokens=9, seed=8, top_p=0.02, temperature=3.0),  # more rounds than all programs take part in
]
EDITED = [
    Sampling(max_tokens=9, temperature=0.0, repetition_penalty=1.3, frequency_penalty=1.0, logprobs=3),
    Sampling(max_tokens=9, seed=6, allowed_token_ids=(3, 4, 5), bad_words=((3,), (5, 4)), presence_penalty=0.5),
    Sampling(max_tokens=9, seed=7, min_tokens=2, masked_until_min=(1, 2), logit_bias={1: 12.0}),
]


def started(samplings: list[Sampling], *, by_rows: bool, vocab: int = VOCAB) -> Sampler:
    """By the kernels, or on the CPU without them."""
    sampler = Sampler(vocab, torch.device("cpu"))
    if by_rows:
        chosen = select._triton()
        assert isinstance(chosen, select.Ops), chosen
        ops = chosen if DEVICE == "cuda" else replace(select.REFERENCE, row_sampling=chosen.row_sampling)
        sampler = Sampler(vocab, torch.device(DEVICE), ops)
    for row, sampling in enumerate(samplings):
        sampler.start(row, PROMPT, len(PROMPT), sampling)
    return sampler


def launch(sampler: Sampler, logits: list[torch.Tensor], mask: TokenMask | None = None) -> list[Sampled]:
    """All steps before any is finished."""
    return [
        sampler.sample(x, [SampleItem(row, len(PROMPT) + step) for row in range(len(x))], mask=mask)
        for step, x in enumerate(logits)
    ]


def random_mask(items: list[int]) -> TokenMask:
    """One token in sixteen or so."""
    generator = np.random.default_rng(0)
    words = generator.integers(-(2**31), 2**31, (4, len(items), -(-VOCAB // 32)))
    return TokenMask.of(items, np.bitwise_and.reduce(words).astype(np.int32))


def test_tokens_are_those_of_the_cpu() -> None:
    samplings = (PLAIN + EDITED) * (4 if DEVICE == "cuda" else 1)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(len(samplings), VOCAB, generator=generator) * 3 for _ in range(STEPS)]
    logits[-1][2, 9] = float("nan")
    cpu = [s.finish() for s in launch(started(samplings, by_rows=False), logits)]
    cuda = [s.finish() for s in launch(started(samplings, by_rows=True), [x.to(DEVICE) for x in logits])]
    assert [(tokens, bad) for tokens, _, bad in cpu] == [(tokens, bad) for tokens, _, bad in cuda]
    assert cpu[-1][2] == [2]
    for (_, ours, _), (_, theirs, _) in zip(cpu, cuda, strict=True):
        assert {i: (e.token, e.rank, e.top_ids) for i, e in ours.items()} == {
            i: (e.token, e.rank, e.top_ids) for i, e in theirs.items()
        }


def test_tokens_under_masks_are_those_of_the_cpu() -> None:
    samplings = PLAIN + EDITED[::2]
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(len(samplings), VOCAB, generator=generator) * 3 for _ in range(min(STEPS, 4))]
    for items in (list(range(len(samplings))), [1, 2, 4, 6]):
        mask = random_mask(items)
        cpu = [s.finish()[0] for s in launch(started(samplings, by_rows=False), logits, mask)]
        cuda = [s.finish()[0] for s in launch(started(samplings, by_rows=True), [x.to(DEVICE) for x in logits], mask)]
        assert cpu == cuda
        for tokens in cuda:
            for at, item in enumerate(items):
                assert mask.allows(at, tokens[item])


def test_penalties_count_tokens_over_steps() -> None:
    """Of logits that favour one token, the second choice shows whether that one was counted."""
    samplings = [Sampling(max_tokens=9, temperature=0.0, frequency_penalty=f) for f in (1.0, 0.0)]
    logits = torch.zeros(2, VOCAB, device=DEVICE)
    logits[:, 4000], logits[:, 17] = 2.5, 2.0
    sampled = launch(started(samplings, by_rows=True), [logits] * 3)
    assert [s.finish()[0] for s in sampled] == [[4000, 4000], [17, 4000], [4000, 4000]]


@needs_card
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(max_tokens=1, temperature=0.7, top_p=0.4), id="top_p"),
        pytest.param(Sampling(max_tokens=1, top_k=60), id="top_k"),
        pytest.param(Sampling(max_tokens=1, top_k=700, top_p=0.8, min_p=1e-4), id="all"),
        pytest.param(Sampling(max_tokens=1, min_p=0.2), id="min_p"),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_tokens_of_a_large_vocabulary_are_those_of_the_cpu(sampling: Sampling, ties: bool) -> None:
    """Where lists run over and rounds do not settle, too: 200 rows, flat or with many equals."""
    vocab, rows = 128_256, 200
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2))
    logits = logits.round() if ties else logits
    samplings = [msgspec.structs.replace(sampling, seed=seed) for seed in range(rows)]
    want = launch(started(samplings, by_rows=False, vocab=vocab), [logits])[0].finish()[0]
    got = launch(started(samplings, by_rows=True, vocab=vocab), [logits.cuda()])[0].finish()[0]
    assert sum(a != b for a, b in zip(got, want, strict=True)) <= 1  # a draw may hang on the last bit


@needs_card
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("mask", [None, random_mask([0, 2])])
@pytest.mark.parametrize("samplings", [PLAIN, EDITED])
def test_sampling_does_not_wait_for_the_device(samplings: list[Sampling], mask: TokenMask | None) -> None:
    logits = [torch.randn(len(samplings), VOCAB, device="cuda") for _ in range(3)]
    sampler = started(samplings, by_rows=True)
    launch(sampler, logits, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = launch(sampler, logits, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(not s.finish()[2] for s in sampled)
