"""A fused layer is the sequence of its operators, a fused decoder that of its layers, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.kernels.select import FusedDecoder, LayerParts
from tests.kernels import grid

_cpu = pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
from octavo.kernels import cpu, cpu_layer  # noqa: E402  # need the extension

pytestmark = pytest.mark.usefixtures("every_isa")

SIZE, INNER, HEADS, KV_HEADS, DIM = 96, 160, 4, 2, 64
CASE = grid.Case(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2).bfloat16()


def product(inputs: int, outputs: int, seed: int, bias: bool = False) -> cpu.PackedLinear:
    packed = cpu.pack_linear(normal(outputs, inputs, seed=seed), normal(outputs, seed=seed + 1) if bias else None)
    assert packed is not None
    return packed


def rotary_table(rotated: int = DIM) -> torch.Tensor:
    angles = torch.arange(256).unsqueeze(1) / (torch.arange(rotated // 2) + 1.0)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def plain() -> LayerParts:
    return LayerParts(
        qkv=product(SIZE, (HEADS + 2 * KV_HEADS) * DIM, 1),
        o=product(HEADS * DIM, SIZE, 2),
        gate_up=product(SIZE, 2 * INNER, 3),
        down=product(INNER, SIZE, 4),
        input_norm=normal(SIZE, seed=5) + 1,
        post_norm=normal(SIZE, seed=6) + 1,
        q_norm=None,
        k_norm=None,
        eps=1e-5,
        activation="silu_and_mul",
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        scale=DIM**-0.5,
        window=None,
        softcap=None,
        cos_sin=rotary_table(),
    )


VARIANTS = {
    "llama": {},
    "qwen3": {"q_norm": normal(DIM, seed=7) + 1, "k_norm": normal(DIM, seed=8) + 1},
    "biases": {"qkv": product(SIZE, 8 * DIM, 1, bias=True), "down": product(INNER, SIZE, 4, bias=True)},
    "no rotary": {"cos_sin": None},
    "half rotary": {"cos_sin": rotary_table(DIM // 2)},
    "window, cap, gelu": {"window": 20, "softcap": 5.0, "activation": "gelu_tanh_and_mul"},
    "norms without rotary": {"q_norm": normal(DIM, seed=7), "k_norm": normal(DIM, seed=8), "cos_sin": None},
}


def sequence(
    p: LayerParts, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor, batch: grid.Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    assert p.qkv and p.o and p.gate_up and p.down
    normed, total = (
        (cpu.rms_norm(x, p.input_norm, p.eps), x)
        if residual is None
        else cpu.add_rms_norm(x, residual, p.input_norm, p.eps)
    )
    q, k, v = p.qkv(normed).view(len(x), -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    if p.q_norm is not None and p.k_norm is not None:
        q, k = cpu.rms_norm(q, p.q_norm, p.eps), cpu.rms_norm(k, p.k_norm, p.eps)
    if p.cos_sin is not None:
        q, k = cpu.rotary(q, p.cos_sin, positions), cpu.rotary(k, p.cos_sin, positions)
    cpu.store_kv_(batch.cache, k, v, batch.meta.slots)
    mixed = cpu.attention(q, batch.cache, batch.meta, p.scale, p.window, p.softcap)
    normed, total = cpu.add_rms_norm(p.o(mixed.flatten(1)), total, p.post_norm, p.eps)
    return p.down(getattr(cpu, p.activation)(p.gate_up(normed))), total


def positions_of(batch: grid.Batch) -> torch.Tensor:
    spans = zip(batch.lengths, batch.counts, strict=True)
    return torch.cat([torch.arange(length - count, length) for length, count in spans]).to(torch.int32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", [True, False], ids=["first layer", "later layer"])
@pytest.mark.parametrize("items", [((37, 1),), grid.DECODES + grid.PREFILLS], ids=["one token", "mixed"])
def test_fused_layer_equals_its_operators(variant: str, first: bool, items: tuple[tuple[int, int], ...]) -> None:
    parts = replace(plain(), **VARIANTS[variant])
    fused = cpu_layer.fuse_layer(parts)
    assert fused is not None
    batch, other = replace(CASE, items=items).batch(torch.bfloat16), replace(CASE, items=items).batch(torch.bfloat16)
    positions = positions_of(batch)
    x = normal(len(positions), SIZE, seed=9)
    residual = None if first else normal(len(positions), SIZE, seed=10)
    got = fused(x, residual, positions, batch.cache, batch.meta)
    expected = sequence(parts, x, residual, positions, other)
    assert not expected[0].isnan().any()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert torch.equal(batch.cache.view(torch.int16), other.cache.view(torch.int16))


def model_cache(batch: grid.Batch, layers: int) -> torch.Tensor:
    """The batch's cache for each layer."""
    return torch.stack([batch.cache] * layers)


DECODER = [plain(), replace(plain(), window=20), plain()]
NORM = normal(SIZE, seed=11) + 1


def decoder(layers: list[LayerParts]) -> FusedDecoder:
    fused = [layer for parts in layers if (layer := cpu_layer.fuse_layer(parts)) is not None]
    made = cpu_layer.fuse_decoder(fused, NORM, 1e-5)
    assert made is not None
    return made


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("items", [((37, 1),), grid.DECODES + grid.PREFILLS], ids=["one token", "mixed"])
def test_fused_decoder_equals_its_layers_and_the_norm(count: int, items: tuple[tuple[int, int], ...]) -> None:
    batch = replace(CASE, items=items).batch(torch.bfloat16)
    positions, table = positions_of(batch), DECODER[0].cos_sin
    layers = [replace(parts, cos_sin=table) for parts in DECODER]
    cache, other = model_cache(batch, 3), model_cache(batch, 3)
    x = normal(len(positions), SIZE, seed=9)
    got = decoder(layers)(x, positions, cache, batch.meta, count)
    expected, residual = x, None
    for parts, own in zip(layers[:count], other, strict=False):
        layer = cpu_layer.fuse_layer(parts)
        assert layer is not None
        expected, residual = layer(expected, residual, positions, own, batch.meta)
    assert residual is not None
    assert torch.equal(got, cpu.add_rms_norm(expected, residual, NORM, 1e-5)[0])
    assert torch.equal(cache.view(torch.int16), other.view(torch.int16))


WANTED = {"last": [-1], "none": [], "first and last": [0, -1], "all": None, "some": [1, 2, 5, -3]}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("which", WANTED)
def test_a_decoder_leaves_out_what_nobody_wants(which: str, count: int) -> None:
    batch = replace(CASE, items=grid.DECODES + grid.PREFILLS).batch(torch.bfloat16)
    positions, cache, other = positions_of(batch), model_cache(batch, 3), model_cache(batch, 3)
    places = WANTED[which]
    tokens = list(range(len(positions))) if places is None else [place % len(positions) for place in places]
    x = normal(len(positions), SIZE, seed=9)
    made = decoder(DECODER)
    whole = made(x, positions, cache, batch.meta, count)
    got = made(x, positions, other, batch.meta, count, torch.tensor(tokens, dtype=torch.int32))
    torch.testing.assert_close(got, whole[tokens], rtol=2e-2, atol=2e-2)  # one query is summed in another order
    assert torch.equal(cache.view(torch.int16), other.view(torch.int16))


def test_tokens_are_wanted_in_ascending_order_and_exist() -> None:
    batch = CASE.batch(torch.bfloat16)
    positions, cache = positions_of(batch), model_cache(batch, 3)
    x, made = normal(len(positions), SIZE, seed=9), decoder(DECODER)
    for tokens in ([1, 0], [0, 0], [-1], [len(positions)]):
        with pytest.raises(IndexError, match="wanted"):
            made(x, positions, cache, batch.meta, 3, torch.tensor(tokens, dtype=torch.int32))
    with pytest.raises(ValueError, match="int32"):
        made(x, positions, cache, batch.meta, 3, torch.tensor([0]))


def test_a_fused_decoder_refuses_what_it_was_not_made_for() -> None:
    batch = CASE.batch(torch.bfloat16)
    positions, cache = positions_of(batch), model_cache(batch, 3)
    x = normal(len(positions), SIZE, seed=9)
    made = decoder(DECODER)
    for count in (0, 4):
        with pytest.raises(ValueError, match="layers"):
            made(x, positions, cache, batch.meta, count)
    with pytest.raises(ValueError, match="layers"):
        made(x, positions, cache[:2], batch.meta, 3)
    with pytest.raises(ValueError, match="hidden state"):
        made(x.float(), positions, cache, batch.meta, 3)
    before = cache.view(torch.int16).clone()
    with pytest.raises(IndexError, match="position"):
        made(x, positions + 256, cache, batch.meta, 3)
    assert torch.equal(cache.view(torch.int16), before)


def test_a_decoder_with_another_norm_or_a_foreign_layer_is_not_fused() -> None:
    layer = cpu_layer.fuse_layer(plain())
    assert layer is not None
    assert cpu_layer.fuse_decoder([layer], NORM.float(), 1e-5) is None
    assert cpu_layer.fuse_decoder([layer, lambda *_: (NORM, NORM)], NORM, 1e-5) is None
    assert cpu_layer.fuse_decoder([], NORM, 1e-5) is None


def test_indices_that_point_outside_are_refused_before_anything_is_written() -> None:
    fused = cpu_layer.fuse_layer(plain())
    assert fused is not None
    batch = CASE.batch(torch.bfloat16)
    positions, before = positions_of(batch), batch.cache.view(torch.int16).clone()
    x = normal(len(positions), SIZE, seed=9)
    with pytest.raises(IndexError, match="position"):
        fused(x, None, positions + 256, batch.cache, batch.meta)
    batch.meta.slots[0] = -1
    with pytest.raises(IndexError, match="slot"):
        fused(x, None, positions, batch.cache, batch.meta)
    assert torch.equal(batch.cache.view(torch.int16), before)


def test_wrong_types_and_shapes_are_refused() -> None:
    fused = cpu_layer.fuse_layer(plain())
    assert fused is not None
    batch = CASE.batch(torch.bfloat16)
    positions = positions_of(batch)
    x = normal(len(positions), SIZE, seed=9)
    for wrong in (x.float(), x[:-1], x[:, :-2]):
        with pytest.raises(ValueError, match="hidden state"):
            fused(wrong, None, positions, batch.cache, batch.meta)
    with pytest.raises(ValueError, match="cache"):
        fused(x, None, positions, batch.cache.float(), batch.meta)
    with pytest.raises(ValueError, match="cache"):
        fused(x, None, positions, batch.cache[1:], batch.meta)


@pytest.mark.parametrize(
    "change",
    [{"qkv": None}, {"activation": "relu"}, {"head_dim": 40}, {"input_norm": torch.ones(SIZE)}, {"heads": 3}],
    ids=lambda change: next(iter(change)),
)
def test_layers_of_other_kinds_are_not_fused(change: dict[str, object]) -> None:
    assert cpu_layer.fuse_layer(replace(plain(), **change)) is None  # type: ignore[arg-type]
