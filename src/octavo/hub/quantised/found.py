"""What a method of quantisation finds in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from octavo.hub.checkpoint import Checkpoint
from octavo.hub.quantised.weights import Weight

Settings = Mapping[str, Any]


@dataclass
class Found:
    """Weights by the name that the model has for them, and the tensors that they are made of or that are not needed."""

    weights: dict[str, Weight] = field(default_factory=dict)
    spent: set[str] = field(default_factory=set)


Method = Callable[[Checkpoint, Settings], Found]


def stems(checkpoint: Checkpoint, leaf: str) -> list[str]:
    return [name.removesuffix(leaf) for name in checkpoint.tensors() if name.endswith(leaf)]


def are_sizes(value: object, count: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == count and all(type(n) is int and n > 0 for n in value)
