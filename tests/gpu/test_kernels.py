"""Triton kernels against the reference, on the grid that all kernels share; on a card, or in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from octavo.kernels import reference, sampling
from octavo.kernels.metadata import HeadChange
from tests.kernels import grid

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and TRITON_INTERPRET is not 1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter divides where a card would mask
]
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.float16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]  # the interpreter lacks bfloat16
SHORT = {(0, 1), (37, 1), (0, 2), (30, 50)}  # of the grid's items, for the interpreter
CASES = [
    case if DEVICE == "cuda" else replace(case, items=tuple(item for item in case.items if item in SHORT))
    for case in grid.ATTENTION
]
# Shapes of heads and of pages are the same to both kinds of a step; in the interpreter one kind goes through them.
CAPTURED = [
    case for case in CASES if DEVICE == "cuda" or replace(case, heads=4, kv_heads=2, head_dim=64, page_size=16) == case
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_the_float64_answer(case: grid.Case, dtype: torch.dtype) -> None:
    from octavo.kernels import attn_triton

    batch = case.batch(dtype, DEVICE)
    grid.assert_close(attn_triton.attention(*batch.arguments()), batch.expected())


@pytest.mark.parametrize("dtype", DTYPES[-1:], ids=str)
@pytest.mark.parametrize("case", CAPTURED, ids=str)
def test_attention_of_a_captured_step_finds_out_which_items_have_one_query(case: grid.Case, dtype: torch.dtype) -> None:
    from octavo.kernels import attn_triton

    batch = case.batch(dtype, DEVICE)
    expected = batch.expected()
    batch.fill_up(tokens=21, items=3)
    grid.assert_close(attn_triton.attention(*batch.arguments())[: len(expected)], expected)


def test_a_step_takes_in_what_changed_and_leaves_its_tokens() -> None:
    from octavo.kernels import step_triton

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    last, table = ints(*range(100, 400)), torch.zeros(1000, dtype=torch.int32, device=DEVICE)
    changes = torch.arange(600, dtype=torch.int32, device=DEVICE)
    tokens, few = torch.zeros(600, dtype=torch.int32, device=DEVICE), ints(7, 8, 9)
    step_triton.take_in_(few, ints(-1, 299, 0), last, table, changes + 10, changes + 1)
    assert few.tolist() == [7, 399, 100]
    assert table.tolist() == [0] * 10 + list(range(1, 601)) + [0] * 390
    step_triton.take_in_(tokens, changes % 300, last, table, ints(), ints())
    assert tokens.tolist() == 2 * list(range(100, 400))
    step_triton.put_(last, ints(299, 3), ints(-5, 6))
    assert (int(last[299]), int(last[3]), int(last[4])) == (-5, 6, 104)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.head_dim in (64, 80, 128)][:8], ids=str)
def test_attention_over_a_cache_of_8_bits_equals_that_over_its_rounded_content(
    case: grid.Case, dtype: torch.dtype
) -> None:
    from octavo.kernels import attn_triton

    batch = case.batch(dtype, DEVICE)
    batch.round_to_float8()
    grid.assert_close(attn_triton.attention(*batch.arguments()), batch.expected())
    grid.assert_close(reference.attention(*batch.arguments()), batch.expected())


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 576, 2048, 4096, 8192])
def test_norms_and_activations_equal_the_reference(size: int, dtype: torch.dtype) -> None:
    from octavo.kernels import triton_ops

    x, residual, weight = normal(7, size, dtype=dtype), normal(7, size, dtype=dtype), normal(size, dtype=dtype)
    close(triton_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    for got, want in zip(
        triton_ops.add_rms_norm(x, residual, weight, 1e-5),
        reference.add_rms_norm(x, residual, weight, 1e-5),
        strict=True,
    ):
        close(got, want)
    close(triton_ops.silu_and_mul(x), reference.silu_and_mul(x))
    close(triton_ops.gelu_tanh_and_mul(x), reference.gelu_tanh_and_mul(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "rotated"), [(9, 64, 64), (3, 128, 128), (4, 80, 32), (1, 16, 16)])
def test_rotary_and_store_take_slices_of_a_wider_row(heads: int, dim: int, rotated: int, dtype: torch.dtype) -> None:
    from octavo.kernels import triton_ops

    wide = normal(5, 3 * heads * dim, dtype=dtype)
    q, k, v = (part.unflatten(-1, (heads, dim)) for part in wide.split(heads * dim, dim=-1))
    table, positions = normal(50, rotated), torch.tensor([0, 3, 49, 7, 7], dtype=torch.int32, device=DEVICE)
    close(triton_ops.rotary(q, table, positions), reference.rotary(q, table, positions))
    close(triton_ops.rms_norm(q, normal(dim, dtype=dtype), 1e-6), reference.rms_norm(q, normal(dim, dtype=dtype), 1e-6))
    slots = torch.tensor([0, 17, 31, 5, 40], dtype=torch.int32, device=DEVICE)
    k[0, 0, 0], v[1, 0, 1] = 1000.0, -1000.0
    for kept in (dtype, torch.float8_e4m3fn):
        if DEVICE == "cuda" or kept is dtype:
            v[2, 0, 3] = float("nan")
        else:  # the interpreter does not round to 8 bits as a card does
            wide.copy_(wide.to(kept).to(dtype).nan_to_num(1.0))
            k[0, 0, 0], v[1, 0, 1] = 1000.0, -1000.0
        caches = [torch.full((3, 2, heads, 16, dim), float("nan"), device=DEVICE).to(kept) for _ in range(2)]
        triton_ops.store_kv_(caches[0], k, v, slots)
        reference.store_kv_(caches[1], k, v, slots)
        torch.testing.assert_close(caches[0].float(), caches[1].float(), rtol=0, atol=0, equal_nan=True)
    assert caches[0][0, 0, 0, 0, 0].float() == 448.0
    assert caches[0][1, 1, 0, 1, 1].float() == -448.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [None, torch.float8_e4m3fn] if DEVICE == "cuda" else [None], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotated"),
    [(8, 2, 64, 64), (3, 3, 128, 128), (6, 2, 80, 32), (9, 3, 96, 96), (1, 1, 16, 16), (2, 1, 32, 0)],
)
def test_heads_are_normed_rotated_and_stored_as_by_the_reference(
    heads: int, kv_heads: int, dim: int, rotated: int, normed: bool, kept: torch.dtype | None, dtype: torch.dtype
) -> None:
    from octavo.kernels import triton_ops

    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = (x.unflatten(-1, (-1, dim)) for x in normal(5, sum(sizes), dtype=dtype).split(sizes, dim=-1))
    change = HeadChange(
        q_norm=normal(dim, dtype=dtype) if normed else None,
        k_norm=normal(dim, dtype=dtype).flip(0) if normed else None,
        eps=1e-6,
        cos_sin=normal(50, rotated) if rotated else None,
    )
    positions, slots = torch.tensor([[0, 3, 49, 7, 7], [0, 17, 31, 5, 40]], dtype=torch.int32, device=DEVICE)
    nothing = torch.full((3, 2, kv_heads, 16, dim), float("nan"), device=DEVICE).to(kept or dtype)
    caches = [nothing.clone(), nothing.clone()]
    got = triton_ops.place_heads_(q, k, v, change, positions, caches[0], slots)
    want = reference.place_heads_(q, k, v, change, positions, caches[1], slots)
    close(got, want)
    if kept is None:
        close(caches[0], caches[1])
    else:  # another rounding before the last one may move a number to the next that 8 bits can hold
        torch.testing.assert_close(caches[0].float(), caches[1].float(), rtol=0.13, atol=0.01, equal_nan=True)
    apart = triton_ops.place_heads_(q.contiguous(), k, v, change, positions, caches[0], slots)
    close(apart, want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (576, 1536), (130, 2048), (24, 14336)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_product_of_few_rows_equals_the_float64_answer(
    rows: int, shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    from octavo.kernels import linear_triton

    x, weight = normal(rows, shape[1], dtype=dtype), normal(*shape, dtype=dtype)
    added = normal(shape[0], dtype=dtype) if bias else None
    got = linear_triton.linear(x, weight, added).double()
    want = reference.linear(x.double(), weight.double(), None if added is None else added.double())
    assert (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (130, 1024), (1024, 3072), (6144, 256)])
@pytest.mark.parametrize("rows", [2, 5, 32, 33, 64])
def test_a_product_of_tens_of_rows_equals_the_float64_answer(
    rows: int, shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    from octavo.kernels import linear_triton

    if DEVICE == "cpu" and (rows not in (5, 33) or shape[0] > 130):
        pytest.skip("takes the interpreter too long")
    x, weight = normal(rows, shape[1], dtype=dtype), normal(*shape, dtype=dtype)
    added = normal(shape[0], dtype=dtype) if bias else None
    launch = linear_triton.choose(x, weight) or linear_triton.Launch(64, 128, 2, 4, 3, linear_triton.ALL)
    want = reference.linear(x.double(), weight.double(), None if added is None else added.double())
    for _ in range(3):  # each leaves the counters as the next needs them
        got = linear_triton.split_linear(x, weight, added, launch).double()
        assert (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("inner", "size"), [(96, 256), (100, 1024), (3072, 1024)])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_gated_product_equals_the_reference(rows: int, inner: int, size: int, gelu: bool, dtype: torch.dtype) -> None:
    from octavo.kernels import linear_triton

    if DEVICE == "cpu" and (inner > 100 or gelu != (size == 256)):
        pytest.skip("takes the interpreter too long")
    x, weight = normal(rows, size, dtype=dtype), 0.1 * normal(2 * inner, size, dtype=dtype)
    bias = normal(2 * inner, dtype=dtype)
    want = reference.gated_linear(x.double(), weight.double(), bias.double(), gelu)
    gate = "gelu" if gelu else "silu"
    split = linear_triton.Launch(64, 128, 2, 4, 3)
    for got in (
        linear_triton.gated_linear(x, weight, bias, gelu),
        linear_triton.split_linear(x, weight, bias, split, gate),
    ):
        assert (got.double() - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 4096, 9001])
def test_the_greedy_choice_is_the_lowest_of_equals_and_marks_what_is_not_finite(vocab: int, dtype: torch.dtype) -> None:
    from octavo.kernels import triton_ops

    logits = normal(7, vocab, dtype=dtype)
    logits[1, [1, vocab - 1]] = 30.0
    logits[2, vocab - 2] = float("nan")
    logits[3, vocab - 1] = float("inf")
    logits[4] = float("-inf")
    logits[5] = float("-inf")
    logits[5, vocab - 1] = -2.0
    got = triton_ops.greedy(logits)
    assert got.tolist() == sampling.greedy(logits).tolist()
    assert got[0, 1] == 1
    assert got[1].tolist() == [1, 1, 0, 0, 0, 1, 1]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[got.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
