"""Rotary position embeddings: one table of cosines and sines for each distinct `RopeSpec` of a model.

The frequencies are Transformers' (``modeling_rope_utils``), with one difference: a table depends on the spec and on the
engine's longest sequence alone, never on the lengths of the requests that happen to run. Keys in the cache were rotated
by this table and must stay comparable. So "dynamic" is frozen at the longest sequence, and "longrope" takes its long
factors exactly when that is above the original length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from octavo.config import LayerSpec, RopeSpec
from octavo.errors import ModelError
from octavo.layers.base import Layer


class Rotary(Layer):
    """The table ``cos_sin`` by which the first ``spec.dim`` dimensions of each head are rotated, half-split, for
    positions below ``max_len``; see `reference.rotary`."""

    cos_sin: torch.Tensor

    def __init__(self, spec: RopeSpec, max_len: int) -> None:
        super().__init__()
        self.spec = spec
        self.max_len = max_len
        self._frequencies = frequencies(spec, max_len)  # now, so that a bad spec fails before any weight is read
        self.register_buffer("cos_sin", torch.empty(max_len, spec.dim, device="meta"), persistent=False)

    def materialise(self, device: torch.device) -> None:
        """The table ``[max_len, dim]``, float32: dim / 2 cosines, then as many sines, of each position."""
        inverse, factor = self._frequencies
        angles = torch.arange(self.max_len, device=device, dtype=torch.float32).unsqueeze(1) * inverse.to(device)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(factor)


def shared_rotaries(layers: Iterable[LayerSpec], max_len: int) -> list[Rotary | None]:
    """The rotary embedding of each layer, one object for equal specs; None where a layer rotates nothing."""
    distinct: list[Rotary] = []
    result: list[Rotary | None] = []
    for layer in layers:
        if layer.rope is None:
            result.append(None)
            continue
        found = next((rotary for rotary in distinct if rotary.spec == layer.rope), None)
        if found is None:
            found = Rotary(layer.rope, max_len)
            distinct.append(found)
        result.append(found)
    return result


Frequencies = tuple[torch.Tensor, float]
"""Inverse frequencies ``[dim / 2]`` in float32, and the factor on cosine and sine."""


def frequencies(spec: RopeSpec, max_len: int) -> Frequencies:
    """The frequencies of ``spec`` for sequences of up to ``max_len`` tokens.

    Raises `ModelError` HF020 for a missing or malformed parameter.
    """
    if spec.dim < 2 or spec.dim % 2:
        raise ModelError(
            f"RoPE would rotate {spec.dim} dimensions of a head, which is not a positive even number.",
            "Correct head_dim or partial_rotary_factor in config.json.",
            id="HF020",
        )
    if not 1 < spec.theta < math.inf:
        raise ModelError(f"rope_theta is {spec.theta!r}, not above 1.", "Correct it in config.json.", id="HF020")
    with torch.device("cpu"):  # whatever device a caller has made the default one
        return _KINDS[spec.kind](spec, max_len)


def _default(spec: RopeSpec, max_len: int) -> Frequencies:
    return _inverse(spec, spec.theta), 1.0


def _linear(spec: RopeSpec, max_len: int) -> Frequencies:
    return _inverse(spec, spec.theta) / _number(spec, "factor"), 1.0


def _dynamic(spec: RopeSpec, max_len: int) -> Frequencies:
    """NTK scaling of the base for the longest sequence; without effect up to the trained length."""
    if spec.dim == 2:
        return _inverse(spec, spec.theta), 1.0
    factor = _number(spec, "factor")
    stretch = factor * max(max_len, spec.max_position) / spec.max_position - (factor - 1)
    return _inverse(spec, spec.theta * stretch ** (spec.dim / (spec.dim - 2))), 1.0


def _llama3(spec: RopeSpec, max_len: int) -> Frequencies:
    """Long wavelengths are divided by the factor, short ones kept, those between are blended."""
    factor, original = _number(spec, "factor"), _number(spec, "original_max_position_embeddings")
    low, high = _number(spec, "low_freq_factor"), _number(spec, "high_freq_factor")
    inverse = _inverse(spec, spec.theta)
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, blended)
    return torch.where(wavelength < original / high, inverse, scaled), 1.0


def _yarn(spec: RopeSpec, max_len: int) -> Frequencies:
    """Fast frequencies, by their turns within the original length, are kept, slow ones divided; a ramp lies between."""
    original = _number(spec, "original_max_position_embeddings")
    factor = _factor(spec, original)
    low = _turns_dim(spec, _number(spec, "beta_fast", 32), original)
    high = _turns_dim(spec, _number(spec, "beta_slow", 1), original)
    if spec.params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inverse = _inverse(spec, spec.theta)
    return inverse / factor * ramp + inverse * (1 - ramp), _yarn_attention_factor(spec, factor)


def _turns_dim(spec: RopeSpec, turns: float, original: float) -> float:
    """The (fractional) index of the frequency that makes ``turns`` turns within ``original`` positions."""
    return spec.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))


def _yarn_attention_factor(spec: RopeSpec, factor: float) -> float:
    if spec.params.get("attention_factor") is not None:
        return _number(spec, "attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if spec.params.get("mscale") and spec.params.get("mscale_all_dim"):
        return mscale(_number(spec, "mscale")) / mscale(_number(spec, "mscale_all_dim"))
    return mscale(1.0)


def _longrope(spec: RopeSpec, max_len: int) -> Frequencies:
    """One divisor for each frequency: the long list if sequences may pass the original length, else the short one."""
    original = _number(spec, "original_max_position_embeddings")
    name = "long_factor" if max_len > original else "short_factor"
    divisors = spec.params.get(name)
    if not isinstance(divisors, (list, tuple)) or len(divisors) != spec.dim // 2:
        raise _malformed(spec, name, divisors, f"a list of {spec.dim // 2} numbers")
    factor = _factor(spec, original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention = _number(spec, "attention_factor", attention)
    return _inverse(spec, spec.theta) / torch.tensor(divisors, dtype=torch.float32), attention


_KINDS: dict[str, Callable[[RopeSpec, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _inverse(spec: RopeSpec, theta: float) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)


def _factor(spec: RopeSpec, original: float) -> float:
    """The extension factor, which yarn and longrope may leave to be derived from the two lengths."""
    if spec.params.get("factor") is None:
        return spec.max_position / original
    return _number(spec, "factor")


def _number(spec: RopeSpec, key: str, default: float | None = None) -> float:
    value = spec.params.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or math.isinf(value):
        raise _malformed(spec, key, value, "a positive number")
    return float(value)


def _malformed(spec: RopeSpec, key: str, value: Any, wanted: str) -> ModelError:
    shown = "missing" if value is None else repr(value)[:80]
    return ModelError(
        f"RoPE type {spec.kind!r} needs {key!r}, {wanted}; it is {shown}.",
        "Correct rope_parameters in config.json, or pass them with --hf-overrides.",
        id="HF020",
    )
