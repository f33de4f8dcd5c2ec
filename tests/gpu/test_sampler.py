"""Sampling on CUDA: the tokens of the CPU, without a wait for the device."""

from __future__ import annotations

import pytest
import torch

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


def launch(sampler: Sampler, logits: list[torch.Tensor]) -> list[Sampled]:
    """All steps before any is finished."""
    return [
        sampler.sample(x, [SampleItem(row, len(PROMPT) + step) for row in range(len(x))])
        for step, x in enumerate(logits)
    ]


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


@pytest.mark.parametrize("samplings", [PLAIN, EDITED])
def test_sampling_does_not_wait_for_the_device(samplings: list[Sampling]) -> None:
    logits = [torch.randn(len(samplings), VOCAB, device="cuda") for _ in range(3)]
    sampler = started("cuda", samplings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = launch(sampler, logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(not s.finish()[2] for s in sampled)
