"""Products by tiles of AMX: in an emulation of its instructions, and by the processor where it has them."""

from __future__ import annotations

import pytest
import torch

_cpu = pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
from octavo.kernels import cpu, cpu_choice  # noqa: E402  # needs the extension

pytestmark = pytest.mark.usefixtures("amx_isa")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> cpu.PackedLinear:
    made = cpu.pack_linear(weight, bias)
    assert made is not None
    return made


def assert_near(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(got.double(), expected, atol=2e-3 * x.shape[1] ** 0.5, rtol=8e-3)


@pytest.mark.parametrize("rows", range(1, 41))
def test_any_number_of_rows(rows: int) -> None:
    """Panels whole and in part, in odd and even numbers; inputs of a whole step, of several and of a part of one."""
    for out, size in ((16, 32), (49, 30), (100, 66)):
        weight, bias, x = normal(out, size), normal(out, seed=1), normal(rows, size + 6, seed=2)[:, :size]
        assert_near(packed(weight, bias)(x), x, weight, bias)


@pytest.mark.parametrize("rows", [1, 6, 20, 241, 257])
@pytest.mark.parametrize("size", [2, 512, 544, 1030])
def test_blocks_of_rows_and_of_inputs(rows: int, size: int) -> None:
    weight, x = normal(72, size), normal(rows, size, seed=2)
    assert_near(packed(weight)(x), x, weight)


def test_a_row_gets_the_same_sum_whatever_else_there_is() -> None:
    weight, x = packed(normal(70, 1100)), normal(250, 1100, seed=2)
    together = weight(x)
    for first, count in ((0, 1), (17, 2), (33, 5), (200, 16), (219, 31), (10, 240)):
        assert torch.equal(weight(x[first : first + count]), together[first : first + count])


def test_nothing_beside_the_rows_is_read_or_written() -> None:
    rows, size, out = 19, 70, 40
    wide = torch.full((rows + 2, size + 10), float("nan"), dtype=torch.bfloat16)
    x = wide[1:-1, :size]
    x.copy_(normal(rows, size))
    weight, into = normal(out, size, seed=1), torch.full((rows + 2, out), 7.0, dtype=torch.bfloat16)
    product = packed(weight)
    product.native.product(True, x.data_ptr(), into[1].data_ptr(), rows, x.stride(0))
    assert_near(into[1:-1], x, weight)
    assert (into[[0, -1]] == 7).all()


def test_a_row_of_nan_stays_alone() -> None:
    x = normal(20, 64)
    x[3, 5] = float("nan")
    got = packed(normal(48, 64, seed=1))(x)
    assert got[3].isnan().all()
    assert not got[torch.arange(20) != 3].isnan().any()


def test_the_emulation_adds_as_the_manual_says(amx_isa: str) -> None:
    """Even inputs apart from odd ones; denormals are zeros."""
    if amx_isa not in _cpu.emulated():
        pytest.skip("what a processor does beyond the manual is its own")
    x, weight = torch.zeros(1, 32, dtype=torch.bfloat16), torch.ones(16, 32, dtype=torch.bfloat16)
    x[0, :3] = torch.tensor([2.0**24, 1, -(2.0**24)])
    assert (packed(weight)(x) == 1).all()  # one after the other, 2^24 would swallow the 1
    x.zero_()[0, 0] = 2.0**-127
    assert (packed(weight * 2.0**20)(x) == 0).all()
    x[0, 0], weight[:, 0] = 2.0**-64, 2.0**-64
    assert (packed(weight)(x) == 0).all()


def test_tiles_are_used_if_they_multiply_as_the_next_best_does(amx_isa: str) -> None:
    assert cpu_choice.choose([amx_isa, "baseline"]) == ""
    assert _cpu.active() == amx_isa


def test_tiles_that_multiply_wrongly_are_not_used(amx_isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    product = cpu_choice.product
    monkeypatch.setattr(cpu_choice, "product", lambda name: product(name) + (name == amx_isa))
    assert amx_isa in cpu_choice.choose([amx_isa, "baseline"])
    assert _cpu.active() == "baseline"
