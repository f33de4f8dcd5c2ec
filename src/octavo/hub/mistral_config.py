"""A ``config.json`` made from the ``params.json`` of a repo in Mistral's own format.

Such a repo has ``params.json``, ``consolidated*.safetensors`` (`hub.mistral_weights`) and ``tekken.json`` or
``tokenizer.model.v*`` (`hub.mistral_tokenizer`). The keys are those of mistral-inference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from octavo.errors import ModelError, UnsupportedModel
from octavo.hub.patches import is_positive
from octavo.log import get_logger

Params = Mapping[str, Any]

_SIZES: Final = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
}
_LENGTHS: Final = ("max_position_embeddings", "max_seq_len", "model_max_length")
_GUESSED_LEN: Final = 32_768  # of Mistral 7B, whose params.json names none
_DTYPES: Final = ("bfloat16", "float16", "float32")


def config_from_params(params: Params, path: Path) -> dict[str, Any]:
    """The config of ``params``, read from ``path``. The language part alone of a model that sees images.

    Raises `ModelError` HF002 for a missing size, `UnsupportedModel` HF030 for a kind of model that is none of text.
    """
    _refuse_other_kinds(params, path)
    missing = [key for key in _SIZES.values() if params.get(key) is None]
    if missing:
        raise ModelError(f"{path} has no {', '.join(missing)}.", "Download it again.", id="HF002")
    config: dict[str, Any] = {ours: params[theirs] for ours, theirs in _SIZES.items()}
    heads = params["n_heads"]
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or _divided(params["dim"], heads),
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "hidden_act": params.get("activation") or "silu",
        "tie_word_embeddings": bool(params.get("tied_embeddings")),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
        **_window(params),
        **_experts(params),
        **_rope(params),
    }
    config["max_position_embeddings"] = _max_len(params, config["rope_parameters"], path)
    if params.get("dtype") in _DTYPES:
        config["dtype"] = params["dtype"]
    if params.get("quantization"):
        config["quantization_config"] = {"quant_method": "fp8", **_as_dict(params["quantization"])}
    return config


def heads_of(params: Params, path: Path) -> tuple[int, int, int]:
    """(query heads, key and value heads, their size); raises `ModelError` HF002."""
    heads, kv_heads = params.get("n_heads"), params.get("n_kv_heads") or params.get("n_heads")
    size = params.get("head_dim") or _divided(params.get("dim"), heads)
    for value in (heads, kv_heads, size):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{path} does not say how many heads of which size.", "Download it again.", id="HF002")
    return int(heads or 0), int(kv_heads or 0), int(size or 0)


def _refuse_other_kinds(params: Params, path: Path) -> None:
    multimodal = _as_dict(params.get("multimodal"))
    shared = _as_dict(params.get("moe")).get("num_shared_experts")
    kind = params.get("model_type", "transformer")
    found = "audio" if "whisper_model_args" in multimodal else "shared experts" if shared else None
    if kind not in ("transformer", "mistral", "mixtral", "ministral3"):
        found = f"model_type {kind!r}"
    if found:
        raise UnsupportedModel(
            f"{path} describes a model with {found}, which octavo does not read in Mistral's format.",
            "Take the repo in the Hugging Face format (config.json, --config-format hf), if there is one.",
        )
    if params.get("vision_encoder") or "vision_encoder_args" in multimodal:
        get_logger().warning("%s describes a model that sees images; octavo serves its language part", path.name)


def _window(params: Params) -> dict[str, Any]:
    """One window for all layers, or a pattern of windows (null: none) that repeats over them."""
    window = params.get("sliding_window") or params.get("_sliding_window")
    if not isinstance(window, list) or not window:
        return {"sliding_window": window or None}
    kinds = ["sliding_attention" if size else "full_attention" for size in window]
    count = params["n_layers"] if isinstance(params["n_layers"], int) else 0
    return {
        "sliding_window": next((size for size in window if size), None),
        "layer_types": [kinds[i % len(kinds)] for i in range(count)],
    }


def _experts(params: Params) -> dict[str, Any]:
    moe = _as_dict(params.get("moe"))
    if not moe:
        return {}
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": moe.get("num_experts"),
        "num_experts_per_tok": moe.get("num_experts_per_tok", 2),
    }


def _rope(params: Params) -> dict[str, Any]:
    """Mistral 7B v0.1, whose attention has a window, is of an age without ``rope_theta``: it was 10 000 then."""
    old = params.get("sliding_window") is not None
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.get("rope_theta") or (1e4 if old else 1e6)}
    yarn = _as_dict(params.get("yarn"))
    if yarn:
        names = {"factor": "factor", "beta": "beta_fast", "alpha": "beta_slow"}
        names["original_max_position_embeddings"] = "original_max_position_embeddings"
        rope |= {ours: yarn[theirs] for theirs, ours in names.items() if theirs in yarn} | {"rope_type": "yarn"}
        if yarn.get("apply_scale") is False:
            rope["attention_factor"] = 1.0
    scaling = _as_dict(params.get("llama_4_scaling"))
    if not scaling:
        return {"rope_parameters": rope}
    rope["llama_4_scaling_beta"] = scaling.get("beta")
    rope.setdefault("original_max_position_embeddings", scaling.get("original_max_position_embeddings"))
    return {"rope_parameters": rope, "model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}


def _max_len(params: Params, rope: Mapping[str, Any], path: Path) -> Any:
    named = [params[key] for key in _LENGTHS if params.get(key) is not None]
    if named:
        return named[0]
    trained, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if rope["rope_type"] == "yarn" and is_positive(trained) and is_positive(factor):
        scaled = trained * factor
        return int(scaled) if math.isfinite(scaled) else scaled  # which is refused as a length
    get_logger().warning(
        "%s names no longest sequence, so %d is taken; --hf-overrides '{\"max_position_embeddings\": N}' says another",
        path.name,
        _GUESSED_LEN,
    )
    return _GUESSED_LEN


def _divided(dim: Any, heads: Any) -> Any:
    return dim // heads if isinstance(dim, int) and isinstance(heads, int) and heads > 0 else None


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
