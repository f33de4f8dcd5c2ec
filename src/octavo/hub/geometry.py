"""Sizes, layers and lengths out of a normalised config: what is the same whatever the engine does with it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final, get_args, get_type_hints

from octavo.config import LayerSpec, RopeSpec
from octavo.hub.patches import Hf, bad_value, is_positive, rope_error
from octavo.log import get_logger

# What different families call the same number; the first one present counts.
_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "emb_dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "num_key_value_heads": (
        "n_head_kv",
        "num_kv_heads",
        "num_key_value_heads",
        "multi_query_group_num",
        "num_attention_groups",
    ),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    "hidden_act": ("hidden_act", "hidden_activation", "activation_function"),
}
LENGTHS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
DEFAULT_MAX_LEN: Final = 2048  # of a config that names no length at all
MAX_SIZE: Final = 1 << 31  # no size in a config can be larger: they become dimensions of tensors
MAX_LAYERS: Final = 4096

# Without layer_types: all layers use the window, or those from max_window_layers on (checked in Transformers 5.23).
_WINDOW_EVERYWHERE: Final = frozenset(
    ["doge", "minimax", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2"]
)
_WINDOW_ABOVE: Final = frozenset(("qwen2", "qwen2_moe", "qwen3"))


def text_config(hf: Hf) -> Hf:
    """The language part: ``text_config`` over the top level where a config has one, else ``hf`` itself."""
    inner = hf.get("text_config")
    return {**hf, **inner} if isinstance(inner, dict) else hf


def layer_specs(text: Hf) -> tuple[LayerSpec, ...]:
    """The attention of every decoder layer; raises `ModelError` HF002 for sizes and HF020 for RoPE settings."""
    count = size(text, "num_hidden_layers", limit=MAX_LAYERS)
    heads = size(text, "num_attention_heads")
    kv_heads = size(text, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise bad_value("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, which is {heads}")
    head_dim = _head_dim(text, heads)
    kinds = _layer_kinds(text, count)
    rotated = _rotated(text, count)
    window, softcap = _window(text), text.get("attn_logit_softcapping") or None
    if softcap is not None and not is_positive(softcap):
        raise bad_value("attn_logit_softcapping", softcap, "a number above 0")
    ropes = {kind: _rope(text, kind, head_dim) for kind in set(kinds)}
    return tuple(
        LayerSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=window if kinds[i] == "sliding_attention" else None,
            softcap=softcap,
            rope=ropes[kinds[i]] if rotated[i] else None,
        )
        for i in range(count)
    )


def _head_dim(text: Hf, heads: int) -> int:
    for key in ("head_dim", "hidden_size_per_head"):
        if text.get(key):
            return size(text, key)
    hidden = size(text, "hidden_size")
    if hidden % heads:
        wanted = f"a multiple of num_attention_heads ({heads}), or head_dim has to be given"
        raise bad_value("hidden_size", hidden, wanted)
    return hidden // heads


def _window(text: Hf) -> int | None:
    """The sliding window of those layers that have one; 0 and ``use_sliding_window: false`` mean none."""
    if text.get("use_sliding_window") is False or not text.get("sliding_window"):
        return None
    return size(text, "sliding_window")


def _layer_kinds(text: Hf, count: int) -> list[str]:
    kinds = text.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != count or not all(isinstance(kind, str) for kind in kinds):
            raise bad_value("layer_types", kinds, f"a list of {count} names")
        return kinds
    model_type, first = text.get("model_type"), count
    if _window(text) is not None:
        if model_type == "smollm3":
            return ["full_attention" if has else "sliding_attention" for has in _rotated(text, count)]
        if model_type in _WINDOW_EVERYWHERE:
            first = 0
        elif model_type in _WINDOW_ABOVE:
            first = size(text, "max_window_layers", 28, least=0)
    return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]


def _rotated(text: Hf, count: int) -> list[bool]:
    """Which layers rotate: SmolLM3's ``no_rope_layers`` has a 1 for those that do, in spite of its name."""
    flags, interval = text.get("no_rope_layers"), text.get("no_rope_layer_interval")
    if flags is not None and (not isinstance(flags, list) or len(flags) < count):
        raise bad_value("no_rope_layers", flags, f"a list of at least {count} flags")
    if flags is not None:
        return [bool(flag) for flag in flags[:count]]
    if interval:
        every = size(text, "no_rope_layer_interval")
        return [(i + 1) % every != 0 for i in range(count)]
    return [True] * count


def _rope(text: Hf, kind: str, head_dim: int) -> RopeSpec | None:
    rope = text.get("rope_parameters")
    if rope and "rope_type" not in rope:
        rope = rope.get(kind)  # nested by layer type
    if not rope:
        return None
    kinds = get_args(get_type_hints(RopeSpec)["kind"])
    if rope["rope_type"] not in kinds:
        raise rope_error(f"{kind} layers", f"rope_type is {rope['rope_type']!r}", f"Known are {', '.join(kinds)}.")
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if dim % 2:
        what = f"{dim} of {head_dim} dimensions are rotated, an odd number"
        raise rope_error(f"{kind} layers", what, "Correct partial_rotary_factor or head_dim.")
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        known = isinstance(factors, list) and len(factors) == dim // 2 and all(map(is_positive, factors))
        if rope["rope_type"] == "longrope" and not known:
            what = f"{key} is not a list of {dim // 2} numbers above 0, one for each pair of dimensions"
            raise rope_error(f"{kind} layers", what)
    return RopeSpec(
        kind=rope["rope_type"],
        theta=float(rope["rope_theta"]),
        dim=dim,
        max_position=size(text, "max_position_embeddings", _base_len(text)[0]),
        params=rope,
    )


def _base_len(text: Hf) -> tuple[int, str]:
    """The unscaled length, and which key it is from."""
    own = text.get("model_max_length")
    if own:
        return size(text, "model_max_length"), "model_max_length"
    present = {key: size(text, key) for key in LENGTHS if text.get(key) is not None}
    if not present:
        return DEFAULT_MAX_LEN, "a guess, as the config names no length"
    key = min(present, key=lambda name: present[name])
    return present[key], key


_AFTER_PADDING: Final = frozenset(
    ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
)  # they number positions from pad_token_id + 1 on, in a table of max_position_embeddings rows


def own_length(text: Hf, layers: tuple[LayerSpec, ...]) -> tuple[int, str]:
    """The length that the model was made for, with its formula in words and numbers.

    Linear and dynamic scaling stretch the length in the file by their factor; yarn, longrope and llama3 files state the
    stretched length. A yarn dict beside the trained length was added by hand, so there the factor counts.
    """
    base, key = _base_len(text)
    if key.startswith("a guess"):
        get_logger().warning("max length %d is %s; set --max-model-len", base, key)
    if "gemma3" in str(text.get("model_type")):
        return base, f"{key} {base}"
    if text.get("model_type") in _AFTER_PADDING:
        missing = 0 if "pad_token_id" in text else 1  # null counts as 0
        first = size(text, "pad_token_id", missing, least=0) + 1
        return max(base - first, 1), f"{key} {base} - {first}, as positions begin after the padding id"
    for rope in (layer.rope for layer in layers if layer.rope is not None):
        factor = rope.params.get("factor")
        unstretched = rope.kind == "yarn" and rope.params["original_max_position_embeddings"] == base
        if factor and (rope.kind in ("linear", "dynamic") or unstretched):
            if not 1 <= base * factor <= MAX_SIZE:
                what = f"factor {factor:g} makes a length outside [1, {MAX_SIZE}] of {key} {base}"
                raise rope_error("all layers", what)
            return int(base * factor), f"{key} {base} x {rope.kind} factor {factor:g}"
    return base, f"{key} {base}"


def lookup(text: Hf, name: str) -> Any:
    """The value of ``name`` under the first of its spellings that ``text`` has, else None."""
    return next((text[key] for key in _NAMES.get(name, (name,)) if text.get(key) is not None), None)


def size(text: Hf, name: str, default: int | None = None, *, limit: int = MAX_SIZE, least: int = 1) -> int:
    """A whole number out of the config; raises `ModelError` HF002 if it is missing, of another kind or out of range."""
    found = lookup(text, name)
    if found is None and default is not None:
        return default
    if isinstance(found, float) and found.is_integer():
        found = int(found)  # 1e6 is a float in JSON
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= limit:
        raise bad_value(name, found, f"a whole number from {least} to {limit}")
    return found


def number(text: Hf, name: str, default: float) -> float:
    """A number from 0 on out of the config; raises `ModelError` HF002 if it is of another kind."""
    found = lookup(text, name)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found <= sys.float_info.max:
        raise bad_value(name, found, "a number from 0 on that a float can hold")
    return float(found)
