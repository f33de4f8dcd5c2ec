"""Weights that a checkpoint keeps in few bits: what is read of them, and the values they stand for.

A weight here is a matrix ``[out, in]``, or experts' ``[E, in, out]``, under the name that it has in the model that is
not quantised. It is read by slices, and only the bytes of those are touched. Values are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from octavo.hub.checkpoint import Slices
from octavo.hub.gguf_quants import Bytes, Floats

Numbers = npt.NDArray[Any]

Part = Callable[[slice, slice], Numbers]
"""Rows and columns (start, stop; step 1) of a matrix that is stored in a form of its own."""

BLOCK: Final = 32  # values in a block of GGUF's types Q4_0, Q4_1 and Q8_0


class Weight(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def block_type(self) -> str | None:
        """GGUF's name of the blocks that hold the same values, if there are such."""
        ...

    def read(self, slices: Slices) -> Floats:
        """The values in ``slices``, which has start, stop and step 1 for each dimension."""
        ...

    def blocks(self, rows: slice) -> Bytes:
        """``rows`` in blocks of `block_type`: uint8 [rows, blocks, bytes of a block]."""
        ...


@dataclass
class Found:
    """Weights by the name that the model has for them, and the tensors that they are made of or that are not needed."""

    weights: dict[str, Weight] = field(default_factory=dict)
    spent: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Grouped:
    """``scale[o, g] * (code[o, i] - zero[o, g])`` with ``g = i // group``, or ``order[i]`` if there is an order.

    ``codes`` are integers of ``bits``; ``zeros`` is a number where all are the middle of their range.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    codes: Part
    scales: Part
    zeros: Part | int
    order: Numbers | None = None

    def read(self, slices: Slices) -> Floats:
        rows, columns = slices
        values = self.codes(rows, columns).astype(np.float32)
        values -= self.zeros if isinstance(self.zeros, int) else self._spread(self.zeros, rows, columns)
        values *= self._spread(self.scales, rows, columns)
        return values

    def _spread(self, part: Part, rows: slice, columns: slice) -> Floats:
        """What ``part`` has for the group of each column."""
        if self.order is not None:
            groups = self.order[columns]
            return _floats(part(rows, slice(0, int(groups.max()) + 1)))[:, groups]
        first, last = columns.start // self.group, -(-columns.stop // self.group)
        skip, count = columns.start - first * self.group, columns.stop - columns.start
        return np.repeat(_floats(part(rows, slice(first, last))), self.group, axis=1)[:, skip : skip + count]

    @property
    def block_type(self) -> str | None:
        if self.order is not None or self.group % BLOCK or self.shape[1] % BLOCK:
            return None
        same = isinstance(self.zeros, int)
        return {(8, True): "Q8_0", (4, True): "Q4_0", (4, False): "Q4_1"}.get((self.bits, same))

    def blocks(self, rows: slice) -> Bytes:
        """Scales, and zeros times scales, become float16, the type that they have in most files."""
        codes = self.codes(rows, slice(0, self.shape[1]))
        codes = codes.reshape(codes.shape[0], -1, BLOCK)
        scales = self._of_blocks(self.scales, rows)
        if isinstance(self.zeros, int):
            codes = codes.astype(np.int16) - self.zeros  # signed
            if self.bits == 8:
                return np.concatenate([_halves(scales), codes.astype(np.int8).view(np.uint8)], axis=2)
            return np.concatenate([_halves(scales), _nibbles(codes + 8)], axis=2)
        least = -self._of_blocks(self.zeros, rows) * scales
        return np.concatenate([_halves(scales), _halves(least), _nibbles(codes)], axis=2)

    def _of_blocks(self, part: Part, rows: slice) -> Floats:
        """What ``part`` has for each block, [rows, blocks, 1]."""
        groups = -(-self.shape[1] // self.group)
        found = np.repeat(_floats(part(rows, slice(0, groups))), self.group // BLOCK, axis=1)
        return found[:, : self.shape[1] // BLOCK, None]


def _nibbles(codes: Numbers) -> Bytes:
    """[…, 32] numbers below 16 as 16 bytes, the first 16 in the low halves."""
    packed: Bytes = (codes[..., :16] | codes[..., 16:] << 4).astype(np.uint8)
    return packed


def _halves(values: Floats) -> Bytes:
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8)


def _floats(values: Numbers) -> Floats:
    return np.asarray(values, np.float32)


class _Floats:
    """What GGUF has no type for."""

    block_type: str | None = None

    def blocks(self, rows: slice) -> Bytes:
        raise NotImplementedError("block_type is None")


@dataclass(frozen=True)
class Scaled(_Floats):
    """``value[o, i] * scale[o // high, i // wide]``: floats of few bits, with a scale for a tile of (high, wide)."""

    shape: tuple[int, int]
    values: Part
    scales: Part
    tile: tuple[int, int]

    def read(self, slices: Slices) -> Floats:
        rows, columns = slices
        (high, wide), values = self.tile, _floats(self.values(rows, columns))
        tiles = [slice(part.start // size, -(-part.stop // size)) for part, size in ((rows, high), (columns, wide))]
        scales = _repeated(_floats(self.scales(tiles[0], tiles[1])), 0, rows, high)
        values *= _repeated(scales, 1, columns, wide)
        return values


def _repeated(scales: Floats, axis: int, part: slice, size: int) -> Floats:
    """``scales``, of tiles, for each place in ``part``; what is one scale for all of it stays one."""
    if size == 1 or scales.shape[axis] == 1:
        return scales
    skip = part.start % size
    every = np.repeat(scales, size, axis=axis)
    return every[(slice(None),) * axis + (slice(skip, skip + part.stop - part.start),)]


@dataclass(frozen=True)
class Listed(_Floats):
    """bitsandbytes' four bits: ``listed[code] * absmax``, codes over the flat matrix, the high half of a byte first.

    ``absmax`` gives the scales of the blocks ``first : last``, each of ``block`` values.
    """

    shape: tuple[int, int]
    codes: Callable[[int, int], Bytes]
    listed: Floats
    absmax: Callable[[int, int], Floats]
    block: int

    def read(self, slices: Slices) -> Floats:
        rows, columns = slices
        start, stop = rows.start * self.shape[1], rows.stop * self.shape[1]
        first, last = start // self.block, -(-stop // self.block)
        held = min(last * self.block, self.shape[0] * self.shape[1])
        packed = self.codes(first * self.block // 2, -(-held // 2))
        values = self.listed[np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)]
        values *= np.repeat(self.absmax(first, last), self.block)[: len(values)]
        skip = start - first * self.block
        return values[skip : skip + stop - start].reshape(-1, self.shape[1])[:, columns]


FP4: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of E2M1 (OCP Microscaling Formats, 5.3.3)."""


@dataclass(frozen=True)
class Experts(_Floats):
    """MXFP4 of gpt-oss: ``[E, in, out]``, of codes ``[E, out, groups, 16]`` and exponents ``[E, out, groups]``.

    ``stored`` reads experts and outputs of (codes, exponents); a byte's low half comes first, a group has 32 inputs.
    """

    shape: tuple[int, int, int]
    stored: Callable[[slice, slice], tuple[Bytes, Bytes]]

    def read(self, slices: Slices) -> Floats:
        experts, inputs, outputs = slices
        codes, exponents = self.stored(experts, outputs)
        values = FP4[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(*exponents.shape, BLOCK)
        values = np.ldexp(values, exponents.astype(np.int32)[..., None] - 127)
        return values.reshape(*exponents.shape[:2], -1)[..., inputs].swapaxes(1, 2)
