"""Sampling on CUDA: the tokens of the CPU, without a wait for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.runtime.base import TokenMask
from octavo.runtime.sampler import Sampled, SampleItem, Sampler
from octavo.types import Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

VOCAB = 5003
PROMPT = [5, 6, 7, 5]
PLAIN = [
    Sampling(max_tokens=9, temperature=0.0),
    Sampling(max_tokens=9, seed=1),
    Sampling(max_tokens=9, seed=2, top_k=50),
    Sampling(max_tokens=9, seed=3, top_p=0.9, temperature=2.0),
    Sampling(max_tokens=9, seed=4, min_p=0.05),
    Sampling(max_tokens=9, seed=5, min_p=0.001, top_k=3000, top_p=0.99),
]
EDITED = [
    Sampling(max_tokens=9, temperature=0.0, repetition_penalty=1.3, frequency_penalty=1.0, logprobs=3),
    Sampling(max_tokens=9, seed=6, allowed_token_ids=(3, 4, 5), bad_words=((3,), (5, 4)), presence_penalty=0.5),
    Sampling(max_tokens=9, seed=7, min_tokens=2, masked_until_min=(1, 2), logit_bias={1: 12.0}),
]


def started(device: str, samplings: list[Sampling]) -> Sampler:
    sampler = Sampler(VOCAB, torch.device(device))
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
    return TokenMask(items, np.bitwise_and.reduce(words).astype(np.int32))


def test_tokens_are_those_of_the_cpu() -> None:
    samplings = (PLAIN + EDITED) * 4
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(len(samplings), VOCAB, generator=generator) * 3 for _ in range(8)]
    logits[3][2, 9] = float("nan")
    cpu = [s.finish() for s in launch(started("cpu", samplings), logits)]
    cuda = [s.finish() for s in launch(started("cuda", samplings), [x.cuda() for x in logits])]
    assert [(tokens, bad) for tokens, _, bad in cpu] == [(tokens, bad) for tokens, _, bad in cuda]
    assert cpu[3][2] == [2]
    for (_, ours, _), (_, theirs, _) in zip(cpu, cuda, strict=True):
        assert {i: (e.token, e.rank, e.top_ids) for i, e in ours.items()} == {
            i: (e.token, e.rank, e.top_ids) for i, e in theirs.items()
        }


def test_tokens_under_masks_are_those_of_the_cpu() -> None:
    samplings = (PLAIN + EDITED[::2]) * 2
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(len(samplings), VOCAB, generator=generator) * 3 for _ in range(4)]
    for items in (list(range(len(samplings))), [1, 2, 4, 6, 9]):
        mask = random_mask(items)
        cpu = [s.finish()[0] for s in launch(started("cpu", samplings), logits, mask)]
        cuda = [s.finish()[0] for s in launch(started("cuda", samplings), [x.cuda() for x in logits], mask)]
        assert cpu == cuda
        for tokens in cuda:
            for at, item in enumerate(items):
                assert mask.bits[at, tokens[item] // 32] >> tokens[item] % 32 & 1


@pytest.mark.parametrize("mask", [None, random_mask([0, 2])])
@pytest.mark.parametrize("samplings", [PLAIN, EDITED])
def test_sampling_does_not_wait_for_the_device(samplings: list[Sampling], mask: TokenMask | None) -> None:
    logits = [torch.randn(len(samplings), VOCAB, device="cuda") for _ in range(3)]
    sampler = started("cuda", samplings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = launch(sampler, logits, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(not s.finish()[2] for s in sampled)
