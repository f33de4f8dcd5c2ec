"""Products with weights in GGUF's blocks by Triton against float64 on the values that `hub.gguf_quants` reads."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from octavo.hub.gguf_quants import FORMATS, dequantise

pytest.importorskip("triton")
from octavo.kernels import blocks_triton as kernels  # needs Triton
from octavo.kernels.linear_triton import MOST_ROWS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and TRITON_INTERPRET is not 1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16  # the interpreter lacks bfloat16
EPS = torch.finfo(HALF).eps
FORMAT = {f.name: f for f in FORMATS.values()}


def blocks_of(kind: str, out: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks, uint8 [out, bytes of a row], and their values in float64. Every bit is random but the scales."""
    rng = np.random.default_rng([seed, out, size])
    raw = rng.integers(0, 256, (out, size // FORMAT[kind].values, FORMAT[kind].nbytes), np.uint8)
    for at in {"Q4_0": (0,), "Q8_0": (0,), "Q6_K": (208,)}.get(kind, (0, 2)):
        scale = (rng.standard_normal(raw.shape[:2]) * 0.01).astype("<f2")
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    values = torch.from_numpy(dequantise(raw, FORMAT[kind]).astype(np.float64))
    return torch.from_numpy(raw.reshape(out, -1)).to(DEVICE), values.to(DEVICE)


def test_sizes_of_blocks_are_those_of_the_format() -> None:
    assert {kind: FORMAT[kind].nbytes for kind in kernels.TYPES} == kernels.SIZES


@pytest.mark.parametrize("kind", kernels.TYPES)
def test_widened_blocks_are_the_values_in_the_file(kind: str) -> None:
    blocks, values = blocks_of(kind, 50, 512)
    weight = kernels.pack_blocks([(kind, blocks)], None, HALF)
    ids = torch.tensor([3, 49, 0, 3], device=DEVICE)
    # Scales of the K types are rounded to float16; a value is a difference of products of them.
    bound = (EPS + 2**-11) * values.abs() + 2**-10 * values.abs().amax(1, keepdim=True)
    bound = EPS * values.abs() if kind in ("Q4_0", "Q8_0") else bound
    for got, expected, most in (
        (kernels.widen(weight.parts[0], HALF), values, bound),
        (weight.rows(ids), values[ids], bound[ids]),
    ):
        assert got.dtype is HALF
        assert ((got.double() - expected).abs() <= most).all()


@pytest.mark.parametrize("kind", kernels.TYPES)
@pytest.mark.parametrize(
    ("rows", "out", "size"), [(1, 130, 512), (5, 64, 768), (64, 96, 2304), (MOST_ROWS + 1, 64, 256)]
)
def test_products_are_those_of_the_values_in_the_file(kind: str, rows: int, out: int, size: int) -> None:
    if DEVICE == "cpu" and rows == 64:
        size = 2048 + 256  # the least that is divided
    blocks, values = blocks_of(kind, out, size)
    weight = kernels.pack_blocks([(kind, blocks)], None, HALF)
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(0)).to(DEVICE, HALF)
    got, expected = weight(x).double(), x.double() @ values.T
    assert float((got - expected).norm() / expected.norm()) < 2 * EPS


def test_parts_of_several_types_lie_one_below_the_other() -> None:
    made = [(kind, *blocks_of(kind, out, 512)) for kind, out in (("Q4_K", 40), ("Q6_K", 70), ("Q8_0", 20))]
    bias = torch.randn(130, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight = kernels.pack_blocks([(kind, blocks) for kind, blocks, _ in made], bias, HALF)
    values = torch.cat([own for _, _, own in made])
    for rows in (3, MOST_ROWS + 1):
        x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(2)).to(DEVICE, HALF)
        expected = x.double() @ values.T + bias.to(HALF).double()
        assert float((weight(x).double() - expected).norm() / expected.norm()) < 2 * EPS


def test_rounding_is_within_half_a_step_of_the_greatest_of_a_group() -> None:
    values = torch.randn(48, 512, generator=torch.Generator().manual_seed(4)).to(DEVICE, HALF)
    values[3] = 0
    weight = kernels.pack_int8(values)
    assert weight is not None and weight.nbytes == 48 * 512 * 9 // 8
    step = values.float().view(48, -1, 16).abs().amax(-1, keepdim=True) / 127
    error = (kernels.widen(weight.parts[0], torch.float32) - values.float()).view(48, -1, 16).abs()
    assert (error <= 0.55 * step + 1e-7).all()
    assert kernels.pack_int8(values[:, :100]) is None


def test_a_row_does_not_depend_on_the_others() -> None:
    blocks, _ = blocks_of("Q4_1", 64, 2304)
    weight = kernels.pack_blocks([("Q4_1", blocks)], None, HALF)
    x = torch.randn(9, 2304, generator=torch.Generator().manual_seed(3)).to(DEVICE, HALF)
    assert torch.equal(weight(x)[4:7], weight(x[4:7]))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a card")
def test_products_can_be_captured_and_leave_their_counters_at_zero() -> None:
    blocks, _ = blocks_of("Q4_1", 512, 8192)
    weight = kernels.pack_blocks([("Q4_1", blocks)], None, HALF)
    x = torch.randn(4, 8192, device=DEVICE).to(HALF)
    expected = weight(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weight(x)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
