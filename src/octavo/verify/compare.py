"""When two models count as the same.

In float32 both compute the same but for the order of sums: greedy tokens are equal, and logits differ by no more than
`EXACT` of the largest one.

In a type of 16 bits each rounds in its own places. The yardstick is what Transformers itself loses in that type against
its float32 logits for the same text: the engine's error, root mean square over all logits, may be `WORSE` times that.
Tokens may differ only where they tie: the float32 logits of the two lie no further apart than twice the largest error
that Transformers makes in that text, so that rounding alone can have swapped them. What follows a tie is another text
and is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

EXACT = 1e-4
WORSE = 1.25

Verdict = Literal["equal", "tie", "different"]


@dataclass(frozen=True)
class Expected:
    """What Transformers says to one prompt: its greedy tokens, and the logits ``[T, vocab]`` of both together.

    ``rounded`` are its logits in the type under test, None if that is float32.
    """

    prompt: list[int]
    tokens: list[int]
    exact: torch.Tensor
    rounded: torch.Tensor | None = None

    @property
    def text(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.tokens


@dataclass(frozen=True)
class Comparison:
    """Of one prompt; for ``error`` and ``allowed`` see `compare`. ``differs_at`` counts tokens of the answer from 0."""

    prompt_tokens: int
    tokens: int
    verdict: Verdict
    differs_at: int | None
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.verdict != "different" and self.error <= self.allowed


def compare(expected: Expected, tokens: list[int], logits: torch.Tensor) -> Comparison:
    """The greedy ``tokens`` and the ``logits`` for `Expected.text` of the model under test with what is expected.

    ``error`` is in float32 the largest difference as a share of the largest logit; else the root mean square of all
    differences as a share of the root mean square of the logits about their mean.
    """
    at = next((i for i, pair in enumerate(zip(tokens, expected.tokens, strict=True)) if pair[0] != pair[1]), None)
    tie = at is not None and _ties(expected, at, tokens[at])
    verdict: Verdict = "equal" if at is None else "tie" if tie else "different"
    error, allowed = errors(expected, logits)
    return Comparison(len(expected.prompt), len(tokens), verdict, at, error, allowed)


def errors(expected: Expected, logits: torch.Tensor) -> tuple[float, float]:
    """(error of ``logits``, error that is allowed); infinite for logits of another shape or that are not finite."""
    if logits.shape != expected.exact.shape or not bool(logits.isfinite().all()):
        return float("inf"), EXACT
    difference = logits - expected.exact
    if expected.rounded is None:
        return float(difference.abs().max() / expected.exact.abs().max()), EXACT
    size = (expected.exact - expected.exact.mean(-1, keepdim=True)).norm()
    return float(difference.norm() / size), WORSE * float((expected.rounded - expected.exact).norm() / size)


def _ties(expected: Expected, at: int, token: int) -> bool:
    if expected.rounded is None:
        return False
    row = expected.exact[len(expected.prompt) + at - 1]
    slack = 2 * (expected.rounded - expected.exact).abs().max()
    return bool(row[expected.tokens[at]] - row[token] <= slack)
