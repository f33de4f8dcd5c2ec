"""Which part of a tensor a rank holds, and which numbers of ranks a model can be cut for. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from octavo.config import LayerSpec
from octavo.errors import ConfigError

MOST_RANKS = 64


@dataclass(frozen=True, slots=True)
class Cut:
    """Indices ``first : first + size`` of a dimension ``dim`` that is ``whole`` long in the checkpoint."""

    dim: int
    first: int
    size: int
    whole: int

    def slices(self) -> tuple[slice, ...]:
        """For indexing the whole tensor."""
        return (slice(None),) * self.dim + (slice(self.first, self.first + self.size),)


def cut(dim: int, whole: int, rank: int, ranks: int, units: int | None = None) -> Cut:
    """The part of ``rank``: as long for all ranks, but for the last, which may have less.

    A dimension of fewer ``units`` (heads) than ranks is cut into whole units, each held by several ranks.
    """
    if units is not None and units < ranks:
        size = whole // units
        return Cut(dim, rank * units // ranks * size, size, whole)
    share = -(-whole // ranks)
    first = min(rank * share, whole)
    return Cut(dim, first, min(share, whole - first), whole)


def heads_of_rank(spec: LayerSpec, ranks: int) -> LayerSpec:
    """The heads that each of ``ranks`` has of a layer."""
    if ranks == 1:
        return spec
    return dataclasses.replace(spec, heads=spec.heads // ranks, kv_heads=max(1, spec.kv_heads // ranks))


def check(ranks: int, sizes: dict[str, int], layers: tuple[LayerSpec, ...]) -> None:
    """Raises `ConfigError` unless ``ranks`` divides ``sizes`` (by name, for the message) and the heads of ``layers``.

    K/V heads may also divide the ranks: each is then held by several.
    """
    reasons = _obstacles(ranks, sizes, layers)
    if reasons:
        fitting = [str(n) for n in range(1, MOST_RANKS + 1) if not _obstacles(n, sizes, layers)]
        raise ConfigError(
            f"tensor_parallel_size is {ranks}, which {'; '.join(reasons)}.", f"Give one of {', '.join(fitting)}."
        )


def _obstacles(ranks: int, sizes: dict[str, int], layers: tuple[LayerSpec, ...]) -> list[str]:
    heads = {("the attention heads", layer.heads) for layer in layers}
    found = [f"does not divide {name} ({value})" for name, value in sorted({*sizes.items(), *heads}) if value % ranks]
    kv_heads = sorted({layer.kv_heads for layer in layers if layer.kv_heads % ranks and ranks % layer.kv_heads})
    return found + [f"neither divides the K/V heads ({count}) nor is a multiple of them" for count in kv_heads]
