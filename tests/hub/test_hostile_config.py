"""Any JSON in any place of a config gives a model or a `ModelError`, never another exception."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.errors import ModelError
from octavo.hub import configs
from octavo.hub.generation import sampling_defaults
from tools import tiny

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([10**9, 2**40, -(2**70)]),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["linear", "yarn", "longrope", "llama3", "su", "mrope", "default", "llama", "mistral", "phi3"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["full_attention", "rope_type", "factor", "type", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)
VALID = [tiny.config(family) for family in tiny.FAMILIES] + [tiny.config("llama", rope=rope) for rope in tiny.ROPES]
TOP_KEYS = sorted(
    {key for hf in VALID for key in hf}
    | {"rope_scaling", "rope_theta", "rope_local_base_freq", "layer_types", "text_config", "llm_config", "dtype"}
    | {"torch_dtype", "model_max_length", "use_sliding_window", "attn_logit_softcapping", "hidden_act"}
    | {"original_max_position_embeddings", "partial_rotary_factor", "no_rope_layer_interval", "max_window_layers"}
)
ROPE_KEYS = sorted({key for hf in VALID for key in hf["rope_parameters"]} | {"type", "alpha", "partial_rotary_factor"})
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(error: ModelError) -> None:
    assert error.id.startswith("HF0")
    assert error.remedy


def survives(hf: dict[str, Any], overrides: dict[str, Any], generation: dict[str, Any]) -> None:
    try:
        config = configs.model_config(configs.override(hf, overrides), generation=generation)
        length, reason = configs.max_model_len(config, None)
    except ModelError as error:
        check(error)
        return
    assert length >= 1
    assert reason
    assert len(config.layers) >= 1


@FUZZ
@given(st.sampled_from(VALID), st.dictionaries(st.sampled_from(TOP_KEYS), JSON, max_size=3))
def test_any_value_at_the_top_level_gives_a_config_or_an_error(hf: dict[str, Any], changes: dict[str, Any]) -> None:
    survives({**hf, **changes}, {}, {})


@FUZZ
@given(st.sampled_from(VALID), st.dictionaries(st.sampled_from(ROPE_KEYS), JSON, min_size=1, max_size=3))
def test_any_value_in_the_rope_dict_gives_a_config_or_an_error(hf: dict[str, Any], changes: dict[str, Any]) -> None:
    survives({**hf, "rope_parameters": {**hf["rope_parameters"], **changes}}, {}, {})


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e306}}, "factor 1e.306 makes a length outside"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1e-9}}, "factor 1e-09 makes a length outside"),
        ({"rope_scaling": {"type": "longrope", "short_factor": ["a"] * 8, "long_factor": [1] * 8}}, "short_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [0] * 8}}, "long_factor"),
        ({"attn_logit_softcapping": "x", "auto_map": {}}, "attn_logit_softcapping is 'x'"),
        ({"attn_logit_softcapping": -1, "auto_map": {}}, "attn_logit_softcapping is -1"),
        ({"model_type": "roberta", "pad_token_id": "x"}, "pad_token_id is 'x'"),
        ({"rms_norm_eps": -1}, "norm_eps is -1"),
    ],
)
def test_numbers_that_nothing_can_compute_with_are_named(odd: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        configs.model_config(configs.override({**tiny.config("llama"), "rope_parameters": None, **odd}, {}))
    check(caught.value)


@FUZZ
@given(st.sampled_from(VALID), st.dictionaries(st.sampled_from(TOP_KEYS), JSON, max_size=3))
def test_any_override_gives_a_config_or_an_error(hf: dict[str, Any], overrides: dict[str, Any]) -> None:
    survives(hf, overrides, {})


@FUZZ
@given(st.dictionaries(st.sampled_from(["eos_token_id", "temperature", "top_k", "do_sample", "max_new_tokens"]), JSON))
def test_any_generation_config_gives_defaults_or_an_error(generation: dict[str, Any]) -> None:
    survives(VALID[0], {}, generation)
    try:
        sampling_defaults(generation)
    except ModelError as error:
        check(error)
