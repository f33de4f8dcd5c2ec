"""Every kernel of the C++ extension against the reference operators, for every instruction set this machine can run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from octavo.kernels import reference
from tests.kernels import grid

_cpu = pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
from octavo.kernels import cpu  # noqa: E402  # needs the extension

pytestmark = pytest.mark.usefixtures("every_isa")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel should have written and did not is NaN."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        made: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(float("nan") if made.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def expected_of(case: grid.Case, dtype: torch.dtype) -> torch.Tensor:
    return case.batch(dtype).expected()


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bit or two of the type."""
    assert got.dtype == expected.dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}[got.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance / 4, rtol=tolerance)


@pytest.mark.parametrize("case", grid.ATTENTION, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_equals_naive_float64(case: grid.Case, dtype: torch.dtype) -> None:
    batch = case.batch(dtype)
    grid.assert_close(cpu.attention(*batch.arguments()), expected_of(case, dtype))


LONG = [
    grid.Case(items=((1100, 1),)),
    grid.Case(items=((512, 1), (511, 1), (1023, 1), (40, 1))),
    grid.Case(items=((1100, 1), (700, 1)), window=600, sinks=True),
    grid.Case(items=((1000, 8),), heads=9, kv_heads=3),
    grid.Case(items=((100, 200),), heads=9, kv_heads=3, window=70),
    grid.Case(items=((0, 130),), heads=64, kv_heads=1, head_dim=16),
    grid.Case(items=((1100, 1), (3, 150)), softcap=4.0, sinks=True),
]


@pytest.mark.parametrize("case", LONG, ids=lambda case: str(case.items))
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_split_over_keys_or_queries(case: grid.Case, dtype: torch.dtype) -> None:
    batch = case.batch(dtype)
    expected = reference.attention(*batch.arguments())
    torch.testing.assert_close(
        cpu.attention(*batch.arguments()), expected, atol=grid.TOLERANCE[dtype], rtol=grid.TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_sequence_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    case = grid.Case(items=((700, 1), (30, 1), (5, 40)))
    batch = case.batch(dtype)
    together = cpu.attention(*batch.arguments())
    meta = batch.meta
    for b in range(3):
        first, last = meta.query_start[b].item(), meta.query_start[b + 1].item()
        alone = type(meta)(
            torch.tensor([0, last - first], dtype=torch.int32),
            meta.seq_lens[b : b + 1],
            meta.rows[b : b + 1],
            meta.block_table,
            meta.slots[first:last],
            0,
            last - first,
            int(meta.seq_lens[b]),
        )
        got = cpu.attention(batch.query[first:last], batch.cache, alone, batch.scale)
        assert torch.equal(got, together[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_queries_keys_and_values_are_accepted(dtype: torch.dtype) -> None:
    """They come as slices of one projection."""
    batch = grid.Case().batch(dtype)
    query, *rest = batch.arguments()
    wide = torch.cat((query, torch.zeros_like(query)), dim=1)[:, : query.shape[1]]
    assert not wide.is_contiguous()
    assert torch.equal(cpu.attention(wide, *rest), cpu.attention(query, *rest))


@pytest.mark.parametrize("field", ["rows", "seq_lens", "query_start", "block_table"])
@pytest.mark.parametrize("value", [-1, 10_000])
def test_metadata_that_point_outside_are_refused(field: str, value: int) -> None:
    batch = grid.Case().batch(torch.bfloat16)
    tensor = getattr(batch.meta, field)
    tensor.view(-1)[-1 if field != "block_table" else batch.rows[0] * tensor.shape[1]] = value
    with pytest.raises(IndexError, match=r"outside|exceeds"):
        cpu.attention(*batch.arguments())


@pytest.mark.parametrize("shape", [(1, 576), (3, 64), (5, 100), (2, 3, 128), (40, 1030), (1, 7)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)]
)
def test_norms_equal_the_reference(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    weight = normal(shape[-1], dtype=weight_dtype, seed=2)
    assert_near(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    got, total = cpu.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_near(got, expected)


def test_norm_of_heads_takes_a_slice_of_the_projection() -> None:
    x = normal(5, 12, 64, dtype=torch.bfloat16)[:, 2:7]
    weight = normal(64, dtype=torch.bfloat16, seed=1)
    assert_near(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("shape", [(1, 3072), (4, 128), (3, 70), (2, 20000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_equal_the_reference(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype) * 4
    got, expected = getattr(cpu, name)(x), getattr(reference, name)(x)
    # torch's GELU loses small results to cancellation, and so has an absolute error alone.
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=2e-6 if dtype is torch.float32 else 1.6e-2)


def test_gates_of_extreme_values_are_finite_and_nan_stays_nan() -> None:
    x = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, float("nan"), 1.0] * 4 + [1.0] * 32])
    for name in ("silu_and_mul", "gelu_tanh_and_mul"):
        assert_near_nan(getattr(cpu, name)(x), getattr(reference, name)(x))


def assert_near_nan(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=2e-6, equal_nan=True)


@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (128, 128), (80, 80), (64, 32), (16, 10), (256, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_equals_the_reference(dim: int, rotated: int, dtype: torch.dtype) -> None:
    x = normal(7, 6, dim, dtype=dtype)[:, 1:5]
    angles = normal(50, rotated // 2, seed=1)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.tensor([0, 49, 3, 3, 17, 1, 2], dtype=torch.int32)
    assert_near(cpu.rotary(x, cos_sin, positions), reference.rotary(x, cos_sin, positions))
    with pytest.raises(IndexError, match="position"):
        cpu.rotary(x, cos_sin, positions + 1)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_store_equals_the_reference(dtype: torch.dtype) -> None:
    batch = grid.Case().batch(dtype)
    key, value = batch.new_tokens()
    got, expected = torch.zeros_like(batch.cache), torch.zeros_like(batch.cache)
    wide = torch.cat((key, value), dim=1)
    heads = key.shape[1]
    cpu.store_kv_(got, wide[:, :heads], wide[:, heads:], batch.meta.slots)
    reference.store_kv_(expected, key, value, batch.meta.slots)
    assert torch.equal(got, expected)
    batch.meta.slots[3] = batch.num_pages * batch.case.page_size
    with pytest.raises(IndexError, match="slot"):
        cpu.store_kv_(got, key, value, batch.meta.slots)


PRODUCTS = [(rows, *shape) for rows in (1, 2, 3, 4, 5, 6, 7, 13) for shape in ((16, 2), (100, 66), (130, 1000))]
PRODUCTS += [(1, 48, 4500), (5, 48, 4500), (64, 576, 192), (250, 100, 66), (250, 48, 2100)]


@pytest.mark.parametrize(("rows", "out", "size"), PRODUCTS)
def test_packed_product_equals_float64(rows: int, out: int, size: int) -> None:
    weight, bias = normal(out, size, dtype=torch.bfloat16), normal(out, dtype=torch.bfloat16, seed=1)
    x = normal(rows, size + 6, dtype=torch.bfloat16, seed=2)[:, :size]
    for used in (None, bias):
        packed = cpu.pack_linear(weight, used)
        assert packed is not None
        expected = x.double() @ weight.double().T + (0 if used is None else used.double())
        torch.testing.assert_close(packed(x).double(), expected, atol=2e-3 * size**0.5, rtol=8e-3)


def test_packed_weight_gives_its_rows_back() -> None:
    weight = normal(100, 66, dtype=torch.bfloat16)
    packed = cpu.pack_linear(weight)
    assert packed is not None
    ids = torch.tensor([0, 99, 15, 16, 5, 5, 64, 1, 2, 3])
    assert torch.equal(packed.rows(ids), weight[ids])
    with pytest.raises(IndexError, match="vocabulary"):
        packed.rows(torch.tensor([100]))


def test_weights_that_stay_plain_are_not_packed() -> None:
    assert cpu.pack_linear(normal(16, 16)) is None
    assert cpu.pack_linear(normal(16, 15, dtype=torch.bfloat16)) is None


def test_packed_product_refuses_another_type() -> None:
    packed = cpu.pack_linear(normal(16, 16, dtype=torch.bfloat16))
    assert packed is not None
    with pytest.raises(ValueError, match="bfloat16"):
        packed(normal(2, 16))


@pytest.mark.parametrize("cols", [1, 7, 16, 49_152, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_is_the_lowest_of_equals_or_the_first_nan(cols: int, dtype: torch.dtype) -> None:
    x = normal(6, cols + 3, dtype=dtype)[:, :cols]
    x[1] = 2.0
    x[2, cols // 2 :] = 9.0
    x[3] = float("-inf")
    x[4, cols // 3] = float("nan")
    x[4, -1] = float("nan")
    expected = [int((row.isnan() | (row == row.nan_to_num(float("-inf")).max())).int().argmax()) for row in x]
    expected[4] = cols // 3
    assert cpu.argmax(x).tolist() == expected


@pytest.mark.parametrize("cols", [1, 7, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_is_the_greatest_if_it_is_finite(cols: int, dtype: torch.dtype) -> None:
    x = normal(5, cols + 3, dtype=dtype)[:, :cols]
    x[1] = 2.0
    x[2, cols // 2] = float("nan")
    x[3] = float("-inf")
    x[4, cols // 3] = float("inf")
    finite = [1, 1, 0, 0, 0]
    found = cpu.greedy(x)
    assert found is not None and found.dtype == torch.int32
    assert found.tolist() == [[int(x[0].argmax()), 0, 0, 0, 0], finite]


def test_greedy_leaves_other_types_to_torch() -> None:
    assert cpu.greedy(torch.zeros(1, 8, dtype=torch.float16)) is None


def test_taking_in_and_putting_are_those_of_the_reference() -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    results = []
    for module in (cpu, reference):
        tokens, last, table = ints(7, 8, 9), ints(10, 20, 30, 40), torch.zeros(6, dtype=torch.int32)
        module.take_in_(tokens, ints(3, -1, 0), last, table, ints(5, 1), ints(55, 11))
        module.put_(last, ints(2, 0), ints(-3, -1))
        results.append((tokens.tolist(), last.tolist(), table.tolist()))
    assert results[0] == results[1] == ([40, 8, 10], [-1, 20, -3, 40], [0, 11, 0, 0, 0, 55])


def test_threads_share_work_whoever_calls() -> None:
    """Several threads of the interpreter at once: one has the helpers, the others work alone."""
    _cpu.set_threads(3)
    packed = cpu.pack_linear(normal(640, 64, dtype=torch.bfloat16))
    assert packed is not None
    x = normal(7, 64, dtype=torch.bfloat16, seed=1)
    expected = packed(x)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: packed(x), range(200)):
            assert torch.equal(got, expected)
