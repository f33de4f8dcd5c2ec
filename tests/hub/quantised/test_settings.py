from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from octavo.config import QUANTISED
from octavo.errors import ConfigError, UnsupportedModel
from octavo.hub.configs import choose_dtype, read_hf_dict
from octavo.hub.quantised.settings import ALIASES, FILES, METHODS, check, check_wanted, stated
from octavo.hub.source import Source


@pytest.mark.parametrize(
    ("hf", "method"),
    [
        ({"quantization_config": {"quant_method": "GPTQ", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "compressed_tensors"}}, "compressed-tensors"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "auto-round"}}, "auto-round"),
        ({"quantization_config": {"bits": 4}}, ""),
    ],
)
def test_the_method_is_found_where_configs_of_any_age_have_it(hf: dict[str, Any], method: str) -> None:
    found = stated(hf)
    assert found is not None and found["quant_method"] == method


@pytest.mark.parametrize("hf", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": {}}])
def test_a_model_in_plain_floats_states_nothing(hf: dict[str, Any]) -> None:
    assert stated(hf) is None


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "awq"),
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "modelopt"),
    ],
)
def test_a_file_beside_the_config_states_it_for_older_tools(
    file: str, content: dict[str, Any], method: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float16"}))
    (tmp_path / file).write_text(json.dumps(content))
    hf = read_hf_dict(Source("m", "folder", tmp_path, None, ""))
    assert hf["quantization_config"]["quant_method"] == method
    check(hf)


def test_the_config_goes_before_a_file_beside_it() -> None:
    found = stated({"quantization_config": {"quant_method": "awq"}}, (next(iter(FILES)), {"bits": 4}))
    assert found == {"quant_method": "awq"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "hqq"}, "Transformers can"),
        ({"quant_method": "mine"}, "The tool that made it may"),
        ({"quant_method": ""}, "unnamed"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"format": "mxfp4-pack-quantized"}}},
            "mxfp4-pack",
        ),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ({"quant_method": "compressed-tensors", "transform_config": {"r1": {}}}, "transforms"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "packed for marlin"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "packed for marlin"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says) as caught:
        check({"quantization_config": config})
    assert caught.value.id == "HF050"


@pytest.mark.parametrize("odd", ["x", ["x"], 5, {"a": 5}])
@pytest.mark.parametrize("key", ["config_groups", "sparsity_config", "format"])
def test_settings_of_an_odd_type_are_refused_or_left_out(key: str, odd: Any) -> None:
    with contextlib.suppress(UnsupportedModel):
        check({"quantization_config": {"quant_method": "compressed-tensors", key: odd}})


def test_an_option_may_name_what_the_checkpoint_is_and_nothing_else() -> None:
    hf = {"quantization_config": {"quant_method": "awq"}}
    for wanted in (None, "awq", "awq_marlin", "int8"):
        check_wanted(wanted, hf)
    with pytest.raises(ConfigError, match="quantised by awq"):
        check_wanted("gptq", hf)
    with pytest.raises(ConfigError, match="not quantised"):
        check_wanted("fp8", {})


def test_the_option_takes_all_names_of_what_can_be_read() -> None:
    assert set(QUANTISED) == {*METHODS, *ALIASES} - {"compressed_tensors", "gpt_oss_mxfp4"}


def test_float16_of_scales_is_no_type_to_compute_in_on_a_cpu() -> None:
    hf = {"dtype": "float16", "quantization_config": {"quant_method": "awq"}}
    assert choose_dtype(hf, "auto", "cpu", fast_bfloat16=True)[0] == "bfloat16"
    assert choose_dtype(hf, "auto", "cpu")[0] == "float32"
    assert choose_dtype(hf, "auto", "cuda")[0] == "float16"
    assert choose_dtype(hf, "float16", "cpu")[0] == "float16"
