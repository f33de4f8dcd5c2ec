from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo.errors import UnsupportedModel
from octavo.models.hf.trace import NotPaged, window_of

Rule = Callable[..., torch.Tensor]


def causal(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k <= q


def window(size: int) -> Rule:
    return lambda b, h, q, k: (k <= q) & (k > q - size)


def chunks(size: int) -> Rule:
    return lambda b, h, q, k: (k <= q) & (k // size == q // size)


def images(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (k <= q) | torch.zeros(6, dtype=torch.bool)[k]


@pytest.mark.parametrize(
    ("rule", "local_size", "max_len", "expected"),
    [
        (causal, None, 4096, None),
        (causal, 128, 4096, None),  # a window that the mask does not apply
        (window(128), 128, 4096, 128),
        (window(1), 1, 4096, 1),
        (window(128), 128, 64, None),
        (window(7), None, 4096, 7),
        (chunks(32), 32, 32, None),
    ],
)
def test_windows_are_told_from_their_rules(rule: Rule, local_size: int | None, max_len: int, expected: Any) -> None:
    assert window_of(rule, local_size, max_len) == expected


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (chunks(32), "in chunks"),
        (images, "more than the order"),
    ],
)
def test_other_rules_cannot_run_over_pages(rule: Rule, reason: str) -> None:
    with pytest.raises(NotPaged, match=reason):
        window_of(rule, 32, 4096)


@pytest.mark.parametrize("rule", [lambda b, h, q, k: k <= q + 1, lambda b, h, q, k: k >= 0])
def test_a_rule_that_is_not_causal_is_refused(rule: Rule) -> None:
    with pytest.raises(UnsupportedModel) as error:
        window_of(rule, 32, 4096)
    assert error.value.id == "HF031"
    assert "attend to later ones" in error.value.cause
