"""Matrices as files keep them: small floats, integers packed into words, scales of several shapes."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelError
from octavo.hub.checkpoint import Array, Checkpoint
from octavo.hub.gguf_quants import Floats
from octavo.hub.quantised.weights import FP4, Numbers, Part

WORD: Final = 32  # bits


def _table(exponent: int, mantissa: int, bias: int, *, has_infinity: bool) -> Floats:
    """The values of all bytes as floats of ``1 + exponent + mantissa`` bits (OCP 8-bit Floating Point, 1.0)."""
    codes = np.arange(256)
    power, low = codes >> mantissa & (1 << exponent) - 1, codes & (1 << mantissa) - 1
    share = low / (1 << mantissa)
    values = np.where(power > 0, (1 + share) * 2.0 ** (power - bias), share * 2.0 ** (1 - bias))
    top = power == (1 << exponent) - 1
    if has_infinity:
        values = np.where(top, np.where(low == 0, np.inf, np.nan), values)
    else:
        values = np.where(top & (low == (1 << mantissa) - 1), np.nan, values)
    return np.where(codes < 128, values, -values).astype(np.float32)


_TABLES: Final = {
    "float8_e4m3fn": _table(4, 3, 7, has_infinity=False),
    "float8_e5m2": _table(5, 2, 15, has_infinity=True),
    "float8_e8m0fnu": np.append(2.0 ** (np.arange(255) - 127.0), np.nan).astype(np.float32),
}


def values(array: Array) -> Numbers:
    """What an array's carrier stands for: floats of 8 and 16 bits as float32, all else as it is."""
    table = _TABLES.get(array.dtype)
    if table is not None:
        found: Floats = table[array.data]
        return found
    if array.dtype == "bfloat16":
        return (array.data.astype(np.uint32) << 16).view(np.float32)
    return array.data.astype(np.float32) if array.dtype == "float16" else array.data


def matrix(checkpoint: Checkpoint, name: str) -> Part:
    """A tensor as a matrix of the shape that `plane` says."""
    size = plane(checkpoint, name)
    if size != shape(checkpoint, name):
        whole = values(checkpoint.read(name)).reshape(size)
        return lambda rows, columns: whole[rows, columns]
    return lambda rows, columns: values(checkpoint.read(name, (rows, columns)))


def plane(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """The size of a tensor as a matrix: fewer than two dimensions are a column, and ModelOpt has one of 1 behind each.

    Raises `ModelError` HF043, or HF044 for other dimensions.
    """
    found = shape(checkpoint, name)
    if len(found) == 4 and found[1::2] == (1, 1):
        return found[0], found[2]
    if len(found) > 2:
        raise misfit(name, found, "a matrix was expected")
    rows, columns = (*found, 1, 1)[:2]
    return rows, columns


def packed(
    checkpoint: Checkpoint,
    name: str,
    bits: int,
    axis: int,
    size: tuple[int, int],
    *,
    places: tuple[int, ...] | None = None,
    add: int = 0,
) -> Part:
    """The matrix of integers, of ``bits`` and as uint8, in words of int32 that lie along ``axis``.

    Number i of a word lies at its bits ``bits * places[i]`` on, by default the lowest first. ``add`` is added to each
    word. Raises `ModelError`: HF043, or HF044 for other numbers or words than ``size`` integers need.
    """
    needed = list(size)
    needed[axis] = -(-size[axis] * bits // WORD)
    check_kind(checkpoint, name, "int32")
    if shape(checkpoint, name) != tuple(needed):
        raise misfit(name, shape(checkpoint, name), f"{needed} was expected")
    count = WORD // bits
    order = None if places is None else list(places)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)

    def part(rows: slice, columns: slice) -> Numbers:
        spans = [rows, columns]
        wanted = spans[axis]
        spans[axis] = slice(wanted.start // count, -(-wanted.stop // count))
        words = np.ascontiguousarray(checkpoint.read(name, (spans[0], spans[1])).data)
        words = words.view(np.uint32) + np.uint32(add)
        octets = words.view(np.uint8).reshape(*words.shape, 4, 1)
        fields = (octets >> shifts & np.uint8((1 << bits) - 1)).reshape(*words.shape, count)
        fields = fields if order is None else fields[..., order]
        skip, size = wanted.start % count, wanted.stop - wanted.start
        if axis == 1:
            return fields.reshape(words.shape[0], -1)[:, skip : skip + size]
        return fields.swapaxes(1, 2).reshape(-1, words.shape[1])[skip : skip + size]

    return part


def four_bits(checkpoint: Checkpoint, name: str) -> Part:
    """Two floats of E2M1 in a byte of ``[out, in / 2]``, the low half first."""
    check_kind(checkpoint, name, "uint8")

    def part(rows: slice, columns: slice) -> Numbers:
        first = columns.start // 2
        octets = checkpoint.read(name, (rows, slice(first, -(-columns.stop // 2)))).data
        found = FP4[np.stack([octets & 15, octets >> 4], axis=-1)].reshape(octets.shape[0], -1)
        return found[:, columns.start - 2 * first : columns.stop - 2 * first]

    return part


def transposed(part: Part) -> Part:
    return lambda rows, columns: part(columns, rows).T


def shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Raises `ModelError` HF043 if there is no such tensor."""
    found = checkpoint.tensors().get(name)
    if found is None:
        raise ModelError(
            f"The checkpoint is quantised, but lacks {name}.", "Check that no shard is missing.", id="HF043"
        )
    return found.shape


def sizes(checkpoint: Checkpoint, name: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor of ``count`` dimensions above 0; raises `ModelError` HF043, or HF044 for one of others."""
    found = shape(checkpoint, name)
    if len(found) != count or 0 in found:
        raise misfit(name, found, f"{count} dimensions above 0 were expected")
    return found


def check_kind(checkpoint: Checkpoint, name: str, *dtypes: str) -> None:
    """Raises `ModelError` HF043 if there is no such tensor, HF044 if it is of another type."""
    shape(checkpoint, name)
    found = checkpoint.tensors()[name].dtype
    if found not in dtypes:
        raise ModelError(
            f"{name} is {found}; {' or '.join(dtypes)} was expected.",
            "Check the quantization_config of config.json against the weights.",
            id="HF044",
        )


def scalar(checkpoint: Checkpoint, name: str) -> float:
    """The only number of a tensor; raises `ModelError` HF043, or HF044 if there are others."""
    if math.prod(shape(checkpoint, name)) != 1:
        raise misfit(name, shape(checkpoint, name), "one number was expected")
    return float(values(checkpoint.read(name)).reshape(-1)[0])


def uniform(checkpoint: Checkpoint, name: str) -> int | None:
    """The word that all of an int32 tensor consists of, if it is one."""
    words: npt.NDArray[Any] = checkpoint.read(name).data
    first = int(words.flat[0]) if words.size else 0
    return first if bool((words == first).all()) else None


def misfit(name: str, found: tuple[int, ...], needed: object) -> ModelError:
    return ModelError(
        f"{name} is {list(found)}; {needed}.",
        "Check the quantization_config of config.json against the weights.",
        id="HF044",
    )
