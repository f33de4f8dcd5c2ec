"""How the tensors of each method of quantisation make weights.

A method looks at the names in the headers, not at the lists of modules in the config: what it finds is quantised, and
what it leaves over must be a weight of the model, which the loader checks. Layouts are those of the tools that write
them: AutoGPTQ and GPTQModel, AutoAWQ, compressed-tensors, bitsandbytes, ModelOpt, and Transformers for fp8 and mxfp4.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

import numpy as np

from octavo.errors import ModelError
from octavo.hub.checkpoint import Checkpoint
from octavo.hub.gguf_quants import Bytes, Floats
from octavo.hub.quantised.settings import as_dict
from octavo.hub.quantised.stored import (
    WORD,
    four_bits,
    matrix,
    misfit,
    packed,
    shape,
    sizes,
    transposed,
    uniform,
    values,
)
from octavo.hub.quantised.weights import BLOCK, Experts, Grouped, Listed, Numbers, Part, Scaled, Weight

Settings = Mapping[str, Any]

MAX_STATE: Final = 1 << 16  # bytes of bitsandbytes' description of a weight
_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # of the columns of a word, which is written in the order 0 2 4 6 1 3 5 7


@dataclass
class Found:
    """Weights by the name that the model has for them, and the tensors that they are made of or that are not needed."""

    weights: dict[str, Weight] = field(default_factory=dict)
    spent: set[str] = field(default_factory=set)


Method = Callable[[Checkpoint, Settings], Found]


def _stems(checkpoint: Checkpoint, leaf: str) -> list[str]:
    return [name.removesuffix(leaf) for name in checkpoint.tensors() if name.endswith(leaf)]


def _bits(settings: Settings, *keys: str, of: tuple[int, ...]) -> int:
    found = next((settings[key] for key in keys if settings.get(key) is not None), None)
    if not isinstance(found, int) or found not in of:
        raise ModelError(
            f"The weights have {found} bits ({keys[0]} of quantization_config); {', '.join(map(str, of))} can be read.",
            "Take another variant of the model.",
            id="HF050",
        )
    return found


def gptq(checkpoint: Checkpoint, settings: Settings) -> Found:
    """``qweight[in / per word, out]``, ``qzeros[groups, out / per word]``, ``scales[groups, out]``, ``g_idx[in]``."""
    bits, found = _bits(settings, "bits", of=(4, 8, 2)), Found()
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1  # the first version stores zeros less one
    for stem in _stems(checkpoint, ".qweight"):
        rows, out = sizes(checkpoint, f"{stem}.qweight", 2)
        size, count = rows * WORD // bits, sizes(checkpoint, f"{stem}.scales", 2)[0]
        _check_groups(checkpoint, f"{stem}.scales", (count, out), size, count)
        stored = uniform(checkpoint, f"{stem}.qzeros")
        one = None if stored is None else _same_in_word(stored, bits)
        zeros = transposed(packed(checkpoint, f"{stem}.qzeros", bits, 1))
        found.weights[f"{stem}.weight"] = Grouped(
            (out, size),
            bits,
            size // count,
            transposed(packed(checkpoint, f"{stem}.qweight", bits, 0)),
            transposed(matrix(checkpoint, f"{stem}.scales")),
            _plus(zeros, less) if one is None else one + less,
            _order(checkpoint, f"{stem}.g_idx", size // count),
        )
        found.spent |= {f"{stem}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    return found


def awq(checkpoint: Checkpoint, settings: Settings) -> Found:
    """``qweight[in, out / 8]``, ``qzeros[groups, out / 8]``, ``scales[groups, out]``."""
    bits, found = _bits(settings, "bits", "w_bit", of=(4,)), Found()
    if str(settings.get("version", "gemm")).lower() != "gemm":
        raise ModelError(
            f"The weights are packed for AWQ's {settings['version']!r} kernels; 'gemm' can be read.",
            "Take another variant of the model.",
            id="HF050",
        )
    for stem in _stems(checkpoint, ".qweight"):
        size, words = sizes(checkpoint, f"{stem}.qweight", 2)
        out, count = words * WORD // bits, sizes(checkpoint, f"{stem}.scales", 2)[0]
        _check_groups(checkpoint, f"{stem}.scales", (count, out), size, count)
        found.weights[f"{stem}.weight"] = Grouped(
            (out, size),
            bits,
            size // count,
            transposed(packed(checkpoint, f"{stem}.qweight", bits, 1, _AWQ_PLACES)),
            transposed(matrix(checkpoint, f"{stem}.scales")),
            transposed(packed(checkpoint, f"{stem}.qzeros", bits, 1, _AWQ_PLACES)),
        )
        found.spent |= {f"{stem}.{leaf}" for leaf in ("qweight", "qzeros", "scales")}
    return found


def _check_groups(checkpoint: Checkpoint, name: str, needed: tuple[int, ...], size: int, groups: int) -> None:
    if shape(checkpoint, name) != needed or not groups or size % groups:
        raise misfit(
            name, shape(checkpoint, name), f"{list(needed)}, of groups that divide {size} inputs, were expected"
        )


def _same_in_word(word: int, bits: int) -> int | None:
    """The number that fills all places of ``word``."""
    numbers = {word >> place & (1 << bits) - 1 for place in range(0, WORD, bits)}
    return numbers.pop() if len(numbers) == 1 else None


def _plus(part: Part, more: int) -> Part:
    return lambda rows, columns: part(rows, columns) + np.uint8(more) if more else part(rows, columns)


def _order(checkpoint: Checkpoint, name: str, group: int) -> Numbers | None:
    """The group of each input where that is not ``input // group``."""
    if name not in checkpoint.tensors():
        return None
    order = checkpoint.read(name).data
    plain = not order.any() or bool((order < 0).any()) or bool((order == np.arange(len(order)) // group).all())
    return None if plain else order.astype(np.int64)


def fp8(checkpoint: Checkpoint, settings: Settings) -> Found:
    """``weight`` in 8-bit floats with ``weight_scale_inv`` or ``weight_scale``: of the matrix, its rows or its tiles.

    Scales of activations (``input_scale``) and of the KV cache are not needed: activations are not rounded.
    """
    found = Found()
    for name, info in checkpoint.tensors().items():
        stem = name.removesuffix(".weight")
        if info.dtype in ("float8_e4m3fn", "float8_e5m2") and len(info.shape) == 2 and stem != name:
            scale = next(
                (s for s in (f"{stem}.weight_scale_inv", f"{stem}.weight_scale") if s in checkpoint.tensors()), None
            )
            if scale is None:
                shape(checkpoint, f"{stem}.weight_scale")  # which says that it is missing
            else:
                high, wide = info.shape
                tile = _tile(checkpoint, scale, (high, wide), settings)
                found.weights[name] = Scaled((high, wide), matrix(checkpoint, name), matrix(checkpoint, scale), tile)
                found.spent |= {scale}
    return found


def _tile(checkpoint: Checkpoint, scale: str, size: tuple[int, int], settings: Settings) -> tuple[int, int]:
    """What one scale is for; the config says it where the last tile of a row or a column may be cut."""
    scales = (*shape(checkpoint, scale), 1, 1)[:2]
    if scales == (1, 1):
        return size
    if scales == (size[0], 1):
        return 1, size[1]
    blocks = settings.get("weight_block_size") or settings.get("block_structure")
    if not _are_sizes(blocks, 2):
        blocks = [-(-n // max(1, count)) for n, count in zip(size, scales, strict=True)]
    if scales != tuple(-(-n // block) for n, block in zip(size, blocks, strict=True)):
        raise misfit(scale, shape(checkpoint, scale), f"tiles of {blocks} of a weight {list(size)} need other scales")
    return blocks[0], blocks[1]


def compressed(checkpoint: Checkpoint, settings: Settings) -> Found:
    """compressed-tensors: integers in words (``weight_packed``), int8, 8-bit floats, NVFP4, all with scales."""
    found = fp8(checkpoint, settings)
    for stem in _stems(checkpoint, ".weight_packed"):
        name = f"{stem}.weight_packed"
        if checkpoint.tensors()[name].dtype == "uint8":
            found.weights[f"{stem}.weight"] = _nvfp4(checkpoint, name, stem, "weight_global_scale", divides=True)
        else:
            found.weights[f"{stem}.weight"] = _words(checkpoint, name, stem, settings)
        leaves = ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")
        found.spent |= {f"{stem}.weight_{leaf}" for leaf in leaves}
    for name, info in checkpoint.tensors().items():
        stem = name.removesuffix(".weight")
        if info.dtype == "int8" and len(info.shape) == 2 and f"{stem}.weight_scale" in checkpoint.tensors():
            high, wide = info.shape
            group = _columns(checkpoint, f"{stem}.weight_scale", (high, wide))
            zeros: Part | int = 0
            if f"{stem}.weight_zero_point" in checkpoint.tensors():
                zeros = _per_row(checkpoint, f"{stem}.weight_zero_point", high)
            scales = _per_row(checkpoint, f"{stem}.weight_scale", high)
            found.weights[name] = Grouped((high, wide), 8, group, matrix(checkpoint, name), scales, zeros)
            found.spent |= {f"{stem}.weight_{leaf}" for leaf in ("scale", "zero_point")}
    return found


def _words(checkpoint: Checkpoint, name: str, stem: str, settings: Settings) -> Grouped:
    """``weight_packed[out, in / per word]``, ``weight_scale[out, groups]``, ``weight_zero_point[out / per word, …]``.

    Numbers are stored with half of their range added; a zero point is, too.
    """
    out, words = sizes(checkpoint, name, 2)
    bits = _bits(_weights_of(settings), "num_bits", of=(4, 8))
    size = words * WORD // bits
    group = _columns(checkpoint, f"{stem}.weight_scale", (out, size))
    half = 1 << bits - 1
    zero = f"{stem}.weight_zero_point"
    zeros = packed(checkpoint, zero, bits, 0) if zero in checkpoint.tensors() else half
    scales = _per_row(checkpoint, f"{stem}.weight_scale", out)
    order = _order(checkpoint, f"{stem}.weight_g_idx", group)
    return Grouped((out, size), bits, group, packed(checkpoint, name, bits, 1), scales, zeros, order)


def _weights_of(settings: Settings) -> Settings:
    """The settings of weights; groups of layers that differ in them cannot be told apart by their tensors."""
    groups = as_dict(settings.get("config_groups")).values()
    said = [weights for group in groups if (weights := as_dict(as_dict(group).get("weights")))]
    if len({str(weights.get("num_bits")) for weights in said}) != 1:
        raise ModelError(
            "quantization_config has groups of layers with different numbers of bits, or none.",
            "Take another variant of the model.",
            id="HF050",
        )
    return said[0]


def _columns(checkpoint: Checkpoint, scale: str, size: tuple[int, int]) -> int:
    """How many inputs share a scale."""
    found = shape(checkpoint, scale)
    rows, groups = (*found, 1, 1)[:2]
    if rows not in (1, size[0]) or not groups or size[1] % groups:
        raise misfit(scale, found, f"a weight {list(size)} needs scales for its rows or for groups in them")
    return size[1] // groups


def _per_row(checkpoint: Checkpoint, name: str, rows: int) -> Part:
    part, own = matrix(checkpoint, name), (*shape(checkpoint, name), 1)[0]
    if own == rows:
        return part
    return lambda wanted, columns: np.repeat(part(slice(0, 1), columns), wanted.stop - wanted.start, axis=0)


def _nvfp4(checkpoint: Checkpoint, name: str, stem: str, last: str, *, divides: bool) -> Scaled:
    """E2M1 ``[out, in / 2]``, ``weight_scale[out, in / 16]`` in 8-bit floats, and one scale for all of them."""
    out, octets = sizes(checkpoint, name, 2)
    scales = f"{stem}.weight_scale"
    if shape(checkpoint, scales) != (out, octets // 8):
        raise misfit(scales, shape(checkpoint, scales), f"{[out, octets // 8]} was expected")
    factor, part = float(values(checkpoint.read(f"{stem}.{last}")).reshape(-1)[0]), matrix(checkpoint, scales)
    factor = 1 / factor if divides and factor else factor
    both: Part = lambda rows, columns: part(rows, columns) * np.float32(factor)  # noqa: E731
    return Scaled((out, 2 * octets), four_bits(checkpoint, name), both, (1, 16))


def modelopt(checkpoint: Checkpoint, settings: Settings) -> Found:
    """8-bit floats as `fp8`, or NVFP4 (``weight`` uint8, ``weight_scale``, ``weight_scale_2``)."""
    found = fp8(checkpoint, settings)
    for stem in _stems(checkpoint, ".weight_scale_2"):
        found.weights[f"{stem}.weight"] = _nvfp4(checkpoint, f"{stem}.weight", stem, "weight_scale_2", divides=False)
        found.spent |= {f"{stem}.{leaf}" for leaf in ("weight_scale", "weight_scale_2")}
    return found


def mxfp4(checkpoint: Checkpoint, settings: Settings) -> Found:
    """gpt-oss: ``…_blocks[E, out, groups, 16]`` and ``…_scales[E, out, groups]``, for ``…[E, in, out]``."""
    found = Found()
    for stem in _stems(checkpoint, "_blocks"):
        experts, out, groups, octets = sizes(checkpoint, f"{stem}_blocks", 4)
        if octets * 2 != BLOCK or shape(checkpoint, f"{stem}_scales") != (experts, out, groups):
            raise misfit(
                f"{stem}_scales", shape(checkpoint, f"{stem}_scales"), f"{[experts, out, groups]} was expected"
            )
        found.weights[stem] = Experts((experts, groups * BLOCK, out), _experts_of(checkpoint, stem))
        found.spent |= {f"{stem}_blocks", f"{stem}_scales"}
    return found


def _experts_of(checkpoint: Checkpoint, stem: str) -> Callable[[slice, slice], tuple[Bytes, Bytes]]:
    def stored(experts: slice, outputs: slice) -> tuple[Bytes, Bytes]:
        part = (experts, outputs)
        return checkpoint.read(f"{stem}_blocks", part).data, checkpoint.read(f"{stem}_scales", part).data

    return stored


_STATES: Final = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


def bitsandbytes(checkpoint: Checkpoint, settings: Settings) -> Found:
    """Four bits: ``weight``, ``.absmax``, ``.quant_map``, ``.quant_state``; eight: ``weight`` int8 and ``SCB[out]``."""
    found = Found()
    for leaf in _STATES:
        for name in _stems(checkpoint, leaf):
            found.weights[name] = _four(checkpoint, name, leaf)
            leaves = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", leaf)
            found.spent |= {f"{name}{each}" for each in leaves}
    for stem in _stems(checkpoint, ".SCB"):
        out, size = sizes(checkpoint, f"{stem}.weight", 2)
        greatest = matrix(checkpoint, f"{stem}.SCB")
        scales: Part = _over_127(greatest)
        found.weights[f"{stem}.weight"] = Grouped((out, size), 8, size, matrix(checkpoint, f"{stem}.weight"), scales, 0)
        found.spent |= {f"{stem}.SCB", f"{stem}.weight_format"}
    return found


def _over_127(greatest: Part) -> Part:
    return lambda rows, columns: greatest(rows, columns) / np.float32(127)


def _four(checkpoint: Checkpoint, name: str, leaf: str) -> Listed:
    state, size = _state(checkpoint, name + leaf), shape(checkpoint, name)
    count = 2 * int(np.prod(size))
    wanted, block = state.get("shape", [count, 1]), state.get("blocksize", 64)  # a header alone has neither
    fits = _are_sizes(wanted, 2) and _are_sizes([block, inner := state.get("nested_blocksize", 256)], 2)
    if not fits or block % 2 or not 0 <= count - int(np.prod(wanted)) <= 1:
        raise misfit(name, size, f"{leaf.rpartition('.')[2]} says shape {wanted} in blocks of {block}")
    octets = checkpoint.tensors()[name]

    def codes(first: int, last: int) -> Bytes:
        return checkpoint.read(name).data.reshape(-1)[first:last]

    def absmax(first: int, last: int) -> Floats:
        scales = values(checkpoint.read(f"{name}.absmax", (slice(first, last),)))
        if f"{name}.nested_absmax" not in checkpoint.tensors():
            return np.asarray(scales, np.float32)
        outer = values(checkpoint.read(f"{name}.nested_absmax"))
        listed = values(checkpoint.read(f"{name}.nested_quant_map"))
        own = listed[scales] * outer[np.arange(first, last) // inner] + np.float32(state.get("nested_offset") or 0)
        return np.asarray(own, np.float32)

    listed = np.asarray(values(checkpoint.read(f"{name}.quant_map")), np.float32)
    if octets.dtype not in ("uint8", "int8") or listed.shape != (16,):
        raise misfit(name, size, f"bytes and 16 values were expected, not {octets.dtype} and {listed.shape}")
    return Listed((wanted[0], wanted[1]), codes, listed, absmax, block)


def _are_sizes(value: object, count: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == count and all(type(n) is int and n > 0 for n in value)


def _state(checkpoint: Checkpoint, name: str) -> Settings:
    octets = checkpoint.read(name).data.astype(np.uint8).tobytes()[:MAX_STATE]
    if not octets.strip(b"\0"):  # the hole behind a header
        return {}
    try:
        state = json.loads(octets)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ModelError(f"{name} holds no JSON object.", "Download the weights again.", id="HF041")
    return state


METHODS: Final[Mapping[str, Method]] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
}
