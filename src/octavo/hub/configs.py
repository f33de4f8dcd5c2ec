"""From ``config.json`` to what the engine needs: `ModelConfig`."""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

from octavo.config import LayerSpec, ModelConfig
from octavo.errors import ConfigError, ModelError
from octavo.hub.geometry import LENGTHS, layer_specs, lookup, number, own_length, size, text_config
from octavo.hub.gguf_pick import models
from octavo.hub.patches import CLASS_DEFAULTS, Hf, normalise, rename_text_config
from octavo.hub.quantised import settings
from octavo.hub.source import CONFIGS, Source
from octavo.log import get_logger

# Keys that are read here; an override of one of them is no typing error, even where the file lacks it.
_KNOWN_KEYS: Final = frozenset(
    (
        *("architectures", "attn_logit_softcapping", "dtype", "eos_token_id", "head_dim", "hidden_size_per_head"),
        *("is_causal", "is_matryoshka", "matryoshka_dimensions"),
        *("layer_types", "max_window_layers", "model_type", "no_rope_layers", "no_rope_layer_interval"),
        *("original_max_position_embeddings", "partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta"),
        *("sliding_window", "text_config", "tie_word_embeddings", "torch_dtype", "use_sliding_window", "vocab_size"),
        *LENGTHS,
    )
)
_ROPE_DICTS: Final = ("rope_scaling", "rope_parameters")
_ROPE_SCALARS: Final = ("rope_theta", "partial_rotary_factor")

_NO_FLOAT16: Final = frozenset(("gemma2", "gemma3", "gemma3_text", "glm4"))  # their activations overflow it
DTYPES: Final = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
    "float32": "float32",
    "float": "float32",
}


# --- the dict ---------------------------------------------------------------------------------------------------------


def read_hf_dict(source: Source, overrides: Mapping[str, Any] | None = None, config_format: str = "auto") -> Hf:
    """The config of ``source`` as a dict in the shape that `hub.patches` makes, with ``overrides`` (user's) merged in.

    A GGUF file's config is made from its metadata, one in Mistral's format from ``params.json`` (``config_format``
    auto: only where there is no ``config.json``); a dtype that is not named is that of the weights. Raises
    `ModelError`: HF002 for a missing or broken file, HF020 for contradictory RoPE settings.
    """
    return override(_raw_dict(source, config_format), overrides or {})


def overrides_by(change: Callable[[Hf], Any], source: Source, config_format: str = "auto") -> Hf:
    """What ``change`` sets in a copy of the config of ``source``, not normalised yet, as `override` takes it.

    Raises `ConfigError` if it does not return a dict with all that was there: merging removes nothing.
    """
    hf = rename_text_config(_raw_dict(source, config_format), [])
    changed = change(copy.deepcopy(hf))
    if not isinstance(changed, Mapping):
        raise ConfigError(f"hf_overrides returned {type(changed).__name__}.", "Return the config as a dict.")
    gone = _removed(hf, changed)
    if gone:
        raise ConfigError(f"hf_overrides removed {', '.join(gone)} from the config.", "Set them to None.")
    return {key: value for key, value in changed.items() if key not in hf or value != hf[key]}


def _removed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys of ``old`` and its sub-configs that are not in ``new``."""
    gone = sorted(old.keys() - new.keys())
    for key, value in new.items():
        inner = old.get(key)
        if _is_sub_config(inner, key) and isinstance(value, Mapping):
            gone += [f"{key}.{name}" for name in _removed(inner, value)]
    return gone


def override(hf: Mapping[str, Any], overrides: Mapping[str, Any]) -> Hf:
    """``hf`` with ``overrides`` merged in, normalised after that, so that they can also mend what could not be read.

    An object for RoPE replaces the old settings but for theta and the rotated share, which stay unless it names them
    (null: no scaling); one for a sub-config is merged into it; any other value replaces the old one. Keys that nobody
    reads are merged with a warning.
    """
    out, notes = normalise(_merged(rename_text_config(dict(hf), []), overrides))
    known = {*hf, *CLASS_DEFAULTS.get(str(out.get("model_type")), ()), *_KNOWN_KEYS}
    for key in sorted(set(overrides) - known):
        get_logger().warning("hf_overrides: %r is not a key of this config or of any that octavo reads", key)
    for note in notes:
        get_logger().info("config: %s", note)
    if overrides:
        get_logger().info("config: overridden %s", ", ".join(f"{k}={v!r}" for k, v in sorted(overrides.items())))
    return out


def _raw_dict(source: Source, config_format: str) -> Hf:
    if source.kind == "gguf":
        from octavo.hub.gguf import GgufReader
        from octavo.hub.gguf_config import config_from_gguf

        return config_from_gguf(GgufReader(source.path))
    names = {"hf": ("config.json",), "mistral": ("params.json",)}.get(config_format, CONFIGS)
    path = next((file for name in names if (file := source.file(name))), None)
    if path is not None and path.name == "params.json":
        from octavo.hub.mistral_config import config_from_params

        return _with_dtype(_with_quantisation(config_from_params(read_json(path), path), source), source)
    if path is None:
        raise _no_config(source.path, names)
    return _with_dtype(_with_quantisation(read_json(path), source), source)


def _no_config(folder: Path, names: tuple[str, ...]) -> ModelError:
    found = sorted(entry.name for entry in folder.iterdir())
    unusable = [name for name in names if name in found]
    if unusable:
        what = "a link to a file that is gone" if (folder / unusable[0]).is_symlink() else "no file"
        return ModelError(f"{folder / unusable[0]} is {what}.", "Download it again.", id="HF002")
    ggufs = models(found)
    other = "Name a folder or repo with a Transformers model in it, or a .gguf file."
    remedy = f"Name one of its GGUF files: {folder}/{ggufs[0]}." if ggufs else other
    return ModelError(
        f"{folder} has no {' or '.join(names)}; it has {', '.join(found[:10]) or 'no files at all'}.",
        remedy,
        id="HF002",
    )


def _with_quantisation(hf: Hf, source: Source) -> Hf:
    """``hf`` with ``quantization_config`` in the form of `quantised.settings.stated`, wherever it was."""
    files = ((name, source.file(name)) for name in settings.FILES)
    own = next(((name, read_json(path)) for name, path in files if path is not None), None)
    found = settings.stated(hf, own)
    return hf if found is None else {**hf, "quantization_config": found}


def _with_dtype(hf: Hf, source: Source) -> Hf:
    """``hf``, which may name no dtype, with that of most bytes in the first safetensors file."""
    inner = hf.get("text_config")
    named = [part.get(key) for part in (hf, inner) if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    if any(value is not None for value in named):
        return hf
    from octavo.hub.checkpoint import safetensors_paths
    from octavo.hub.safetensors_file import SafetensorsFile

    sizes: Counter[str] = Counter()
    with contextlib.suppress(ModelError):  # a damaged or missing file is reported by whoever needs the weights
        for path in safetensors_paths(source.path)[:1]:
            for tensor in SafetensorsFile(path).tensors.values():
                sizes[tensor.dtype] += tensor.nbytes
    floats = [(size, dtype) for dtype, size in sizes.items() if "float" in dtype]
    return {**hf, "dtype": max(floats)[1]} if floats else hf


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; raises `ModelError` HF002 if it is not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows put a mark in front
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Download or write it again.", id="HF002") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object.", "Download it again.", id="HF002")
    return value


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> Hf:
    out = {**old, **new}
    for key, value in new.items():
        inner = old.get(key)
        if _is_sub_config(inner, key):
            out[key] = _merged(inner, value) if isinstance(value, Mapping) else value
    given = [new[key] for key in _ROPE_DICTS if key in new]
    if given or any(key in new for key in _ROPE_SCALARS):
        rope = _new_rope(old, new, given)
        out = {key: value for key, value in out.items() if key not in _ROPE_DICTS} | {"rope_parameters": rope}
    return out


def _is_sub_config(value: Any, key: str) -> TypeGuard[Hf]:
    return key.endswith("_config") and key != "quantization_config" and isinstance(value, dict)


def _new_rope(old: Mapping[str, Any], new: Mapping[str, Any], given: list[Any]) -> Any:
    """The RoPE dict under overrides. Theta given one level up would lose against an old dict, so it is put inside."""
    before: Any = next((old[key] for key in _ROPE_DICTS if old.get(key)), {})
    flat = isinstance(before, Mapping) and not any(isinstance(value, Mapping) for value in before.values())
    scalars = {key: new[key] for key in _ROPE_SCALARS if key in new}
    if not given:
        return {**before, **scalars} if flat else before
    kept = {key: before[key] for key in _ROPE_SCALARS if flat and key in before}
    rope = given[0] or {}
    return {**kept, **scalars, **rope} if isinstance(rope, Mapping) else rope


# --- the model --------------------------------------------------------------------------------------------------------


def model_config(
    hf: Hf,
    *,
    dtype: str = "auto",
    generation: Mapping[str, Any] | None = None,
    device: str = "cpu",
    fast_bfloat16: bool = False,
    kv_cache_dtype: str = "auto",
    converts_float8: bool = False,
    traced: bool = False,
    has_head: bool = True,
) -> ModelConfig:
    """What the engine needs of ``hf`` (normalised), for ``device`` "cpu" or "cuda".

    ``fast_bfloat16``: a CPU has instructions for it. ``converts_float8``: the device has some for 8-bit floats.
    ``traced``: the layers are found out by running the model, so settings of theirs that cannot be read here are left
    out.

    Raises `ModelError`: HF012 if nothing says which architecture it is, HF002 for a size that is missing or wrong,
    HF020 for RoPE settings that cannot be applied, HF022 for a dtype that the model cannot run in; `ConfigError` for a
    type of the KV cache that the device does not have.
    """
    text = text_config(hf)
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ModelError(
            f"the config names no architectures, and its model_type is {hf.get('model_type')!r}, which is unknown.",
            'Name the model class with --hf-overrides \'{"architectures": ["LlamaForCausalLM"]}\'.',
            id="HF012",
        )
    layers, inner = _layers(text, traced)
    max_len, max_len_reason = own_length(text, layers)
    chosen, dtype_reason = choose_dtype(hf, dtype, device, fast_bfloat16=fast_bfloat16)
    hidden = 0 if traced and lookup(text, "hidden_size") is None else size(text, "hidden_size")
    return ModelConfig(
        architecture=architectures[0],
        model_type=str(hf.get("model_type", "")),
        vocab_size=size(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=inner or 4 * hidden,
        layers=layers,
        max_len=max_len,
        max_len_reason=max_len_reason,
        dtype=chosen,
        dtype_reason=dtype_reason,
        eos_ids=_eos_ids(hf, text, generation or {}),
        norm_eps=number(text, "norm_eps", 1e-6),
        hidden_act=str(lookup(text, "hidden_act") or "silu"),
        tie_embeddings=has_head and _ties(hf, text),
        hf=hf,
        has_head=has_head,
        cache_dtype=_cache_dtype(kv_cache_dtype, converts_float8),
    )


def _ties(hf: Hf, text: Hf) -> bool:
    """Transformers 4 looked at the text config, 5 looks at the top level."""
    return bool(hf.get("tie_word_embeddings")) or bool(text.get("tie_word_embeddings"))


def _cache_dtype(wanted: str, converts_float8: bool) -> str | None:
    """See `ModelConfig.cache_dtype`."""
    if wanted == "auto":
        return None
    if not converts_float8:
        raise ConfigError(
            "kv_cache_dtype is fp8, but this device has no instructions for 8-bit floats.",
            "Leave it at auto; fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper).",
        )
    return "float8_e4m3fn"


def _layers(text: Hf, optional: bool) -> tuple[tuple[LayerSpec, ...], int]:
    """The layers, and the inner size of their MLPs (0: not given); with ``optional``, none that are unusual."""
    try:
        inner = size(text, "intermediate_size") if lookup(text, "intermediate_size") is not None else 0
        return layer_specs(text), inner
    except ModelError as error:
        if not optional:
            raise
        get_logger().info("config: the layers are left to the model's own code: %s", error.cause)
        return (), 0


def choose_dtype(hf: Mapping[str, Any], wanted: str, device: str, *, fast_bfloat16: bool = False) -> tuple[str, str]:
    """The dtype of weights and activations and why; raises `ModelError` HF022."""
    inner = hf.get("text_config")
    model_type = hf.get("model_type")
    written = hf.get("dtype") or (inner.get("dtype") if isinstance(inner, dict) else None)
    refuses_float16 = model_type in _NO_FLOAT16
    if wanted != "auto":
        if wanted not in DTYPES:
            raise ModelError(f"dtype is {wanted!r}.", f"Give auto or one of {', '.join(DTYPES)}.", id="HF022")
        if refuses_float16 and DTYPES[wanted] == "float16":
            raise ModelError(
                f"{model_type} cannot run in float16: its activations overflow it.",
                "Use --dtype bfloat16 or float32.",
                id="HF022",
            )
        return DTYPES[wanted], f"asked for; the checkpoint says {written}"
    if refuses_float16 and written == "float16":
        return "bfloat16", f"the checkpoint says float16, in which {model_type} overflows"
    if written == "bfloat16" or (written == "float16" and not (device == "cpu" and hf.get("quantization_config"))):
        return written, "the checkpoint's own"
    said = "the checkpoint has no type of its own" if written is None else f"the checkpoint says {written}"
    if written == "float16":  # of scales alone, and no CPU here multiplies by it
        written, said = None, "the quantised checkpoint says float16"
    if written not in (None, "float32"):
        return "bfloat16", f"{said}, which is no type to compute in"
    if device == "cuda":
        return "bfloat16", f"{said}; float32 is slow on a GPU (--dtype float32 keeps it)"
    if written == "float32":
        return "float32", f"{said}; kept on a CPU"
    if fast_bfloat16:
        return "bfloat16", f"{said}; this CPU has instructions for bfloat16"
    return "float32", f"{said}; this CPU has no instructions for bfloat16"


def _eos_ids(hf: Hf, text: Hf, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """All ids that end a text: of the config and of the generation config, each an int, a list or absent."""
    ids: dict[int, None] = {}
    for value in (generation.get("eos_token_id"), hf.get("eos_token_id"), text.get("eos_token_id")):
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
                ids[token] = None
            elif token not in (None, -1):  # -1 is how some tools write that there is none
                get_logger().warning("eos_token_id %r is no token id: it ends nothing", token)
    return tuple(ids)


# --- length -----------------------------------------------------------------------------------------------------------


def max_model_len(config: ModelConfig, wanted: int | None) -> tuple[int, str]:
    """The longest sequence to serve and the formula behind it; ``wanted`` None or -1 means the model's own length.

    With longrope the own length is the trained one, since beyond it every position is rotated by other factors.
    Raises `ModelError` HF021 if ``wanted`` is more than the model was made for.
    """
    if wanted is None or wanted == -1:
        trained = [
            int(layer.rope.params["original_max_position_embeddings"])
            for layer in config.layers
            if layer.rope is not None and layer.rope.kind == "longrope"
        ]
        if trained and trained[0] < config.max_len:
            return trained[0], (
                f"original_max_position_embeddings {trained[0]} of longrope; "
                f"--max-model-len takes up to {config.max_len} at another rotation"
            )
        return config.max_len, config.max_len_reason
    if wanted > config.max_len:
        raise ModelError(
            f"max_model_len is {wanted}, but the model was made for {config.max_len} = {config.max_len_reason}.",
            "Lower it, or extend the model with --hf-overrides (rope_parameters with a factor, "
            "max_position_embeddings).",
            id="HF021",
        )
    return wanted, f"asked for; the model was made for {config.max_len} = {config.max_len_reason}"
