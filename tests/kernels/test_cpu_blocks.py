"""Products with weights in GGUF's blocks against float64 on the values that `hub.gguf_quants` reads from them."""

from __future__ import annotations

from functools import cache

import gguf
import numpy as np
import pytest
import torch

from octavo.hub.gguf_quants import FORMATS, dequantise

_cpu = pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
from octavo.kernels import cpu  # noqa: E402  # needs the extension

pytestmark = pytest.mark.usefixtures("every_isa")

DTYPES = [torch.bfloat16, torch.float32]
FORMAT = {f.name: f for f in FORMATS.values()}
KINDS = list(cpu.BLOCK_TYPES)

# Values of the K types are off by the rounding of their scales to float16; in bfloat16 that is not seen.
HALF = 2.0**-11


@cache
def blocks_of(kind: str, out: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks, uint8 [out, bytes of a row], and their values in float64. Every bit is random but the scales."""
    rng = np.random.default_rng([seed, out, size])
    values, nbytes = cpu.BLOCK_TYPES[kind]
    raw = rng.integers(0, 256, (out, size // values, nbytes), np.uint8)
    halves = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q6_K": (208,)}.get(kind, (0, 2))
    for at in halves:
        scale = (rng.standard_normal(raw.shape[:2]) * 0.01).astype("<f2")
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    return torch.from_numpy(raw.reshape(out, -1)), torch.from_numpy(dequantise(raw, FORMAT[kind]).astype(np.float64))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_block_sizes_are_those_of_the_format(kind: str) -> None:
    assert cpu.BLOCK_TYPES[kind] == (FORMAT[kind].values, FORMAT[kind].nbytes)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_blocks_are_the_values_in_the_file(kind: str) -> None:
    blocks, values = blocks_of(kind, 50, 512)
    ids = torch.tensor([0, 49, 16, 15, 7, 7, 31])
    for dtype in DTYPES:
        got = cpu.pack_blocks([(kind, blocks)], None, dtype).rows(ids)
        assert got.dtype is dtype
        if dtype is torch.float32 and not kind.endswith("_K"):
            assert torch.equal(got.double(), values[ids])
        elif dtype is torch.float32:  # a value is the difference of two products of rounded scales
            assert relative(got, values[ids]) < HALF
        elif not kind.endswith("_K"):
            assert torch.equal(got, values[ids].bfloat16())


SHAPES = [(rows, out, size) for rows in (1, 2, 3, 7) for out, size in ((16, 256), (100, 512))]
SHAPES += [(13, 40, 2560), (245, 48, 256), (1, 192, 1536)]


@pytest.mark.parametrize(("rows", "out", "size"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_product_equals_float64(kind: str, rows: int, out: int, size: int) -> None:
    blocks, _ = blocks_of(kind, out, size)
    values = cpu.pack_blocks([(kind, blocks)], None, torch.float32).rows(torch.arange(out)).double()
    generator = torch.Generator().manual_seed(rows)
    x, bias = torch.randn(rows, size + 32, generator=generator)[:, :size], torch.randn(out, generator=generator)
    for dtype in DTYPES:
        given, added = x.to(dtype), bias.to(dtype)
        for used in (None, added):
            got = cpu.pack_blocks([(kind, blocks)], used, dtype)(given)
            expected = given.double() @ values.T + (0 if used is None else used.double())
            assert got.dtype is dtype
            assert relative(got, expected) < (5e-3 if dtype is torch.bfloat16 else 5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_activations_costs_less_than_bfloat16_does(kind: str) -> None:
    blocks, _ = blocks_of(kind, 64, 1536)
    x = torch.randn(8, 1536, generator=torch.Generator().manual_seed(1))
    packed = cpu.pack_blocks([(kind, blocks)], None, torch.float32)
    expected = x.double() @ packed.rows(torch.arange(64)).double().T
    rounded = x.bfloat16().double() @ packed.rows(torch.arange(64)).double().T
    assert relative(packed(x), expected) < relative(rounded, expected) / 20


def test_parts_of_different_types_are_one_weight() -> None:
    kinds = [("Q4_K", 64), ("Q6_K", 24), ("Q8_0", 40)]
    made = [(kind, *blocks_of(kind, out, 512, seed)) for seed, (kind, out) in enumerate(kinds)]
    bias = torch.randn(128, generator=torch.Generator().manual_seed(3))
    packed = cpu.pack_blocks([(kind, blocks) for kind, blocks, _ in made], bias, torch.float32)
    for rows in (1, 9):
        x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows))
        expected = torch.cat([x.double() @ values.T for _, _, values in made], dim=1) + bias.double()
        assert relative(packed(x), expected) < HALF
    ids = torch.tensor([0, 63, 64, 87, 88, 127])
    assert relative(packed.rows(ids), torch.cat([values for _, _, values in made])[ids]) < HALF
    with pytest.raises(IndexError, match="vocabulary"):
        packed.rows(torch.tensor([128]))


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "Q8_0"])
def test_a_row_does_not_depend_on_how_many_there_are(kind: str) -> None:
    blocks, _ = blocks_of(kind, 100, 2304)
    packed = cpu.pack_blocks([(kind, blocks)], None, torch.float32)
    x = torch.randn(20, 2304, generator=torch.Generator().manual_seed(4))
    together = packed(x)
    for count in (1, 2, 3):
        assert torch.equal(packed(x[5 : 5 + count]), together[5 : 5 + count])


def test_zeros_and_large_values_stay_what_they_are() -> None:
    blocks, values = blocks_of("Q4_1", 16, 64)
    packed = cpu.pack_blocks([("Q4_1", blocks)], None, torch.float32)
    assert not packed(torch.zeros(1, 64)).any()
    x = torch.zeros(1, 64)
    x[0, 3], x[0, 40] = -1e30, 1e-30
    assert relative(packed(x), x.double() @ values.T) < 1e-6
    assert packed(torch.full((1, 64), 1e-40)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights_are_q8_0_of_gguf(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(5)).to(dtype)
    packed = cpu.pack_int8(weight)
    assert packed is not None
    raw = gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    theirs = cpu.pack_blocks([("Q8_0", torch.from_numpy(raw))], None, dtype)
    ids = torch.arange(40)
    # Where a value is half way between two steps, the scale's rounding to float16 decides.
    torch.testing.assert_close(packed.rows(ids), theirs.rows(ids), atol=0.05, rtol=0)
    assert relative(packed.rows(ids), weight.double()) < 7e-3


def test_what_int8_does_not_take_stays_as_it_is() -> None:
    assert cpu.pack_int8(torch.zeros(16, 48)) is None
    assert cpu.pack_int8(torch.zeros(16, 32, dtype=torch.float16)) is None


def test_blocks_that_do_not_fit_are_refused() -> None:
    blocks, _ = blocks_of("Q4_1", 16, 64)
    other, _ = blocks_of("Q4_1", 16, 96)
    with pytest.raises(ValueError, match=r"\[64, 96\]"):
        cpu.pack_blocks([("Q4_1", blocks), ("Q4_1", other)], None, torch.bfloat16)
    with pytest.raises(ValueError, match="bytes"):
        cpu.pack_blocks([("Q4_1", blocks[:, 1:])], None, torch.bfloat16)
    with pytest.raises(ValueError, match="parts"):
        cpu.pack_blocks([], None, torch.bfloat16)
