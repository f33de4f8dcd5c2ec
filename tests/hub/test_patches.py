from __future__ import annotations

import math
from typing import Any

import pytest

from octavo.errors import ModelError
from octavo.hub.patches import normalise

LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "architectures": ["LlamaForCausalLM"]}


def rope_of(**hf: Any) -> Any:
    out, _ = normalise({**LLAMA, **hf})
    assert not {"rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct"} & set(out)
    assert normalise(out)[0] == out, "a second pass changes nothing"
    return out["rope_parameters"]


@pytest.mark.parametrize(
    "hf",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rotary_emb_base": 5e5},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": 5e5},
    ],
)
def test_theta_is_found_in_every_shape(hf: dict[str, Any]) -> None:
    assert rope_of(**hf) == {"rope_type": "default", "rope_theta": 5e5}


def test_theta_left_out_is_that_of_the_class() -> None:
    assert rope_of()["rope_theta"] == 10_000.0
    assert rope_of(model_type="smollm3")["rope_theta"] == 2_000_000.0
    assert rope_of(model_type="smollm3", rope_scaling={"type": "linear", "factor": 2.0})["rope_theta"] == 2_000_000.0


def test_model_without_rope_stays_without() -> None:
    assert "rope_parameters" not in normalise({"model_type": "gpt2", "n_positions": 1024})[0]


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"])
def test_rotated_share_is_found_under_every_name(key: str) -> None:
    assert rope_of(**{key: 0.5})["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("scaling", "kind"),
    [
        ({"type": "linear", "factor": 2.0}, "linear"),
        ({"rope_type": "linear", "factor": 2.0}, "linear"),
        ({"type": "linear", "rope_type": "linear", "factor": 2.0}, "linear"),
        ({"type": "su", "short_factor": [1.0], "long_factor": [2.0]}, "longrope"),
        ({"type": "su", "rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "longrope"),
        ({"type": "mrope", "mrope_section": [8, 4, 4]}, "default"),
        ({"type": "mrope", "rope_type": "default", "mrope_section": [8, 4, 4]}, "default"),
        ({"type": "dynamic", "alpha": 1000.0}, "dynamic"),
    ],
)
def test_old_names_of_types(scaling: dict[str, Any], kind: str) -> None:
    rope = rope_of(rope_scaling=scaling)
    assert rope["rope_type"] == kind
    assert "type" not in rope


def test_telechat_yarn_gets_its_attention_factor() -> None:
    rope = rope_of(rope_scaling={"type": "telechat3-yarn", "rope_type": "telechat3-yarn", "factor": 8.0})
    assert rope["rope_type"] == "yarn"
    assert rope["attention_factor"] == pytest.approx(0.07 * math.log(8) + 1)
    assert rope["original_max_position_embeddings"] == 4096


def test_early_phi3_calls_longrope_yarn() -> None:
    factors = {"short_factor": [1.0], "long_factor": [2.0]}
    rope = rope_of(model_type="phi3", rope_scaling={"type": "yarn", **factors}, original_max_position_embeddings=2048)
    assert rope["rope_type"] == "longrope"


def test_original_length_at_the_top_level_wins_in_a_flat_config() -> None:
    given = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert rope_of(rope_scaling=given)["original_max_position_embeddings"] == 4096
    assert (
        rope_of(rope_scaling=given, original_max_position_embeddings=2048)["original_max_position_embeddings"] == 2048
    )
    inner = {**given, "original_max_position_embeddings": 1024}
    assert rope_of(rope_scaling=inner)["original_max_position_embeddings"] == 1024
    assert (
        rope_of(rope_scaling=inner, original_max_position_embeddings=2048)["original_max_position_embeddings"] == 2048
    )


def test_yarn_without_a_factor_takes_the_ratio_of_lengths() -> None:
    rope = rope_of(rope_scaling={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024})
    assert rope["factor"] == 4.0


def test_nested_dicts_get_shared_values_and_none_means_no_rope() -> None:
    rope = rope_of(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": None,
            "chunked_attention": {},
            "rope_theta": 500.0,
        }
    )
    assert rope == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": None,
        "chunked_attention": {"rope_type": "default", "rope_theta": 500.0},
    }


def test_two_thetas_become_nested() -> None:
    rope = rope_of(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, ["linear", "yarn"]),
        ({"rope_type": "linear"}, ["linear", "factor"]),
        ({"rope_type": "llama3", "factor": 8.0}, ["low_freq_factor", "high_freq_factor"]),
        ({"rope_type": "longrope", "short_factor": [1.0]}, ["long_factor"]),
        ({"rope_type": "dynamic"}, ["factor", "alpha"]),
        ({"rope_type": "mrope"}, ["mrope_section"]),
        ({"rope_type": "linear", "factor": -1.0}, ["factor", "-1.0"]),
        ({"rope_type": "linear", "factor": "2"}, ["factor", "'2'"]),
        ({"rope_type": "linear", "factor": float("nan")}, ["factor", "nan"]),
        ({"rope_type": "default", "partial_rotary_factor": 1.5}, ["partial_rotary_factor", "1.5"]),
        ({"rope_type": "telechat3-yarn"}, ["factor"]),
        ({"full_attention": {"rope_type": "linear"}}, ["full_attention", "factor"]),
        ([1, 2], ["[1, 2]"]),
    ],
)
def test_contradiction_is_an_error_that_names_it(rope: Any, words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        normalise({**LLAMA, "rope_parameters": rope})
    assert error.value.id == "HF020"
    for word in words:
        assert word in error.value.cause


def test_old_layer_type_names_are_replaced() -> None:
    out, notes = normalise({"layer_types": ["mamba", "attention", "sliding_attention"]})
    assert out["layer_types"] == ["linear_attention", "full_attention", "sliding_attention"]
    assert any("layer_types" in note for note in notes)


def test_missing_architectures_come_from_the_model_type() -> None:
    out, notes = normalise({"model_type": "qwen3"})
    assert out["architectures"] == ["Qwen3ForCausalLM"]
    assert notes


def test_architectures_as_a_text_are_a_list_of_one() -> None:
    out, notes = normalise({"model_type": "qwen3", "architectures": "MyForCausalLM"})
    assert out["architectures"] == ["MyForCausalLM"]
    assert "MyForCausalLM" in notes[0]


def test_language_part_is_normalised_wherever_it_is() -> None:
    out, _ = normalise({"model_type": "x", "llm_config": {**LLAMA, "rope_theta": 7.0, "torch_dtype": "float16"}})
    assert "llm_config" not in out
    assert out["text_config"]["rope_parameters"]["rope_theta"] == 7.0
    assert out["text_config"]["dtype"] == "float16"


def test_input_is_left_as_it_was() -> None:
    hf = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}, "layer_types": ["attention"]}
    before = repr(hf)
    normalise(hf)
    assert repr(hf) == before
