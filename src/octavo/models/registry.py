"""From an architecture's name in config.json to the class that runs it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module

from octavo.config import ModelConfig
from octavo.errors import UnsupportedModel
from octavo.models.base import Model

# Architecture -> "module:class", imported when chosen.
NATIVE = {
    "LlamaForCausalLM": "octavo.models.llama:LlamaForCausalLM",
    "LLaMAForCausalLM": "octavo.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "octavo.models.llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "octavo.models.llama:LlamaForCausalLM",
    "Qwen3ForCausalLM": "octavo.models.llama:LlamaForCausalLM",
    "SmolLM3ForCausalLM": "octavo.models.llama:LlamaForCausalLM",
}


def choose(config: ModelConfig, impl: str = "auto") -> tuple[type[Model], str]:
    """The class for ``config`` and the reason, one line for the log. ``impl`` is an option's value (``--model-impl``).

    Raises `UnsupportedModel`: HF030 if nothing can run the architecture, HF050 for weights that are quantised.
    """
    if impl == "transformers":
        raise UnsupportedModel(
            "--model-impl transformers asks for the Transformers backend, which octavo does not have yet.",
            f"Leave --model-impl out to run one of the native models: {', '.join(sorted(NATIVE))}.",
        )
    address = NATIVE.get(config.architecture)
    if address is None:
        nearest = difflib.get_close_matches(config.architecture, NATIVE, n=3, cutoff=0.0)
        raise UnsupportedModel(
            f"Architecture {config.architecture!r} (model_type {config.model_type!r}) has no native model"
            " and there is no Transformers backend yet.",
            f"The nearest supported ones are {', '.join(nearest)}.",
        )
    _refuse_quantised(config)
    module, _, name = address.partition(":")
    model: type[Model] = getattr(import_module(module), name)
    return model, f"native {name} for {config.architecture}"


def _refuse_quantised(config: ModelConfig) -> None:
    quantisation = config.hf.get("quantization_config")
    if not quantisation:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
    raise UnsupportedModel(
        f"The weights are quantised ({method or 'by an unnamed method'}); native models load plain floats only.",
        "Use the model's unquantised checkpoint, or a GGUF file of it.",
        id="HF050",
    )
