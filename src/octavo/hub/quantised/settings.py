"""The quantisation that a config states, in one shape, and whether it can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeGuard

from octavo.errors import ConfigError, UnsupportedModel

Hf = Mapping[str, Any]
Settings = Mapping[str, Any]  # what ``quantization_config`` says

FILES: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Where tools wrote it before they wrote config.json, and the method that such a file is of."""

METHODS: Final = (
    *("awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4"),
)  # fmt: skip

ALIASES: Final = {
    "auto_awq": "awq",
    "auto_gptq": "gptq",
    "awq_marlin": "awq",
    "compressed_tensors": "compressed-tensors",
    "gpt_oss_mxfp4": "mxfp4",
    "gptq_marlin": "gptq",
    "modelopt_fp4": "modelopt",
}

# What Transformers 5.23 has beside these; most of it can write a model out in plain floats.
_OF_TRANSFORMERS: Final = frozenset(
    (
        *("aqlm", "auto-round", "bitnet", "eetq", "fouroversix", "fp_quant", "gemma", "higgs", "hqq", "metal"),
        *("mxfp8", "nvfp4", "quanto", "quark", "sinq", "spqr", "torchao", "vptq"),
    )
)
_COMPRESSED: Final = (
    *("dense", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized", "pack-quantized"),
)  # fmt: skip
_MODELOPT: Final = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4")


def stated(hf: Hf, file: tuple[str, Hf] | None = None) -> dict[str, Any] | None:
    """The settings for ``quantization_config``, with ``quant_method`` under the name that it has here.

    They are in the config, under this name or an older one, at its top or in its text part, or in a ``file`` of their
    own: its name, of `FILES`, and content. None for a model that is not quantised.
    """
    for part in (hf, as_dict(hf.get("text_config"))):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), Mapping) and part[key]:
                return _named(part[key], "")
    return None if file is None else _named(file[1], FILES[file[0]])


def _named(settings: Settings, default: str) -> dict[str, Any]:
    inner = settings.get("quantization")  # of ModelOpt's own file
    if isinstance(inner, Mapping):
        settings = {**settings, **inner}
    method = str(settings.get("quant_method") or default).lower()
    if not method and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "auto-round":  # a packing of GPTQ or AWQ under another name
        packing = str(settings.get("packing_format"))
        method = next((name for name in ("gptq", "awq") if packing.endswith(name)), method)
    return {**settings, "quant_method": ALIASES.get(method, method)}


def as_dict(value: object) -> Mapping[str, Any]:
    """``value`` of a config, nothing if it is not the object that it should be."""
    return value if isinstance(value, Mapping) else {}


def are_sizes(value: object, count: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == count and all(type(n) is int and n > 0 for n in value)


def check(hf: Hf) -> None:
    """Raises `UnsupportedModel` HF050 if the normalised config ``hf`` states what cannot be read."""
    settings = hf.get("quantization_config")
    if not settings:
        return
    settings = as_dict(settings)
    method = str(settings.get("quant_method") or "")
    if method not in METHODS:
        other = "Transformers can" if method in _OF_TRANSFORMERS else "The tool that made it may"
        raise UnsupportedModel(
            f"The weights are quantised by {method or 'an unnamed method'} (quantization_config of config.json); those"
            f" of {', '.join(METHODS)} and GGUF files can be read.",
            f"{other} write it in plain floats: load it there with dequantize=True and save it. Or take another"
            " variant of the model.",
            id="HF050",
        )
    odd = _odd(method, settings)
    if odd:
        raise UnsupportedModel(
            f"The weights are quantised by {method}, {odd}.", "Take another variant of the model.", id="HF050"
        )


def _odd(method: str, settings: Settings) -> str | None:
    """What of ``method`` is not read here."""
    if method == "compressed-tensors":
        groups = as_dict(settings.get("config_groups")).values()
        formats = [settings.get("format"), *(as_dict(group).get("format") for group in groups)]
        others = sorted(str(name) for name in formats if name not in (None, "mixed-precision", *_COMPRESSED))
        sparsity = as_dict(settings.get("sparsity_config"))
        if others:
            return f"in format {others[0]}; {', '.join(_COMPRESSED)} can be read"
        if sparsity.get("format") not in (None, "dense"):
            return f"and compressed as {sparsity['format']}, which cannot be read"
        if settings.get("transform_config"):
            return "with transforms of activations (transform_config), which are not computed here"
    packing = "marlin" if settings.get("is_marlin_format") else settings.get("checkpoint_format")
    if method == "gptq" and packing not in (None, "gptq", "gptq_v2"):
        return f"packed for {packing}; gptq and gptq_v2 can be read"
    algorithm = settings.get("quant_algo")
    if method == "modelopt" and algorithm not in _MODELOPT:
        return f"algorithm {algorithm}; {', '.join(_MODELOPT)} can be read"
    return None


def check_wanted(wanted: str | None, hf: Hf) -> None:
    """Raises `ConfigError` if ``wanted``, of ``--quantization``, is a method of checkpoints, and not this one's."""
    wanted = ALIASES.get(wanted or "", wanted)
    if wanted not in METHODS:
        return
    own = as_dict(hf.get("quantization_config")).get("quant_method")
    if own != wanted:
        said = f"quantised by {own}" if own else "not quantised"
        raise ConfigError(
            f"quantization is {wanted}, but the checkpoint is {said}.",
            "Leave --quantization out: a checkpoint says itself what it is.",
        )
