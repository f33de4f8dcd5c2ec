from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from octavo.errors import ModelError
from octavo.hub.checkpoint import SafetensorsCheckpoint
from octavo.hub.quantised.checkpoint import QuantisedCheckpoint, optional_tensors, unquantised
from octavo.hub.quantised.methods import METHODS
from octavo.hub.quantised.settings import METHODS as NAMED
from octavo.hub.quantised.settings import stated
from tests.quantised_files import LAYOUTS, Tensors, fp8, gptq, mxfp4, packed

OUT, SIZE = 48, 128


def opened(folder: Path, tensors: Tensors, config: dict[str, Any]) -> QuantisedCheckpoint:
    file = folder / "model.safetensors"
    save_file(tensors, file)
    found = unquantised(
        SafetensorsCheckpoint((file,)), {"quantization_config": stated({"quantization_config": config})}
    )
    assert isinstance(found, QuantisedCheckpoint)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_reads_as_the_weight_it_stands_for(layout: str, tmp_path: Path) -> None:
    config, make = LAYOUTS[layout]
    tensors, weight = make("layer", OUT, SIZE, 0)
    checkpoint = opened(tmp_path, {**tensors, "norm.weight": torch.ones(SIZE)}, config)
    spare = optional_tensors(checkpoint)
    assert set(checkpoint.tensors()) - spare == {"layer.weight", "norm.weight"}
    info, array = checkpoint.tensors()["layer.weight"], checkpoint.read("layer.weight")
    assert (info.dtype, info.shape, info.nbytes) == ("float32", (OUT, SIZE), 4 * OUT * SIZE)
    np.testing.assert_allclose(array.data, weight.numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_is_the_same_part_of_the_whole(layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    config, make = LAYOUTS[layout]
    tensors, _ = make("layer", OUT, SIZE, 1)
    checkpoint = opened(tmp_path_factory.mktemp("part"), tensors, config)
    whole = checkpoint.read("layer.weight").data

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, OUT - 1), st.integers(1, OUT), st.integers(0, SIZE - 1), st.integers(1, SIZE))
    def check(row: int, rows: int, column: int, columns: int) -> None:
        part = (slice(row, min(OUT, row + rows)), slice(column, min(SIZE, column + columns)))
        np.testing.assert_array_equal(checkpoint.read("layer.weight", part).data, whole[part])

    check()


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("gptq", "Q4_1"),
        ("gptq-symmetric", "Q4_0"),
        ("gptq-8", "Q8_0"),
        ("awq", "Q4_1"),
        ("compressed-w4", "Q4_0"),
        ("compressed-w4-zero", "Q4_1"),
        ("compressed-w8", "Q8_0"),
        ("compressed-int8", "Q8_0"),
        ("bitsandbytes-8", "Q8_0"),
    ],
)
def test_groups_of_integers_are_blocks_of_gguf(layout: str, kind: str, tmp_path: Path) -> None:
    config, make = LAYOUTS[layout]
    tensors, weight = make("layer", OUT, SIZE, 2)
    checkpoint = opened(tmp_path, tensors, config)
    assert checkpoint.block_types() == {"layer.weight": kind}
    blocks = checkpoint.read_raw("layer.weight", slice(16, 40))
    read = gguf.dequantize(blocks.reshape(24, -1), gguf.GGMLQuantizationType[kind])
    # Scales are in float16 in the file, and zeros times scales are rounded to it: 2**-11 of the greatest such product.
    np.testing.assert_allclose(read, weight[16:40].numpy(), rtol=1e-3, atol=float(weight.abs().max()) * 2**-10)


@pytest.mark.parametrize("layout", ["gptq-order", "fp8", "bitsandbytes-4", "compressed-nvfp4"])
def test_what_gguf_has_no_blocks_for_is_read_as_floats_only(layout: str, tmp_path: Path) -> None:
    config, make = LAYOUTS[layout]
    assert opened(tmp_path, make("layer", OUT, SIZE, 3)[0], config).block_types() == {}


@pytest.mark.parametrize(("bits", "zero"), [(4, 0), (4, 7), (8, 130)])
def test_one_zero_for_all_that_is_not_in_the_middle(bits: int, zero: int, tmp_path: Path) -> None:
    tensors, weight = gptq("layer", OUT, SIZE, 0, bits=bits, zero=zero)
    checkpoint = opened(tmp_path, tensors, {**LAYOUTS["gptq"][0], "bits": bits})
    np.testing.assert_allclose(checkpoint.read("layer.weight").data, weight.numpy(), rtol=1e-6, atol=1e-9)
    assert checkpoint.block_types().get("layer.weight") == {4: "Q4_1"}.get(bits)  # not of one with the zero in them


def test_inputs_that_do_not_fill_the_last_word(tmp_path: Path) -> None:
    tensors, weight = packed("layer", OUT, SIZE, 0, group=4)
    kept = SIZE - 4
    tensors["layer.weight_shape"] = torch.tensor([OUT, kept])
    tensors["layer.weight_scale"] = tensors["layer.weight_scale"][:, : kept // 4].contiguous()
    found = opened(tmp_path, tensors, LAYOUTS["compressed-w4"][0]).read("layer.weight").data
    np.testing.assert_allclose(found, weight[:, :kept].numpy(), rtol=1e-6, atol=1e-9)


def test_tiles_of_modelopt_have_scales_of_four_dimensions(tmp_path: Path) -> None:
    tensors, weight = fp8("layer", 200, 300, 0, tile=(128, 128), leaf="weight_scale")
    tensors["layer.weight_scale"] = tensors["layer.weight_scale"][:, None, :, None].contiguous()
    checkpoint = opened(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"})
    np.testing.assert_allclose(checkpoint.read("layer.weight").data, weight.numpy(), rtol=1e-6, atol=1e-9)


def test_scales_may_be_powers_of_two_in_a_byte(tmp_path: Path) -> None:
    tensors, _ = fp8("layer", OUT, SIZE, 0)
    tensors["layer.weight_scale_inv"] = torch.full((3, 4), 0.25).to(torch.float8_e8m0fnu)
    found = opened(tmp_path, tensors, LAYOUTS["fp8"][0]).read("layer.weight").data
    np.testing.assert_array_equal(found, 0.25 * tensors["layer.weight"].float().numpy())


def test_experts_in_one_tensor_of_8_bit_floats_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {"mlp.experts.down_proj": torch.ones(3, 16, 32).to(torch.float8_e4m3fn)}
    with pytest.raises(ModelError, match=r"mlp\.experts\.down_proj is \[3, 16, 32\] in 8-bit floats") as caught:
        opened(tmp_path, tensors, LAYOUTS["fp8"][0])
    assert caught.value.id == "HF050"


def test_experts_of_gpt_oss_are_read_in_the_order_of_the_model(tmp_path: Path) -> None:
    tensors, weight = mxfp4("experts.gate_up_proj", 3, 24, 64, 0)
    checkpoint = opened(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert set(checkpoint.tensors()) == {"experts.gate_up_proj"}
    np.testing.assert_array_equal(checkpoint.read("experts.gate_up_proj").data, weight.numpy())
    part = (slice(1, 3), slice(5, 40), slice(2, 20))
    np.testing.assert_array_equal(checkpoint.read("experts.gate_up_proj", part).data, weight.numpy()[part])


def test_only_biases_of_zeros_may_be_left_over(tmp_path: Path) -> None:
    idle, _ = gptq("idle", OUT, SIZE, 0)
    used, _ = gptq("used", OUT, SIZE, 1)
    used["used.bias"] += 1
    assert optional_tensors(opened(tmp_path, idle | used, LAYOUTS["gptq"][0])) == {"idle.bias"}


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    tensors, _ = packed("layer", OUT, SIZE, 0)
    del tensors["layer.weight_scale"]
    with pytest.raises(ModelError, match=r"lacks layer\.weight_scale") as caught:
        opened(tmp_path, tensors, LAYOUTS["compressed-w4"][0])
    assert caught.value.id == "HF043"


@pytest.mark.parametrize(
    ("layout", "name", "shape"),
    [
        ("gptq", "scales", (3, OUT)),
        ("awq", "scales", (4, OUT + 1)),
        ("compressed-w4", "weight_scale", (OUT, 5)),
        ("compressed-int8", "weight_scale", (OUT - 1, 1)),
        ("fp8", "weight_scale_inv", (2, 4)),
        ("modelopt-nvfp4", "weight_scale", (OUT, 4)),
        ("gptq", "qweight", (OUT,)),
        ("gptq", "qzeros", (4, 5)),
        ("gptq", "g_idx", (SIZE - 1,)),
        ("fp8", "weight_scale_inv", (3, 1, 4)),
        ("awq", "scales", ()),
        ("compressed-w4", "weight_packed", (2, 2, 2)),
    ],
)
def test_scales_of_an_odd_shape_are_refused(layout: str, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    config, make = LAYOUTS[layout]
    tensors, _ = make("layer", OUT, SIZE, 0)
    tensors[f"layer.{name}"] = torch.ones(shape).to(tensors[f"layer.{name}"].dtype)
    with pytest.raises(ModelError, match=f"layer.{name} is") as caught:
        opened(tmp_path, tensors, config)
    assert caught.value.id == "HF044"


def test_an_input_of_a_group_that_there_is_not_is_refused(tmp_path: Path) -> None:
    tensors, _ = gptq("layer", OUT, SIZE, 0, order=True)
    tensors["layer.g_idx"][5] = SIZE // 32
    with pytest.raises(ModelError, match=r"layer\.g_idx is .* of 0 to 3, were expected") as caught:
        opened(tmp_path, tensors, LAYOUTS["gptq-order"][0])
    assert caught.value.id == "HF044"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_do_not_fit_together_are_read_or_refused_by_name(layout: str, tmp_path: Path) -> None:
    config, make = LAYOUTS[layout]
    tensors, _ = make("layer", OUT, SIZE, 0)
    odd: list[Tensors] = [{n: t for n, t in tensors.items() if n != name} for name in tensors]
    for name, tensor in tensors.items():
        odd += [{**tensors, name: torch.zeros(shape).to(tensor.dtype)} for shape in ((), (0,), (OUT, 0), (1, 2), (9,))]
        odd += [{**tensors, name: torch.zeros(tensor.shape).to(dtype)} for dtype in (torch.float16, torch.uint8)]
    refused = []
    for number, each in enumerate(odd):
        (tmp_path / str(number)).mkdir()
        try:
            checkpoint = opened(tmp_path / str(number), each, config)
            for weight in checkpoint.tensors():
                checkpoint.read(weight)
            for weight in checkpoint.block_types():
                checkpoint.read_raw(weight)
        except ModelError as error:
            refused.append(error.id)
    assert set(refused) <= {"HF041", "HF043", "HF044", "HF050"}
    assert len(refused) >= len(tensors)


@pytest.mark.parametrize(
    ("layout", "change", "says"),
    [
        ("gptq", {"bits": 3}, "3 bits"),
        ("awq", {"version": "gemv"}, "'gemv'"),
        ("compressed-w4", {"config_groups": {"a": {"weights": {"num_bits": 3}}}}, "3 bits"),
        ("compressed-w4", {"config_groups": {}}, "groups of layers"),
        ("compressed-w4", {"config_groups": ["a"]}, "groups of layers"),
        ("compressed-w4", {"config_groups": {"a": {"weights": {"num_bits": [4]}}}}, r"\[4\] bits"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(
    layout: str, change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    config, make = LAYOUTS[layout]
    with pytest.raises(ModelError, match=says) as caught:
        opened(tmp_path, make("layer", OUT, SIZE, 0)[0], {**config, **change})
    assert caught.value.id == "HF050"


def test_every_method_that_is_named_can_be_read() -> None:
    assert set(METHODS) == set(NAMED)


@pytest.mark.parametrize(
    "state",
    [b"{", b"[1]", b'{"shape": [1, 2, 3]}', b'{"shape": 5}', b'{"shape": [48, 128], "blocksize": "x"}', b"\xff\xfe"],
)
def test_a_damaged_state_of_bitsandbytes_is_refused(state: bytes, tmp_path: Path) -> None:
    config, make = LAYOUTS["bitsandbytes-4"]
    tensors, _ = make("layer", OUT, SIZE, 0)
    tensors["layer.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(ModelError) as caught:
        opened(tmp_path, tensors, config)
    assert caught.value.id in ("HF041", "HF044")


def test_a_state_that_is_a_hole_behind_a_header_leaves_the_shape_open(tmp_path: Path) -> None:
    config, make = LAYOUTS["bitsandbytes-4"]
    tensors, _ = make("layer", OUT, SIZE, 0)
    tensors["layer.weight.quant_state.bitsandbytes__nf4"].zero_()
    assert opened(tmp_path, tensors, config).tensors()["layer.weight"].shape == (OUT * SIZE, 1)
