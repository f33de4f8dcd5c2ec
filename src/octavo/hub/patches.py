"""Brings a ``config.json`` of any age into one shape: pure functions from dict to dict.

The shape that leaves here is that of Transformers 5: ``dtype``, ``rope_parameters`` (flat, or nested by layer type; the
legacy keys are gone), ``architectures``, present-day names in ``layer_types``, ``text_config`` for what others call
``llm_config``. A patch that changed something adds a line to ``notes``; each one says since when and why it is needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeGuard

from octavo.errors import ModelError

Hf = dict[str, Any]
Patch = Callable[[Hf, list[str]], Hf]

LAYER_TYPES: Final = frozenset(  # those of Transformers 5.23
    (
        *("full_attention", "sliding_attention", "chunked_attention", "window_attention", "indexed_attention"),
        *("compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse", "linear_attention"),
        *("conv", "moe", "hybrid", "hybrid_sliding", "reference_sliding_attention"),
    )
)
_RENAMED_LAYER_TYPES: Final = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
_ARCHITECTURES: Final = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
# What a file may leave out: the class defaults of Transformers 5.23 that differ from those of `hub.configs`.
CLASS_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": {"max_position_embeddings": 2048, "rope_theta": 10_000.0, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
        "rope_theta": 10_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "pad_token_id": 128_004,
    },
}

_OF_ALL: Final[Mapping[str, Any]] = {"hidden_act": "silu", "rms_norm_eps": 1e-6}  # of those types

# Keys that some families read, and of the types above these alone: the classes of the others run without.
_READERS: Final[Mapping[str, frozenset[str]]] = {
    "attn_logit_softcapping": frozenset(),
    "decoder_sparse_step": frozenset(("qwen3_moe",)),
    "layer_types": frozenset(("mistral", "qwen2", "qwen3", "smollm3")),
    "mlp_only_layers": frozenset(("qwen3_moe",)),
    "no_rope_layer_interval": frozenset(("smollm3",)),
    "no_rope_layers": frozenset(("smollm3",)),
    "use_sliding_window": frozenset(("qwen2", "qwen3", "qwen3_moe", "smollm3")),
}


def normalise(hf: Mapping[str, Any]) -> tuple[Hf, list[str]]:
    """A copy of ``hf`` in the one shape, and what was changed. Applying it twice changes nothing more.

    Raises `ModelError`: HF020 for RoPE settings that contradict each other or lack a key, HF002 for a value that is of
    another kind than every reader of configs takes for granted.
    """
    notes: list[str] = []
    out = dict(hf)
    for patch in PATCHES:
        out = patch(out, notes)
    return out, notes


def check_kinds(hf: Hf, notes: list[str]) -> Hf:
    """Refuses values that the other patches could not even look at."""
    kinds = hf.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise bad_value("layer_types", kinds, "a list of names")
    if not isinstance(hf.get("model_type", ""), str | None):
        raise bad_value("model_type", hf["model_type"], "a name")
    for key in ("max_position_embeddings", "original_max_position_embeddings"):
        if hf.get(key) is not None and not is_positive(hf[key]):
            raise bad_value(key, hf[key], "a number above 0")
    inner = hf.get("text_config")
    if isinstance(inner, Mapping) and {"text_config", "llm_config"} & set(inner):
        raise bad_value("text_config", inner, "a config of one level")
    return hf


# 2025: multimodal configs of InternVL and its kin call their language part llm_config; Transformers says text_config.
def rename_text_config(hf: Hf, notes: list[str]) -> Hf:
    if "llm_config" not in hf or "text_config" in hf:
        return hf
    notes.append("llm_config read as text_config")
    return {("text_config" if key == "llm_config" else key): value for key, value in hf.items()}


# 2025: multimodal configs keep the language part in a dict of its own, which has every defect that a whole config has.
def normalise_text_config(hf: Hf, notes: list[str]) -> Hf:
    inner = hf.get("text_config")
    if not isinstance(inner, dict):
        return hf
    patched, inner_notes = normalise(inner)
    notes += [f"text_config: {note}" for note in inner_notes]
    return {**hf, "text_config": patched}


# 2025-11 (Transformers 5.0): torch_dtype became dtype. Some files write it with the module's name in front.
def rename_dtype(hf: Hf, notes: list[str]) -> Hf:
    value = hf.get("dtype", hf.get("torch_dtype"))
    if value is None or ("torch_dtype" not in hf and not str(value).startswith("torch.")):
        return hf
    out = {key: v for key, v in hf.items() if key != "torch_dtype"}
    return {**out, "dtype": str(value).removeprefix("torch.")}


# 2026 (Transformers 5.19): four names of layer types were replaced; files on the Hub keep the old ones.
def rename_layer_types(hf: Hf, notes: list[str]) -> Hf:
    kinds = hf.get("layer_types")
    if not isinstance(kinds, list) or not any(kind in _RENAMED_LAYER_TYPES for kind in kinds):
        return hf
    notes.append("old names in layer_types replaced")
    return {**hf, "layer_types": [_RENAMED_LAYER_TYPES.get(kind, kind) for kind in kinds]}


# 2023 to 2025: configs written by hand lack architectures; the model_type says which causal language model is meant.
def fill_architectures(hf: Hf, notes: list[str]) -> Hf:
    if isinstance(hf.get("architectures"), str) and hf["architectures"]:  # as people write it
        notes.append(f"architectures is the text {hf['architectures']!r}, taken as a list of one")
        return {**hf, "architectures": [hf["architectures"]]}
    name = _ARCHITECTURES.get(str(hf.get("model_type")))
    if hf.get("architectures") or name is None:
        return hf
    notes.append(f"architectures is missing: {name} for model_type {hf['model_type']}")
    return {**hf, "architectures": [name]}


# Files carry keys of other families, left over from a conversion; Transformers' class (5.23) takes no notice of them.
def drop_unread(hf: Hf, notes: list[str]) -> Hf:
    kind = str(hf.get("model_type"))
    if kind not in CLASS_DEFAULTS or "auto_map" in hf:  # whose own class may read anything
        return hf
    unread = [key for key, readers in _READERS.items() if hf.get(key) is not None and kind not in readers]
    if not unread:
        return hf
    notes.append(f"{', '.join(unread)} left out, which models of type {kind} do not read")
    return {key: value for key, value in hf.items() if key not in unread}


# Files of every age leave out values equal to the defaults of the class that wrote them.
def fill_class_defaults(hf: Hf, notes: list[str]) -> Hf:
    own = CLASS_DEFAULTS.get(str(hf.get("model_type")))
    defaults = {} if own is None else {**_OF_ALL, **own}
    theta = defaults.pop("rope_theta", None)
    out = {**defaults, **hf}
    if theta is not None and _first(hf, _THETA_KEYS) is None and not _rope_given(hf):
        out["rope_theta"] = theta
    return out


# --- RoPE: four generations of shapes (2021 custom code, v4, v4 with two thetas, v5 flat and nested) ------------------

_THETA_KEYS: Final = ("rope_theta", "rotary_emb_base")
_PARTIAL_KEYS: Final = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
_LEGACY_ROPE_KEYS: Final = frozenset((*_THETA_KEYS, *_PARTIAL_KEYS, "rope_scaling", "rope_local_base_freq"))
_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_SCALED_FROM_ORIGINAL: Final = ("llama3", "yarn", "longrope")
_NUMBERS: Final = (
    *("rope_theta", "factor", "alpha", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow"),
)
_SAME_TYPE: Final = (("su", "longrope"), ("mrope", "default"))
DEFAULT_THETA: Final = 10_000.0


def normalise_rope(hf: Hf, notes: list[str]) -> Hf:
    """Gathers all RoPE settings of ``hf`` in ``rope_parameters``; does nothing for a model without RoPE.

    Each (nested: for each layer type, where None means no RoPE) dict gets ``rope_type`` and ``rope_theta``, and for the
    types that scale from a trained length ``original_max_position_embeddings``. The order of precedence is the dict,
    then the top level, then the class default; Phi-3's top-level original length is the exception and wins.
    """
    theta, partial, given = _first(hf, _THETA_KEYS), _first(hf, _PARTIAL_KEYS), _rope_given(hf)
    if theta is None and not given:
        return hf
    defaults: Hf = {"rope_theta": theta if theta is not None else _class_theta(hf)}
    if partial is not None:
        defaults["partial_rotary_factor"] = partial
    rope: Hf
    if nested_keys := _nested_keys(hf, given):
        shared = {key: value for key, value in given.items() if key not in nested_keys}
        rope = {key: _entry(hf, given[key], {**defaults, **shared}, key, notes) for key in sorted(nested_keys)}
    elif hf.get("rope_local_base_freq") is not None:
        local = {**defaults, "rope_theta": hf["rope_local_base_freq"]}
        rope = {
            "full_attention": _entry(hf, given, defaults, "full_attention", notes),
            "sliding_attention": _entry(hf, {}, local, "sliding_attention", notes),
        }
    else:
        rope = _entry(hf, given, defaults, "all layers", notes, top_level_wins=True) or {}
    return {**{k: v for k, v in hf.items() if k not in _LEGACY_ROPE_KEYS}, "rope_parameters": rope}


def _rope_given(hf: Mapping[str, Any]) -> Hf:
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise rope_error("all layers", f"the settings are {given!r}, not an object")
    return dict(given)


def _nested_keys(hf: Hf, given: Hf) -> set[str]:
    known = LAYER_TYPES | set(hf.get("layer_types") or ())
    return {key for key, value in given.items() if key in known and (value is None or isinstance(value, dict))}


def _entry(
    hf: Hf, given: Hf | None, defaults: Hf, layers: str, notes: list[str], *, top_level_wins: bool = False
) -> Hf | None:
    if given is None:
        return None
    kind = _rope_type({**defaults, **given}, hf, layers, notes)
    out = {**defaults, **{key: value for key, value in given.items() if key != "type"}, "rope_type": kind}
    if out["rope_theta"] is None:
        out["rope_theta"] = defaults["rope_theta"]
    if given.get("rope_type") == "telechat3-yarn":
        out.setdefault("attention_factor", _telechat_attention(out, layers))
    if kind in _SCALED_FROM_ORIGINAL:
        outer = hf.get("original_max_position_embeddings")
        if outer is not None and top_level_wins:
            out["original_max_position_embeddings"] = outer
        if out.get("original_max_position_embeddings") is None:
            out["original_max_position_embeddings"] = outer or hf.get("max_position_embeddings")
    _check(out, kind, layers)
    if kind == "yarn" and out["factor"] is None:
        out["factor"] = (hf.get("max_position_embeddings") or 0) / out["original_max_position_embeddings"] or 1.0
    return out


def _rope_type(given: Hf, hf: Hf, layers: str, notes: list[str]) -> str:
    """The present-day name of the type; old names and the pair ``type``/``rope_type`` are resolved here."""
    old, new = given.get("type"), given.get("rope_type")
    if old is not None and new is not None and old != new and (old, new) not in _SAME_TYPE:
        raise rope_error(layers, f"type is {old!r} but rope_type is {new!r}", "Keep rope_type only.")
    kind = new or old or "default"
    if not isinstance(kind, str):
        raise rope_error(layers, f"rope_type is {kind!r}, not a name")
    if kind == "mrope" and not given.get("mrope_section"):
        raise rope_error(layers, "rope_type 'mrope' has no mrope_section")
    renamed = {"su": "longrope", "mrope": "default", "telechat3-yarn": "yarn"}.get(kind, kind)
    if renamed == "yarn" and hf.get("model_type") == "phi3":
        renamed = "longrope"  # the first Phi-3 files called it so
    if renamed != kind:
        notes.append(f"rope_type {kind} read as {renamed}")
    return renamed


def _check(rope: Hf, kind: str, layers: str) -> None:
    if kind == "dynamic" and rope.get("factor") is None and rope.get("alpha") is None:
        raise rope_error(layers, "rope_type 'dynamic' has neither factor nor alpha")
    missing = [key for key in _REQUIRED.get(kind, ()) if key not in rope]
    if kind in _SCALED_FROM_ORIGINAL and rope["original_max_position_embeddings"] is None:
        missing.append("original_max_position_embeddings")
    if missing:
        raise rope_error(layers, f"rope_type {kind!r} has no {', '.join(missing)}")
    for key in _NUMBERS:
        if rope.get(key) is not None and not is_positive(rope[key]):
            raise rope_error(layers, f"{key} is {rope[key]!r}, not a number above 0")
    partial = rope.get("partial_rotary_factor", 1.0)
    if not is_positive(partial) or partial > 1:
        raise rope_error(layers, f"partial_rotary_factor is {partial!r}, outside (0, 1]")


def _telechat_attention(rope: Hf, layers: str) -> float:
    factor = rope.get("factor")
    if not is_positive(factor):
        raise rope_error(layers, f"factor is {factor!r}, not a number above 0")
    return 0.07 * math.log(factor) + 1.0


def _class_theta(hf: Hf) -> float:
    return float(CLASS_DEFAULTS.get(str(hf.get("model_type")), {}).get("rope_theta", DEFAULT_THETA))


def is_positive(value: Any) -> TypeGuard[int | float]:
    """Whether ``value`` is a number above 0 that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value <= sys.float_info.max


def _first(hf: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((hf[key] for key in keys if hf.get(key) is not None), None)


def bad_value(key: str, value: object, wanted: str) -> ModelError:
    shown = "missing" if value is None else repr(value)[:80]
    return ModelError(
        f"config: {key} is {shown}, not {wanted}.", "Correct config.json, or give it with --hf-overrides.", id="HF002"
    )


def rope_error(layers: str, what: str, remedy: str = "") -> ModelError:
    fix = remedy or "Correct rope_parameters in config.json or with --hf-overrides."
    return ModelError(f"RoPE of {layers}: {what}.", fix, id="HF020")


PATCHES: Final[tuple[Patch, ...]] = (
    check_kinds,
    rename_text_config,
    normalise_text_config,
    rename_dtype,
    rename_layer_types,
    fill_architectures,
    drop_unread,
    fill_class_defaults,
    normalise_rope,
)
