from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from octavo.config import ModelConfig
from octavo.errors import ModelError, UnsupportedModel
from octavo.hub.configs import model_config
from octavo.hub.patches import normalise
from octavo.layers.activation import GatedActivation
from octavo.models import registry
from octavo.models.base import Model
from tools import tiny


def config(architecture: str = "LlamaForCausalLM", **overrides: object) -> ModelConfig:
    hf, _ = normalise(tiny.config("llama", **overrides))
    return model_config({**hf, "architectures": [architecture]})


@pytest.mark.parametrize("architecture", registry.NATIVE)
@pytest.mark.parametrize("impl", ["auto", "native", "vllm"])
def test_native_architectures_have_a_class_that_builds(architecture: str, impl: str) -> None:
    model_class, reason = registry.choose(config(architecture), impl)
    assert issubclass(model_class, Model)
    assert architecture in reason
    assert all(parameter.is_meta for parameter in model_class(config(architecture), 64).parameters())


@pytest.mark.parametrize("impl", ["auto", "native", "vllm"])
def test_an_unknown_architecture_is_answered_with_the_three_nearest(impl: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        registry.choose(config("Qwen9ForCausalLM"), impl)
    assert error.value.id == "HF030"
    assert "Qwen9ForCausalLM" in error.value.cause
    assert "Qwen2ForCausalLM" in error.value.remedy
    assert error.value.remedy.count("ForCausalLM") == 3


@pytest.mark.parametrize(
    ("architecture", "impl"), [("LlamaForCausalLM", "transformers"), ("GPTNeoXForCausalLM", "auto")]
)
def test_the_transformers_backend_runs_what_it_is_asked_for_and_what_has_no_native_model(
    architecture: str, impl: str
) -> None:
    model_class, reason = registry.choose(config(architecture), impl)
    assert model_class.__name__ == "TransformersModel"
    assert "Transformers backend" in reason
    assert architecture in reason


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_a_native_model_without_the_activation_gives_way_to_the_transformers_backend(name: str) -> None:
    made = config(hidden_act=name)
    model_class, reason = registry.choose(made)
    assert model_class.__name__ == "TransformersModel"
    assert f"no hidden_act '{name}'" in reason
    with pytest.raises(UnsupportedModel, match=f"hidden_act is '{name}'"):
        registry.choose(made, "native")[0](made, 64)


def test_the_registry_knows_the_activations_of_native_models() -> None:
    for name in registry.ACTIVATIONS:
        GatedActivation(name)


def test_an_architecture_without_native_model_is_refused_where_native_is_asked_for() -> None:
    with pytest.raises(UnsupportedModel) as error:
        registry.choose(config("GPTNeoXForCausalLM"), "native")
    assert error.value.id == "HF030"
    assert "--model-impl native" in error.value.cause


def test_quantised_weights_are_refused_by_method() -> None:
    with pytest.raises(UnsupportedModel) as error:
        registry.choose(config(quantization_config={"quant_method": "hqq", "bits": 4}), "native")
    assert error.value.id == "HF050"
    assert "hqq" in error.value.cause


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, of 4 experts"),
        ({"num_local_experts": "many"}, "num_local_experts is 'many'"),
        ({"num_local_experts": 10**30}, "num_local_experts is 10+, not a number from 1 to 1048576"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1, not a list"),
    ],
)
def test_numbers_of_experts_that_cannot_be_are_named(change: dict[str, Any], says: str) -> None:
    made = config("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2)
    made = dataclasses.replace(made, hf={**made.hf, **change})
    model_class, _ = registry.choose(made, "native")
    with pytest.raises(ModelError, match=says) as error:
        model_class(made, 64)
    assert error.value.id == "HF002"


def test_an_unknown_activation_is_refused_by_name() -> None:
    model_class, _ = registry.choose(config(), "native")
    with pytest.raises(UnsupportedModel) as error:
        model_class(config(hidden_act="relu"), 64)
    assert "relu" in error.value.cause
    assert "silu" in error.value.cause
