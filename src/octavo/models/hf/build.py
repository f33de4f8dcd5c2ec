"""From a config to a Transformers model whose parameters have no memory yet, or the reason why there is none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.errors import ModelError, UnsupportedModel
from octavo.models.hf import attention
from octavo.models.hf.trace import NotPaged, Trace


def causal_lm_class(model_type: str) -> str | None:
    """The name of the class that the installed Transformers has for causal language models of ``model_type``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name: str | tuple[str, ...] | None = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return name[0] if isinstance(name, tuple) else name


@dataclass(frozen=True)
class Classes:
    """What a model is made of: a ``PreTrainedConfig`` and a ``PreTrainedModel`` with a language head."""

    config: Any
    model: Any


def installed_classes(wanted: ModelConfig) -> Classes:
    """Those of the installed Transformers; raises `UnsupportedModel`: HF030 if it does not know ``wanted``, HF031 for
    one that it knows as another kind of model.
    """
    import transformers

    model_type = wanted.model_type
    name = causal_lm_class(model_type) or _class_of_part(wanted)
    if model_type not in transformers.CONFIG_MAPPING or name is None:
        lacks = f"Transformers {transformers.__version__} has no causal language model of model_type {model_type!r}"
        if model_type in transformers.CONFIG_MAPPING:
            cause = f"{lacks}, and octavo serves no other kind."
            raise UnsupportedModel(cause, "Choose a causal language model.", id="HF031")
        wrote = wanted.hf.get("transformers_version")
        written = f"; config.json was written by Transformers {wrote}" if isinstance(wrote, str) else ""
        raise UnsupportedModel(
            f"{lacks}{written}.", "Install a newer Transformers if the model is newer than this one."
        )
    if wanted.architecture.lower() != name.lower():  # LLaMAForCausalLM is a spelling of old files
        raise UnsupportedModel(  # the head and its weights are those of one class: a classifier is no language model
            f"The config names {wanted.architecture}; the causal language model of model_type {model_type!r} in"
            f" Transformers is {name}.",
            "Use a checkpoint of that class.",
        )
    return Classes(transformers.CONFIG_MAPPING[model_type], getattr(transformers, name))


def _class_of_part(wanted: ModelConfig) -> str | None:
    """The architecture that is named, if it is a language model of just this type: the text part of a larger model."""
    import transformers

    found = getattr(transformers, wanted.architecture, None) if "CausalLM" in wanted.architecture else None
    own = getattr(getattr(found, "config_class", None), "model_type", None)
    return wanted.architecture if own == wanted.model_type else None


def build(wanted: ModelConfig, dtype: torch.dtype, classes: Classes | None = None) -> nn.Module:
    """The causal language model of ``wanted``, its parameters on the meta device, its buffers real.

    It is of the installed Transformers unless there are other ``classes``. Raises `UnsupportedModel` HF030 if
    Transformers has no such model, HF031 if it is of a kind that this engine cannot run, `ModelError` HF002 if the
    config is one that the class cannot be made from.
    """
    classes = classes or installed_classes(wanted)
    config = config_of(classes.config, wanted.hf)
    _refuse_kind(config)
    attention.register()
    try:
        with _parameters_on_meta(), warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore")
            model = _made(classes.model, config, dtype)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"{classes.model.__name__} cannot be built from this config: {type(error).__name__}: {_one_line(error)}.",
            "Correct config.json, or install the Transformers, and other packages, that the model was made for.",
            id="HF002",
        ) from error
    _keep_in_float32(model, dtype)
    return model.eval().requires_grad_(False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def own_attention(model_class: Any) -> str:
    """The name of the attention that Transformers would choose for a class by itself."""
    return "sdpa" if model_class._supports_sdpa else "eager"


def _made(model_class: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    try:
        model: nn.Module = model_class._from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    except (KeyError, ValueError) as error:
        if attention.NAME not in str(error):
            raise
        # It has a table of attentions of its own.
        model = model_class._from_config(config, dtype=dtype, attn_implementation=own_attention(model_class))
    return model


def config_of(config_class: Any, hf: Mapping[str, Any]) -> Any:
    """``hf`` as an object of ``config_class``; raises `ModelError` HF002 if it does not take it."""
    try:
        # The checkpoint's weights come as plain ones, whatever they are stored as.
        return config_class.from_dict(_with_floats({k: v for k, v in hf.items() if k != "quantization_config"}))
    except Exception as error:  # each config class validates in its own way
        raise ModelError(
            f"{config_class.__name__} refuses the config: {type(error).__name__}: {_one_line(error)}.",
            "Correct config.json.",
            id="HF002",
        ) from error


def _with_floats(value: Any) -> Any:
    """Infinities as numbers, which Transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if "__float__" in value else {k: _with_floats(v) for k, v in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _refused(config: Any, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The Transformers model of {config.model_type} cannot run here: {reason}.",
        "Choose a model of another architecture.",
        id="HF031",
    )


def _refuse_kind(config: Any) -> None:
    """What shows without building anything."""
    if getattr(config, "is_encoder_decoder", False):
        raise _refused(config, "it has an encoder and a decoder")


def refuse_parts(model: Any) -> None:
    """Raises `NotPaged` for attention that cannot be the engine's."""
    if not (model._supports_attention_backend or model._can_set_attn_implementation() or may_keep_states(model)):
        raise NotPaged("its attention does not go through Transformers' attention interface")


def may_keep_states(model: Any) -> bool:
    """Whether something other than attention may go from one token of ``model`` to the next."""
    return bool(_recurrent(model)) or any(isinstance(module, _MIX) for module in model.modules())


def refuse_states(model: Any, seen: Trace) -> None:
    """Raises `NotPaged` for what goes from one token to the next and is neither attention nor a mixer that was seen."""
    inside: set[nn.Module] = set()
    for mixer in seen.mixers.traced if seen.mixers else ():
        inside |= set(seen.body.get_submodule(mixer.name).modules())
    if not inside and (reason := _recurrent(model)):
        raise NotPaged(reason)
    for module, _ in seen.attention:
        if module in inside:
            raise NotPaged(f"{type(module).__name__} is a part of what keeps a state")
    for name, module in model.named_modules():
        ran = module in seen.ran or model.get_submodule(name.rpartition(".")[0]) in seen.ran
        if isinstance(module, _MIX) and ran and module not in inside:
            raise NotPaged(f"{name} ({type(module).__name__}) mixes neighbouring tokens")


def _recurrent(model: Any) -> str:
    """What the config or the class says of states, as a clause, or ""."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if recurrent := {kind for kind in kinds if any(part in kind for part in ("linear", "mamba", "conv"))}:
        return f"it has layers that keep a state ({', '.join(sorted(recurrent))})"
    return "it is recurrent" if getattr(model, "_is_stateful", False) else ""


_MIX = (nn.Conv1d, nn.RNNBase)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory; buffers, which are computed from the config, are real."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    with mock.patch.object(nn.Module, "register_parameter", register_without_memory), no_init_weights():
        yield


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """The parameters that the class wants in float32 whatever the model's type, as ``from_pretrained`` does."""
    if dtype is torch.float32:
        return
    names = set(model._keep_in_fp32_modules_strict or ())
    if dtype is torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if any(kept in name.split(".") for kept in names):
            parameter.data = parameter.data.float()


def freeze_rope(model: nn.Module, max_len: int) -> None:
    """Makes rotary frequencies depend on the longest sequence of the engine alone.

    Transformers recomputes "dynamic" and "longrope" frequencies for the longest sequence of each call, so one request
    would change the keys of another. As in `layers.rotary`, the table is that of ``max_len``.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in by_layer.items():
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            extra = {} if layer_type is None else {"layer_type": layer_type}
            config: Any = module.config
            with torch.device("cpu"):
                length = max(max_len, config.max_position_embeddings) if "dynamic" in kind else max_len
                inverse, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length, **extra)
            prefix = "" if layer_type is None else f"{layer_type}_"
            module.register_buffer(f"{prefix}inv_freq", inverse, persistent=False)
            setattr(module, f"{prefix}attention_scaling", scaling)
            if layer_type is None:
                module.rope_type = "frozen"  # type: ignore[assignment]
            else:
                kinds[layer_type] = "frozen"  # type: ignore[index]
