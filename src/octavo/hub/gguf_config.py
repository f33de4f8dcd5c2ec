"""A ``config.json`` made from the metadata of a GGUF file, as Transformers would have written it for the same model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from octavo.errors import UnsupportedModel
from octavo.hub.gguf import GgufReader
from octavo.hub.pooling import GGUF_POOLING
from octavo.hub.sentencepiece_file import CONTROL

_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
# Entries that change the computation in a way that the classes above do not have, with the value that changes nothing.
_NEUTRAL = {
    "expert_count": 0,
    "logit_scale": 1,
    "embedding_scale": 1,
    "residual_scale": 1,
    "attention.scale": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
}
# Constants of gemma3 in llama.cpp: every sixth layer sees everything, the others rotate by a base of their own, and
# queries are scaled by the head's size except in the model of 62 layers (27B).
_GEMMA3_PERIOD, _GEMMA3_LOCAL_THETA, _GEMMA3_27B_LAYERS = 6, 10_000.0, 62
_NO_ROPE_INTERVAL = 4  # smollm3: every fourth layer; a constant of the architecture in llama.cpp
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TOKENS = frozenset({"<|eot_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"})
_PLAIN_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def config_from_gguf(reader: GgufReader) -> dict[str, Any]:
    """The config as a dict. ``dtype`` is left out for quantised files, which have no type to speak of.

    Raises `UnsupportedModel` for an architecture that is not known here and `ModelError` for one that lacks something.
    """
    arch = reader.architecture
    if arch not in _CLASSES:
        raise UnsupportedModel(
            f"{reader.path} has the GGUF architecture {arch!r}; supported: {', '.join(_CLASSES)}.",
            "Use the model's Hugging Face repository instead.",
        )
    for key, neutral in _NEUTRAL.items():
        value = reader.number(f"{arch}.{key}")
        if value is not None and value != neutral:
            raise UnsupportedModel(
                f"{reader.path} has {arch}.{key} = {value:g}, which is not supported for this architecture.",
                "Use the model's Hugging Face repository instead.",
            )
    model_type, architecture = _CLASSES[arch]
    window = reader.integer(f"{arch}.attention.sliding_window") if arch == "llama" else None
    if window:
        model_type, architecture = "mistral", "MistralForCausalLM"
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [architecture],
        **_sizes(reader, arch),
        "hidden_act": "silu",
        "rms_norm_eps": _rms_eps(reader, arch),
        "attention_bias": "blk.0.attn_q.bias" in reader.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in reader.tensors,
        "tie_word_embeddings": "output.weight" not in reader.tensors,
        "bos_token_id": reader.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_ids(reader) or None,
        "pad_token_id": reader.integer("tokenizer.ggml.padding_token_id"),
    }
    if (pooling := reader.integer(f"{arch}.pooling_type")) is not None:
        config[GGUF_POOLING] = pooling
    config["rope_parameters"] = _rope(reader, arch, config)
    if window:
        config["sliding_window"] = window
    if arch == "smollm3":
        layers = range(1, config["num_hidden_layers"] + 1)
        config["no_rope_layer_interval"] = _NO_ROPE_INTERVAL
        config["no_rope_layers"] = [int(layer % _NO_ROPE_INTERVAL != 0) for layer in layers]
    if arch == "gemma3":
        config |= _gemma3(reader, config)
    types = {t.format.name for t in reader.tensors.values() if len(t.shape) > 1}
    if types <= set(_PLAIN_DTYPES):
        config["dtype"] = next(dtype for name, dtype in _PLAIN_DTYPES.items() if name in types)
    return config


def end_ids(reader: GgufReader) -> list[int]:
    """Tokens that end a generation, the declared end of sequence first.

    Besides the ids that the metadata names, these are the control tokens that end a turn or a document in the common
    chat formats: a file has no ``generation_config.json`` that would list them.
    """
    declared = [reader.integer(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    tokens = reader.strings("tokenizer.ggml.tokens") or []
    types = reader.metadata.get("tokenizer.ggml.token_type")
    by_name = []
    if isinstance(types, np.ndarray) and len(types) == len(tokens):
        by_name = [int(i) for i in np.flatnonzero(types == CONTROL) if tokens[i] in _END_TOKENS]
    return list(dict.fromkeys(i for i in (*declared, *by_name) if i is not None and 0 <= i < len(tokens)))


def _sizes(reader: GgufReader, arch: str) -> dict[str, Any]:
    """The dimensions, checked against the tensors, so that no allocation follows a number that is only claimed."""
    layers = _required(reader, f"{arch}.block_count")
    hidden = _required(reader, f"{arch}.embedding_length")
    heads = _required(reader, f"{arch}.attention.head_count")
    kv_heads = reader.integer(f"{arch}.attention.head_count_kv") or heads
    head_dim = reader.integer(f"{arch}.attention.key_length") or hidden // heads
    inner = _required(reader, f"{arch}.feed_forward_length")
    vocab = _shape(reader, "token_embd.weight")[0]
    expected = {
        "token_embd.weight": (vocab, hidden),
        "blk.0.attn_q.weight": (heads * head_dim, hidden),
        "blk.0.attn_k.weight": (kv_heads * head_dim, hidden),
        "blk.0.attn_v.weight": (kv_heads * head_dim, hidden),
        "blk.0.ffn_up.weight": (inner, hidden),
    }
    for name, shape in expected.items():
        if _shape(reader, name) != shape:
            reader.fail(f"{name} has shape {_shape(reader, name)}, but the metadata makes it {shape}")
    _shape(reader, f"blk.{layers - 1}.attn_q.weight")
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _required(reader, f"{arch}.context_length"),
    }


def _required(reader: GgufReader, key: str) -> int:
    value = reader.integer(key)
    if value is None or not 0 < value < 2**31:
        reader.fail(f"metadata entry {key} is {'missing' if value is None else value}")
    return value


def _shape(reader: GgufReader, name: str) -> tuple[int, ...]:
    if name not in reader.tensors:
        reader.fail(f"tensor {name} is missing")
    return reader.tensors[name].shape


def _rms_eps(reader: GgufReader, arch: str) -> float:
    """The epsilon, rid of the float32 rounding of a short decimal (9.99999974e-06 is 1e-05)."""
    key = f"{arch}.attention.layer_norm_rms_epsilon"
    eps = reader.number(key)
    if eps is None or not 0 < eps < 1:
        reader.fail(f"metadata entry {key} is {'missing' if eps is None else eps}")
    short = float(f"{eps:.6g}")
    return short if np.float32(short) == np.float32(eps) else eps


def _rope(reader: GgufReader, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    theta = reader.number(f"{arch}.rope.freq_base") or 10_000.0
    rotated = reader.integer(f"{arch}.rope.dimension_count") or config["head_dim"]
    if not (math.isfinite(theta) and theta > 0 and 0 < rotated <= config["head_dim"] and rotated % 2 == 0):
        reader.fail(f"RoPE has base {theta} and {rotated} dimensions of {config['head_dim']}")
    common: dict[str, Any] = {"rope_theta": theta}
    if rotated != config["head_dim"]:
        common["partial_rotary_factor"] = rotated / config["head_dim"]
    scaling = _scaling(reader, arch, config["max_position_embeddings"])
    if "rope_freqs.weight" in reader.tensors:
        if scaling["rope_type"] != "default":
            raise UnsupportedModel(
                f"{reader.path} scales RoPE both by {scaling['rope_type']} and by rope_freqs.weight."
            )
        factors = reader.tensors["rope_freqs.weight"].read()
        scaling = _explicit_factors(reader, arch, factors, theta, rotated, config["max_position_embeddings"])
    return {**common, **scaling}


def _gemma3(reader: GgufReader, config: dict[str, Any]) -> dict[str, Any]:
    """What the config of Gemma 3 has beyond that of Llama; ``rope_parameters`` becomes that of the global layers."""
    period = reader.integer("gemma3.attention.sliding_window_pattern") or _GEMMA3_PERIOD
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    local = reader.number("gemma3.rope.freq_base_swa") or _GEMMA3_LOCAL_THETA
    return {
        "hidden_act": None,  # its name in these configs is the next one
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": _required(reader, "gemma3.attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)],
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == _GEMMA3_27B_LAYERS else config["head_dim"],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _scaling(reader: GgufReader, arch: str, context: int) -> dict[str, Any]:
    """RoPE scaling that the metadata names. llama.cpp multiplies yarn's usual attention factor by ``attn_factor``."""
    prefix = f"{arch}.rope.scaling"
    kind = reader.text(f"{prefix}.type") or "none"
    factor = reader.number(f"{prefix}.factor") or reader.number(f"{arch}.rope.scale_linear")
    if kind == "none" and factor is not None and reader.text(f"{prefix}.type") is None:
        kind = "linear"  # as llama.cpp takes files from before the entry existed
    if kind == "none" or factor is None or factor == 1.0:
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn") or not (math.isfinite(factor) and factor > 0):
        raise UnsupportedModel(f"{reader.path} scales RoPE by type {kind!r} and factor {factor}; known: linear, yarn.")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = reader.integer(f"{prefix}.original_context_length") or context
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    attention = reader.number(f"{prefix}.attn_factor") or reader.number(f"{prefix}.yarn_attn_factor")
    if attention is not None:
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    for key in ("beta_fast", "beta_slow"):
        if (beta := reader.number(f"{prefix}.yarn_{key}")) is not None:
            found[key] = beta
    return found


def _explicit_factors(
    reader: GgufReader, arch: str, factors: np.ndarray[Any, Any], theta: float, rotated: int, context: int
) -> dict[str, Any]:
    """``rope_freqs.weight``: a divisor for each frequency, which is how llama.cpp stores Llama 3's scaling.

    Emitted as ``llama3`` if the published parameters of that scaling reproduce it, otherwise as ``longrope`` with one
    list for all lengths and no attention factor, which is the same division.
    """
    if factors.shape != (rotated // 2,) or not np.all(np.isfinite(factors) & (factors > 0)):
        reader.fail(f"rope_freqs.weight has shape {factors.shape} or values that are not positive")
    if np.all(factors == 1.0):
        return {"rope_type": "default"}
    original = reader.integer(f"{arch}.rope.scaling.original_context_length") or 8192
    llama3 = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    if np.allclose(_llama3_factors(theta, rotated, llama3["factor"], 1.0, 4.0, original), factors, rtol=1e-5, atol=0):
        return llama3
    values = [float(f) for f in factors]
    return {
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _llama3_factors(theta: float, dim: int, factor: Any, low: float, high: float, original: int) -> Any:
    """Divisors [dim / 2] of Llama 3's scaling: 1 for short wavelengths, ``factor`` for long ones, a blend between."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
