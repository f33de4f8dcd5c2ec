"""The greedy choice among logits that ranks have in parts, as replayed steps make it."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels import sampling
from octavo.layers.embedding import equal_parts, gather_vocab, vocab_cut, vocab_part
from octavo.parallel.group import Group
from tests.parallel.ranks import Ranks


def choice(group: Group, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what `greedy` finds of this rank's part, all parts together)."""
    vocab = logits.shape[1]
    own = vocab_cut(vocab, group)
    assert own is not None
    part = equal_parts(logits[:, own.first : own.first + own.size], vocab, group)
    return sampling.greedy(part, vocab_part(vocab, group)), gather_vocab(part, vocab, group)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("vocab", [8, 387])  # of 387 four ranks have 97, 97, 97 and 96
def test_it_is_that_of_all_logits(vocab: int, size: int, ranks: Ranks) -> None:
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[1, [1, vocab - 1]] = 30.0  # equals on the first and the last rank: the lower token
    logits[2, vocab - 2] = float("nan")
    logits[3, vocab - 1] = float("inf")
    logits[4] = float("-inf")
    logits[5] = float("-inf")
    logits[5, vocab - 1] = -2.0
    logits[6, 0] = float("-inf")
    wanted = sampling.greedy(logits)
    assert wanted[0, 1] == 1
    assert wanted[1].tolist() == [1, 1, 0, 0, 0, 1, 1]
    for found, whole in ranks.call(size, choice, logits):
        assert found.tolist() == wanted.tolist()
        assert torch.equal(whole.nan_to_num(7.0), logits.nan_to_num(7.0))
