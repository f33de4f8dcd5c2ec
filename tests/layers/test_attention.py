from __future__ import annotations

import pytest
import torch

from octavo.config import LayerSpec
from octavo.layers import context
from octavo.layers.attention import Attention
from tests.kernels import grid


def run(case: grid.Case, layer: int, scale: float | None = None) -> tuple[torch.Tensor, grid.Batch]:
    """Attention as layer ``layer`` of three, where the step's keys and values are not in the cache yet."""
    batch = case.batch()
    spec = LayerSpec(
        heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim, window=case.window, softcap=case.softcap
    )
    cache = torch.full((3, *batch.cache.shape), float("nan"))
    cache[layer] = batch.cache
    size = case.page_size
    for slot in batch.meta.slots.tolist():
        cache[layer, slot // size, :, :, slot % size] = float("nan")
    if scale is not None:
        batch.scale = scale
    with context.use(context.ForwardContext(batch.meta, cache)):
        return Attention(spec, layer, scale)(batch.query, *batch.new_tokens(), batch.meta.slots), batch


@pytest.mark.parametrize("case", [grid.Case(), grid.Case(window=9), grid.Case(softcap=5.0)], ids=str)
@pytest.mark.parametrize("layer", [0, 2])
def test_new_keys_and_values_are_stored_in_the_layers_own_cache_and_attended_to(case: grid.Case, layer: int) -> None:
    got, batch = run(case, layer)
    grid.assert_close(got, batch.expected())


def test_a_given_scale_replaces_the_usual_one() -> None:
    got, batch = run(grid.Case(), 1, scale=0.3)
    grid.assert_close(got, batch.expected())


def test_attention_outside_of_a_forward_says_so() -> None:
    attention = Attention(LayerSpec(heads=2, kv_heads=1, head_dim=8), 0)
    x = torch.zeros(1, 2, 8)
    with pytest.raises(RuntimeError, match=r"context\.use"):
        attention(x, x[:, :1], x[:, :1], torch.zeros(1, dtype=torch.int32))
