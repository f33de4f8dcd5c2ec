"""The reference operators, which all others are held against, themselves held against naive arithmetic in float64."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels import reference
from tests.kernels import grid


@pytest.mark.parametrize("case", grid.ATTENTION, ids=str)
def test_attention_equals_naive_float64(case: grid.Case) -> None:
    batch = case.batch()
    grid.assert_close(reference.attention(*batch.arguments()), batch.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [grid.Case(), grid.Case(window=9, softcap=5.0, sinks=True)], ids=str)
def test_attention_in_sixteen_bits_stays_near(case: grid.Case, dtype: torch.dtype) -> None:
    batch = case.batch(dtype)
    got = reference.attention(*batch.arguments())
    assert got.dtype == dtype
    grid.assert_close(got, batch.expected())


def test_store_fills_exactly_the_slots_of_the_new_tokens() -> None:
    batch = grid.Case().batch()
    cache = torch.full_like(batch.cache, float("nan"))
    reference.store_kv_(cache, *batch.new_tokens(), batch.meta.slots)
    size = batch.case.page_size
    by_slot = cache.permute(0, 3, 1, 2, 4).flatten(0, 1)  # [slots, 2, KH, D]
    written = ~by_slot.isnan().flatten(1).any(1)
    assert sorted(written.nonzero().flatten().tolist()) == sorted(batch.meta.slots.tolist())
    expected = batch.cache.permute(0, 3, 1, 2, 4).flatten(0, 1)
    assert torch.equal(by_slot[written], expected[written])
    assert size * batch.num_pages == by_slot.shape[0]


def test_strided_queries_keys_and_values_are_accepted() -> None:
    """They come as slices of one projection."""
    batch = grid.Case().batch()
    query, *rest = batch.arguments()
    wide = torch.cat((query, torch.zeros_like(query)), dim=1)[:, : query.shape[1]]
    assert not wide.is_contiguous()
    assert torch.equal(reference.attention(wide, *rest), reference.attention(query, *rest))


def test_rms_norm_equals_float64() -> None:
    x, weight = torch.randn(5, 3, 64), torch.randn(64)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5).double(), expected, atol=1e-5, rtol=1e-5)


def test_add_rms_norm_is_the_sum_and_its_norm() -> None:
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, reference.rms_norm(total, weight, 1e-5))


def test_gated_activations_take_the_gate_first() -> None:
    x = torch.randn(4, 32)
    gate, up = x[:, :16].double(), x[:, 16:].double()
    silu = gate / (1 + torch.exp(-gate)) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    gelu = 0.5 * gate * (1 + torch.tanh(inner)) * up
    torch.testing.assert_close(reference.silu_and_mul(x).double(), silu, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(reference.gelu_tanh_and_mul(x).double(), gelu, atol=1e-6, rtol=1e-5)


def test_rotary_turns_each_pair_by_its_angle() -> None:
    angles = torch.rand(10, 4) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    x, positions = torch.randn(3, 2, 12), torch.tensor([9, 0, 4], dtype=torch.int32)
    got = reference.rotary(x, table, positions)
    pairs = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones(3, 4), angles[positions]).unsqueeze(1)
    torch.testing.assert_close(got[..., :4], pairs.real)
    torch.testing.assert_close(got[..., 4:8], pairs.imag)
    assert torch.equal(got[..., 8:], x[..., 8:])
