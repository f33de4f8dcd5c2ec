"""The tensors of a quantised checkpoint, as files keep them: small floats, integers packed into words, scales."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from octavo.errors import ModelError
from octavo.hub.checkpoint import Checkpoint
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


class Stored:
    """``checkpoint`` as a method of quantisation asks it for the tensors that it needs.

    All raises `ModelError`: HF043 for a tensor that is not there, HF044 for one of another shape or type.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.tensors = checkpoint.tensors()

    def stems(self, leaf: str) -> list[str]:
        """The names that end in ``leaf``, without it."""
        return [name.removesuffix(leaf) for name in self.tensors if name.endswith(leaf)]

    def shape(self, name: str) -> tuple[int, ...]:
        found = self.tensors.get(name)
        if found is None:
            raise ModelError(
                f"The checkpoint is quantised, but lacks {name}.", "Check that no shard is missing.", id="HF043"
            )
        return found.shape

    def sizes(self, name: str, count: int) -> tuple[int, ...]:
        """The shape of a tensor of ``count`` dimensions above 0."""
        found = self.shape(name)
        if len(found) != count or 0 in found:
            raise self.misfit(name, f"{count} dimensions above 0 were expected")
        return found

    def plane(self, name: str) -> tuple[int, int]:
        """The size of a tensor as a matrix: one dimension is a column; ModelOpt has a further one of 1 behind each."""
        found = self.shape(name)
        if len(found) == 4 and found[1::2] == (1, 1):
            return found[0], found[2]
        if len(found) > 2:
            raise self.misfit(name, "a matrix was expected")
        rows, columns = (*found, 1, 1)[:2]
        return rows, columns

    def check_kind(self, name: str, dtype: str) -> None:
        self.shape(name)
        found = self.tensors[name].dtype
        if found != dtype:
            raise ModelError(
                f"{name} is {found}; {dtype} was expected.",
                "Check the quantization_config of config.json against the weights.",
                id="HF044",
            )

    def misfit(self, name: str, needed: str) -> ModelError:
        return ModelError(
            f"{name} is {list(self.shape(name))}; {needed}.",
            "Check the quantization_config of config.json against the weights.",
            id="HF044",
        )

    def read(self, name: str, *slices: slice) -> Numbers:
        """What carries the values of a tensor, or of ``slices`` of it: see `hub.checkpoint.Array`."""
        return self._checkpoint.read(name, slices or None).data

    def values(self, name: str, *slices: slice) -> Numbers:
        """What `read` stands for: floats of 8 and 16 bits as float32, all else as it is."""
        found = self._checkpoint.read(name, slices or None)
        if found.dtype in _TABLES:
            return np.take(_TABLES[found.dtype], found.data)
        if found.dtype == "bfloat16":
            return (found.data.astype(np.uint32) << 16).view(np.float32)
        return found.data.astype(np.float32) if found.dtype == "float16" else found.data

    def scalar(self, name: str) -> float:
        """The only number of a tensor."""
        if math.prod(self.shape(name)) != 1:
            raise self.misfit(name, "one number was expected")
        return float(self.values(name).reshape(-1)[0])

    def uniform(self, name: str) -> int | None:
        """The word that all of an int32 tensor consists of, if it is one."""
        words = self.read(name)
        first = int(words.flat[0]) if words.size else 0
        return first if bool((words == first).all()) else None

    def matrix(self, name: str) -> Part:
        """A tensor as a matrix of the size that `plane` says."""
        size = self.plane(name)
        if size != self.shape(name):
            whole = self.values(name).reshape(size)
            return lambda rows, columns: whole[rows, columns]
        return lambda rows, columns: self.values(name, rows, columns)

    def per_row(self, name: str, size: tuple[int, int]) -> Part:
        """A matrix of ``size``, which may be stored as one row for all."""
        part, own = self.matrix(name), self.plane(name)
        if own == size:
            return part
        if own != (1, size[1]):
            raise self.misfit(name, f"{list(size)} or one row of it was expected")
        return lambda rows, columns: np.repeat(part(slice(0, 1), columns), rows.stop - rows.start, axis=0)

    def packed(
        self, name: str, bits: int, axis: int, size: tuple[int, int], *, places: tuple[int, ...] = (), add: int = 0
    ) -> Part:
        """The matrix of integers, of ``bits`` and as uint8, in words of int32 that lie along ``axis``.

        Number i of a word lies at its bits ``bits * places[i]`` on, by default the lowest first. ``add`` is added to
        each word.
        """
        needed = list(size)
        needed[axis] = -(-size[axis] * bits // WORD)
        self.check_kind(name, "int32")
        if self.shape(name) != tuple(needed):
            raise self.misfit(name, f"{needed} was expected")
        count = WORD // bits
        order = list(places)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)

        def part(rows: slice, columns: slice) -> Numbers:
            spans = [rows, columns]
            wanted = spans[axis]
            spans[axis] = slice(wanted.start // count, -(-wanted.stop // count))
            words = np.ascontiguousarray(self.read(name, *spans)).view(np.uint32) + np.uint32(add)
            octets = words.view(np.uint8).reshape(*words.shape, 4, 1)
            fields = (octets >> shifts & np.uint8((1 << bits) - 1)).reshape(*words.shape, count)
            fields = fields[..., order] if order else fields
            skip, size = wanted.start % count, wanted.stop - wanted.start
            if axis == 1:
                return fields.reshape(words.shape[0], -1)[:, skip : skip + size]
            return fields.swapaxes(1, 2).reshape(-1, words.shape[1])[skip : skip + size]

        return part

    def four_bits(self, name: str) -> Part:
        """Two floats of E2M1 in a byte of ``[out, in / 2]``, the low half first."""
        self.check_kind(name, "uint8")

        def part(rows: slice, columns: slice) -> Numbers:
            first = columns.start // 2
            octets = self.read(name, rows, slice(first, -(-columns.stop // 2)))
            found = FP4[np.stack([octets & 15, octets >> 4], axis=-1)].reshape(octets.shape[0], -1)
            return found[:, columns.start - 2 * first : columns.stop - 2 * first]

        return part


def transposed(part: Part) -> Part:
    return lambda rows, columns: part(columns, rows).T
