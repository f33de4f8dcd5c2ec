"""Which layer is the first to differ: both models are cut off after more and more layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from octavo.verify.compare import Expected, errors

Logits = Callable[[list[int]], torch.Tensor]


def first_difference(
    theirs: tuple[nn.Module, Logits], ours: tuple[nn.Module, Logits], text: list[int], count: int, tolerance: float
) -> str:
    """The first part of a model of ``count`` layers in which two differ.

    Each is a module and what computes its logits; ``tolerance`` is a share of the largest logit. Found by halving:
    what is wrong stays wrong in later layers.
    """
    lists = [layers_of(module, count) for module, _ in (theirs, ours)]
    if None in lists:
        return "not found: the decoder layers are not in one list"

    def differs(kept: int) -> bool:
        with _cut(lists[0], kept), _cut(lists[1], kept):
            exact, found = theirs[1](text), ours[1](text)
        error, _ = errors(Expected(text, [], exact), found)
        return error > tolerance

    if differs(0):
        return "embedding, last norm or head"
    low, high = 0, count  # equal with `low` layers, different with `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(middle) else (middle, high)
    return f"layer {high - 1} (of 0 to {count - 1})"


def layers_of(model: nn.Module, count: int) -> nn.ModuleList | None:
    """The list of the ``count`` decoder layers: the outermost of that length."""
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)


@contextmanager
def _cut(layers: nn.ModuleList | None, kept: int) -> Iterator[None]:
    """``layers`` with its first ``kept`` alone."""
    if layers is None:
        raise RuntimeError("no layers to cut")
    everything = layers._modules
    layers._modules = dict(list(everything.items())[:kept])
    try:
        yield
    finally:
        layers._modules = everything
