"""How the tensors of each method of quantisation make weights.

A method looks at the names in the headers, not at the lists of modules in the config: what it finds is quantised, and
what it leaves over must be a weight of the model, which the loader checks. Layouts are those of the tools that write
them: AutoGPTQ and GPTQModel, AutoAWQ, compressed-tensors, bitsandbytes, ModelOpt, and Transformers for fp8 and mxfp4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import numpy as np

from octavo.errors import ModelError
from octavo.hub.gguf_quants import Bytes
from octavo.hub.quantised.bitsandbytes import bitsandbytes
from octavo.hub.quantised.settings import Settings, are_sizes, as_dict
from octavo.hub.quantised.stored import WORD, Stored, transposed
from octavo.hub.quantised.weights import BLOCK, Experts, Found, Grouped, Numbers, Part, Scaled

Method = Callable[[Stored, Settings], Found]

_GPTQ_BITS: Final = (4, 8, 2)
_PACKED_BITS: Final = (4, 8)
_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # of the columns of a word, which is written in the order 0 2 4 6 1 3 5 7


def _bits(settings: Settings, *keys: str, of: tuple[int, ...]) -> int:
    found = next((settings[key] for key in keys if settings.get(key) is not None), None)
    if not isinstance(found, int) or found not in of:
        raise ModelError(
            f"The weights have {found} bits ({keys[0]} of quantization_config); {', '.join(map(str, of))} can be read.",
            "Take another variant of the model.",
            id="HF050",
        )
    return found


def gptq(stored: Stored, settings: Settings) -> Found:
    """``qweight[in / per word, out]``, ``qzeros[groups, out / per word]``, ``scales[groups, out]``, ``g_idx[in]``."""
    _bits(settings, "bits", of=_GPTQ_BITS)
    found = Found()
    for stem in stored.stems(".qweight"):
        rows, out = stored.sizes(f"{stem}.qweight", 2)
        count = stored.sizes(f"{stem}.scales", 2)[0]
        bits = _bits_of_zeros(stored, stem, count, out)
        size = rows * WORD // bits
        _check_groups(stored, f"{stem}.scales", (count, out), size, count)
        # The first version stores zeros less one: a one is added at each place, with carries, as they were subtracted.
        add = 0 if settings.get("checkpoint_format") == "gptq_v2" else sum(1 << place for place in range(0, WORD, bits))
        found.weights[f"{stem}.weight"] = Grouped(
            (out, size),
            bits,
            size // count,
            transposed(stored.packed(f"{stem}.qweight", bits, 0, (size, out))),
            transposed(stored.matrix(f"{stem}.scales")),
            _gptq_zeros(stored, f"{stem}.qzeros", bits, (count, out), add),
            _order(stored, f"{stem}.g_idx", size, count),
        )
        found.spent |= {f"{stem}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    return found


def awq(stored: Stored, settings: Settings) -> Found:
    """``qweight[in, out / 8]``, ``qzeros[groups, out / 8]``, ``scales[groups, out]``."""
    bits, found = _bits(settings, "bits", "w_bit", of=(4,)), Found()
    if str(settings.get("version", "gemm")).lower() != "gemm":
        raise ModelError(
            f"The weights are packed for AWQ's {settings['version']!r} kernels; 'gemm' can be read.",
            "Take another variant of the model.",
            id="HF050",
        )
    for stem in stored.stems(".qweight"):
        size, words = stored.sizes(f"{stem}.qweight", 2)
        out, count = words * WORD // bits, stored.sizes(f"{stem}.scales", 2)[0]
        _check_groups(stored, f"{stem}.scales", (count, out), size, count)
        found.weights[f"{stem}.weight"] = Grouped(
            (out, size),
            bits,
            size // count,
            transposed(stored.packed(f"{stem}.qweight", bits, 1, (size, out), places=_AWQ_PLACES)),
            transposed(stored.matrix(f"{stem}.scales")),
            transposed(stored.packed(f"{stem}.qzeros", bits, 1, (count, out), places=_AWQ_PLACES)),
        )
        found.spent |= {f"{stem}.{leaf}" for leaf in ("qweight", "qzeros", "scales")}
    return found


def _check_groups(stored: Stored, name: str, needed: tuple[int, ...], size: int, groups: int) -> None:
    if stored.shape(name) != needed or size % groups:
        raise stored.misfit(name, f"{list(needed)}, of groups that divide {size} inputs, were expected")


def _gptq_zeros(stored: Stored, name: str, bits: int, size: tuple[int, int], add: int) -> Part | int:
    """The zeros, with ``add`` added to each word: one number if they all are the middle of their range."""
    zeros, middle = transposed(stored.packed(name, bits, 1, size, add=add)), 1 << bits - 1
    word = stored.uniform(name)
    if word is None:
        return zeros
    numbers = {word + add >> place & (1 << bits) - 1 for place in range(0, WORD, bits)}
    return middle if numbers == {middle} else zeros


def _bits_of_zeros(stored: Stored, stem: str, groups: int, out: int) -> int:
    """The bits of a layer, which may be others than the config's: tools have settings for layers by their names."""
    rows, words = stored.sizes(f"{stem}.qzeros", 2)
    if rows != groups:
        raise stored.misfit(f"{stem}.scales", f"{rows} groups were expected, as in qzeros")
    if words * WORD % out:
        raise stored.misfit(f"{stem}.qzeros", f"zeros of {out} outputs were expected")
    return _bits({"bits": words * WORD // out}, "bits", of=_GPTQ_BITS)


def _order(stored: Stored, name: str, size: int, groups: int) -> Numbers | None:
    """The group of each of ``size`` inputs where they are not in the order of their groups."""
    if name not in stored.tensors:
        return None
    order = stored.read(name)
    if order.shape != (size,) or int(order.max()) >= groups:
        raise stored.misfit(name, f"the groups of {size} inputs, of 0 to {groups - 1}, were expected")
    plain = not order.any() or bool((order < 0).any()) or bool((order == np.arange(size) // (size // groups)).all())
    return None if plain else order.astype(np.int64)


def fp8(stored: Stored, settings: Settings) -> Found:
    """``weight`` in 8-bit floats with ``weight_scale_inv`` or ``weight_scale``: of the matrix, its rows or its tiles.

    Scales of activations (``input_scale``) and of the KV cache are not needed: activations are not rounded.
    """
    found = Found()
    for name, info in stored.tensors.items():
        if info.dtype not in ("float8_e4m3fn", "float8_e5m2"):
            continue
        if len(info.shape) > 2:
            raise ModelError(
                f"{name} is {list(info.shape)} in 8-bit floats, such as many experts have; matrices can be read.",
                "Take a variant of the model with a tensor for each expert, or one in plain floats.",
                id="HF050",
            )
        if len(info.shape) == 2 and name.endswith(".weight"):
            scale = f"{name}_scale_inv" if f"{name}_scale_inv" in stored.tensors else f"{name}_scale"
            high, wide = stored.sizes(name, 2)
            tile = _tile(stored, scale, (high, wide), settings)
            found.weights[name] = Scaled((high, wide), stored.matrix(name), stored.matrix(scale), tile)
            found.spent.add(scale)
    return found


def _tile(stored: Stored, scale: str, size: tuple[int, int], settings: Settings) -> tuple[int, int]:
    """What one scale is for: all, a row, a group in it, or a tile; the last one in a row or a column may be cut."""
    scales = stored.plane(scale)
    if scales == (1, 1):
        return size
    if scales[0] == size[0] and scales[1] and size[1] % scales[1] == 0:
        return 1, size[1] // scales[1]
    tile = _tile_size(settings)
    if scales != tuple(-(-n // side) for n, side in zip(size, tile, strict=True)):
        raise stored.misfit(scale, f"tiles of {list(tile)} of a weight {list(size)} need other scales")
    return tile


def _tile_size(settings: Settings) -> tuple[int, int]:
    """What the config says, at its top or for its groups of layers, else the size that all tools choose by default."""
    said = (settings.get("weight_block_size"), *(w.get("block_structure") for w in _groups_of(settings)))
    high, wide = next((tile for tile in said if are_sizes(tile, 2)), [128, 128])
    return high, wide


def compressed(stored: Stored, settings: Settings) -> Found:
    """compressed-tensors: integers in words (``weight_packed``), int8, 8-bit floats, NVFP4, all with scales."""
    found = fp8(stored, settings)
    for stem in stored.stems(".weight_packed"):
        name = f"{stem}.weight_packed"
        if stored.tensors[name].dtype == "uint8":
            found.weights[f"{stem}.weight"] = _nvfp4(stored, name, stem, "weight_global_scale", divides=True)
        else:
            found.weights[f"{stem}.weight"] = _words(stored, name, stem, settings)
        leaves = ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")
        found.spent |= {f"{stem}.weight_{leaf}" for leaf in leaves}
    for name, info in stored.tensors.items():
        stem = name.removesuffix(".weight")
        if info.dtype == "int8" and len(info.shape) == 2 and f"{stem}.weight_scale" in stored.tensors:
            high, wide = stored.sizes(name, 2)
            group = _columns(stored, f"{stem}.weight_scale", (high, wide))
            zeros: Part | int = 0
            if f"{stem}.weight_zero_point" in stored.tensors:
                zeros = stored.per_row(f"{stem}.weight_zero_point", (high, wide // group))
            scales = stored.per_row(f"{stem}.weight_scale", (high, wide // group))
            found.weights[name] = Grouped((high, wide), 8, group, stored.matrix(name), scales, zeros)
            found.spent |= {f"{stem}.weight_{leaf}" for leaf in ("scale", "zero_point")}
    return found


def _words(stored: Stored, name: str, stem: str, settings: Settings) -> Grouped:
    """``weight_packed[out, in / per word]``, ``weight_scale[out, groups]``, ``weight_zero_point[out / per word, …]``.

    Numbers are stored with half of their range added; a zero point is, too.
    """
    out, words = stored.sizes(name, 2)
    bits, size = _packed_size(stored, f"{stem}.weight_shape", words, settings)
    group = _columns(stored, f"{stem}.weight_scale", (out, size))
    groups = (out, size // group)
    zeros = _packed_zeros(stored, f"{stem}.weight_zero_point", groups, bits)
    scales = stored.per_row(f"{stem}.weight_scale", groups)
    order = _order(stored, f"{stem}.weight_g_idx", size, size // group)
    return Grouped((out, size), bits, group, stored.packed(name, bits, 1, (out, size)), scales, zeros, order)


def _packed_size(stored: Stored, name: str, words: int, settings: Settings) -> tuple[int, int]:
    """(bits, inputs) of a weight of ``words`` a row, whose last word may have places to spare.

    Where the config has groups of layers that differ in bits, the weight's own shape tells them apart.
    """
    size = 0  # as in the hole behind a header
    if name in stored.tensors and stored.shape(name) == (2,):
        size = int(stored.read(name)[1])
    said = {str(weights.get("num_bits")): weights for weights in _groups_of(settings)}
    fitting = [bits for bits in _PACKED_BITS if str(bits) in said and words == -(-size // (WORD // bits))]
    if fitting:
        return fitting[0], size
    if len(said) != 1:
        raise ModelError(
            "quantization_config has groups of layers with different numbers of bits, or none.",
            "Take another variant of the model.",
            id="HF050",
        )
    bits = _bits(next(iter(said.values())), "num_bits", of=_PACKED_BITS)
    return bits, words * WORD // bits


def _packed_zeros(stored: Stored, name: str, groups: tuple[int, int], bits: int) -> Part | int:
    """Packed as the weight; tools before compressed-tensors 0.10 wrote signed numbers, one in a byte."""
    half = 1 << bits - 1
    if name not in stored.tensors:
        return half
    if stored.tensors[name].dtype == "int32":
        return stored.packed(name, bits, 0, groups)
    stored.check_kind(name, "int8")
    signed = stored.per_row(name, groups)
    return lambda rows, columns: signed(rows, columns).astype(np.int16) + half


def _groups_of(settings: Settings) -> list[Settings]:
    """What is said of the weights of each group of layers."""
    groups = as_dict(settings.get("config_groups")).values()
    return [weights for group in groups if (weights := as_dict(as_dict(group).get("weights")))]


def _columns(stored: Stored, scale: str, size: tuple[int, int]) -> int:
    """How many inputs share a scale."""
    rows, groups = stored.plane(scale)
    if rows not in (1, size[0]) or not groups or not size[1] or size[1] % groups:
        raise stored.misfit(scale, f"a weight {list(size)} needs scales for its rows or for groups in them")
    return size[1] // groups


def _nvfp4(stored: Stored, name: str, stem: str, last: str, *, divides: bool) -> Scaled:
    """E2M1 ``[out, in / 2]``, ``weight_scale[out, in / 16]`` in 8-bit floats, and one scale for all of them."""
    out, octets = stored.sizes(name, 2)
    scales = f"{stem}.weight_scale"
    if stored.shape(scales) != (out, octets // 8):
        raise stored.misfit(scales, f"{[out, octets // 8]} was expected")
    factor, part = stored.scalar(f"{stem}.{last}"), stored.matrix(scales)
    factor = 1 / factor if divides and factor else factor

    def both(rows: slice, columns: slice) -> Numbers:
        return part(rows, columns) * np.float32(factor)

    return Scaled((out, 2 * octets), stored.four_bits(name), both, (1, 16))


def modelopt(stored: Stored, settings: Settings) -> Found:
    """8-bit floats as `fp8`, or NVFP4 (``weight`` uint8, ``weight_scale``, ``weight_scale_2``)."""
    found = fp8(stored, settings)
    for stem in stored.stems(".weight_scale_2"):
        found.weights[f"{stem}.weight"] = _nvfp4(stored, f"{stem}.weight", stem, "weight_scale_2", divides=False)
        found.spent |= {f"{stem}.{leaf}" for leaf in ("weight_scale", "weight_scale_2")}
    return found


def mxfp4(stored: Stored, settings: Settings) -> Found:
    """gpt-oss: ``…_blocks[E, out, groups, 16]`` and ``…_scales[E, out, groups]``, for ``…[E, in, out]``."""
    found = Found()
    for stem in stored.stems("_blocks"):
        experts, out, groups, octets = stored.sizes(f"{stem}_blocks", 4)
        if octets * 2 != BLOCK or stored.shape(f"{stem}_scales") != (experts, out, groups):
            raise stored.misfit(f"{stem}_scales", f"{[experts, out, groups]} was expected")
        for leaf in ("blocks", "scales"):
            stored.check_kind(f"{stem}_{leaf}", "uint8")
        found.weights[stem] = Experts((experts, groups * BLOCK, out), partial(_experts, stored, stem))
        found.spent |= {f"{stem}_blocks", f"{stem}_scales"}
    return found


def _experts(stored: Stored, stem: str, experts: slice, outputs: slice) -> tuple[Bytes, Bytes]:
    return stored.read(f"{stem}_blocks", experts, outputs), stored.read(f"{stem}_scales", experts, outputs)


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
