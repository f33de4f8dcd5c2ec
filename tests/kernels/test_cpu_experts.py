"""Grouped products of experts: the reference against float64, and the C++ extension for every instruction set."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels import reference
from octavo.kernels.select import ExpertOps, ops

_cpu = pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
from octavo.kernels import cpu_experts  # noqa: E402  # needs the extension

BFLOAT16 = torch.bfloat16
# tokens, experts of a token, experts, inputs, outputs
SHAPES = [(1, 2, 4, 64, 48), (5, 2, 4, 64, 40), (33, 3, 8, 96, 32), (520, 2, 3, 70, 20), (9, 2, 2, 2100, 16)]


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chosen(tokens: int, each: int, experts: int) -> torch.Tensor:
    """Some of the ids are of no expert: one past the last."""
    return torch.randint(experts + 1, (tokens, each), generator=torch.Generator().manual_seed(3))


def wanted(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Pair by pair in float64: each token's sum of its experts' products times their weights."""
    out = torch.zeros(len(x), weight.shape[1], dtype=torch.float64)
    for token, own in enumerate(ids.tolist()):
        for place, expert in enumerate(own):
            if expert < len(weight):
                product = weight[expert].double() @ x[token].double() + bias[expert].double()
                out[token] += weights[token, place].double() * product
    return out


def run(operators: ExpertOps, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ids: torch.Tensor,
        weights: torch.Tensor, by_token: bool = True) -> torch.Tensor:  # fmt: skip
    groups = operators.group(ids, len(weight))
    x = x if by_token else x[groups.rows]
    packed = operators.pack(weight, bias)
    if packed is None:
        found = operators.linear(x, weight, bias, groups, by_token=by_token)
    else:
        found = packed(x, groups, by_token=by_token)
    return operators.combine(found, weights, groups)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_token", [True, False])
def test_the_reference_is_the_sum_of_what_a_tokens_experts_say(
    shape: tuple[int, int, int, int, int], by_token: bool
) -> None:
    tokens, each, experts, size, out = shape
    x = normal(tokens, size, dtype=torch.float32, seed=0)
    weight = normal(experts, out, size, dtype=torch.float32, seed=1) * size**-0.5
    bias = normal(experts, out, dtype=torch.float32, seed=2)
    ids, weights = chosen(tokens, each, experts), torch.rand(tokens, each, generator=torch.Generator().manual_seed(4))
    found = run(ExpertOps(), x, weight, bias, ids, weights, by_token)
    torch.testing.assert_close(found.double(), wanted(x, weight, bias, ids, weights), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_token", [True, False])
def test_packed_weights_of_experts_give_the_same(shape: tuple[int, int, int, int, int], by_token: bool) -> None:
    tokens, each, experts, size, out = shape
    x = normal(tokens, size, dtype=BFLOAT16, seed=0)
    weight = (normal(experts, out, size, dtype=torch.float32, seed=1) * size**-0.5).to(BFLOAT16)
    bias = normal(experts, out, dtype=BFLOAT16, seed=2)
    ids, weights = chosen(tokens, each, experts), torch.rand(tokens, each, generator=torch.Generator().manual_seed(4))
    found = run(ops(x.device, BFLOAT16).experts, x, weight, bias, ids, weights, by_token)
    torch.testing.assert_close(found.double(), wanted(x, weight, bias, ids, weights), rtol=1e-2, atol=3e-2)


@pytest.mark.usefixtures("every_isa")
def test_a_row_alone_gets_what_it_gets_among_others_to_the_last_bit() -> None:
    tokens, each, experts, size, out = 300, 2, 5, 96, 48
    x, weight = normal(tokens, size, dtype=BFLOAT16, seed=0), normal(experts, out, size, dtype=BFLOAT16, seed=1)
    ids, weights = chosen(tokens, each, experts), torch.rand(tokens, each, generator=torch.Generator().manual_seed(4))
    packed = cpu_experts.pack_experts(weight, None)
    assert packed is not None
    whole = cpu_experts.group(ids, experts)
    among = cpu_experts.combine(packed(x, whole, by_token=True), weights, whole)
    for token in range(0, tokens, 23):
        one = slice(token, token + 1)
        alone = cpu_experts.group(ids[one], experts)
        found = cpu_experts.combine(packed(x[one], alone, by_token=True), weights[one], alone)
        assert torch.equal(found, among[one])


def test_the_extension_groups_as_the_reference_does() -> None:
    ids = chosen(40, 3, 7)
    found, expected = cpu_experts.group(ids, 7), reference.group(ids, 7)
    assert torch.equal(found.starts, expected.starts)
    assert torch.equal(found.places, expected.places)
    known = int(expected.starts[-1])
    assert known < 120  # some pairs have no expert
    assert torch.equal(found.rows[:known], expected.rows[:known])


def test_weights_that_lie_the_other_way_are_packed_too() -> None:
    x, turned = normal(3, 32, dtype=BFLOAT16, seed=0), normal(4, 32, 48, dtype=BFLOAT16, seed=1)
    ids, weights = torch.tensor([[0], [3], [0]]), torch.ones(3, 1)
    found = run(ops(x.device, BFLOAT16).experts, x, turned.mT, torch.zeros(4, 48, dtype=BFLOAT16), ids, weights)
    expected = torch.stack([x[t].float() @ turned[e].float() for t, e in enumerate((0, 3, 0))])
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_rows_that_do_not_fit_the_groups_are_refused() -> None:
    packed = cpu_experts.pack_experts(normal(4, 16, 32, dtype=BFLOAT16, seed=0), None)
    assert packed is not None
    groups = cpu_experts.group(torch.tensor([[0, 1], [2, 3]]), 4)
    with pytest.raises(ValueError, match="take"):
        packed(normal(3, 32, dtype=BFLOAT16, seed=1), groups, by_token=True)
    with pytest.raises(ValueError, match="take"):
        packed(normal(2, 32, dtype=BFLOAT16, seed=1), cpu_experts.group(torch.tensor([[0], [1]]), 5), by_token=True)
