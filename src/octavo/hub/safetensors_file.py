"""Reader of one safetensors file: header checked before use, tensors as views of the memory-mapped file.

Format (safetensors README): length of the header as uint64, a JSON header of ``{name: {dtype, shape, data_offsets}}``,
then the data, which the tensors cover without gaps or overlaps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelError
from octavo.hub.mapped import MappedFile

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
MAX_DIMENSIONS = 64  # numpy's limit

# Name in the header -> (our name, numpy type that carries it).
_DTYPES = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "F8_E4M3": ("float8_e4m3fn", "|u1"),
    "F8_E5M2": ("float8_e5m2", "|u1"),
    "F8_E8M0": ("float8_e8m0fnu", "|u1"),
    "I64": ("int64", "<i8"),
    "I32": ("int32", "<i4"),
    "I16": ("int16", "<i2"),
    "I8": ("int8", "|i1"),
    "U64": ("uint64", "<u8"),
    "U32": ("uint32", "<u4"),
    "U16": ("uint16", "<u2"),
    "U8": ("uint8", "|u1"),
    "BOOL": ("bool", "|b1"),
}


@dataclass(frozen=True)
class TensorInfo:
    """``dtype`` is torch's name of the type (``bfloat16``, ``float8_e4m3fn``)."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class SafetensorsFile:
    """``tensors`` maps each name to its info. Raises `ModelError` HF041 for a damaged file, HF050 for an odd type."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._views: dict[str, npt.NDArray[Any]] = {}
        self._begins: dict[str, int] = {}
        try:
            self._file = MappedFile(path)
        except (ValueError, OSError) as error:
            self._fail(f"it cannot be read ({error})")
        self._parse()

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> npt.NDArray[Any]:
        """A view of the file, or a copy where the file keeps the tensor at an odd address."""
        view = self._views[name][slices or ...]
        return view if view.flags.aligned else view.copy()

    def forget(self) -> None:
        """See `MappedFile.forget`."""
        self._file.forget()

    def place(self, name: str) -> tuple[int, np.dtype[Any]]:
        """The byte of the file at which the tensor begins, and the numpy type that carries its values."""
        return self._begins[name], self._views[name].dtype

    def _parse(self) -> None:
        size = len(self._file.data)
        start = bytes(self._file.data[:64])
        if start.startswith(b"version https://git-lfs"):
            self._fail(f"it is a Git LFS pointer of {size} bytes, not the file itself", "Run git lfs pull.")
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            self._fail("it is a web page, probably an error page that was saved under this name")
        if size < 8:
            self._fail(f"it has {size} bytes, fewer than the 8 of the header's length")
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER or 8 + length > size:
            self._fail(f"its header claims {length} bytes; the file has {size}, the limit is {MAX_HEADER}")
        header = self._header(bytes(self._file.data[8 : 8 + length]))
        self._place(header, 8 + length)

    def _header(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            self._fail(f"its header is not JSON ({error})")
        if not isinstance(header, dict):
            self._fail("its header is not a JSON object")
        header.pop("__metadata__", None)
        return header

    def _place(self, header: dict[str, Any], base: int) -> None:
        """Makes the views, in the order of the file, which is the order in which gaps and overlaps show."""
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: self._offsets(*item)):
            begin, stop = self._offsets(name, entry)
            shape, dtype = entry.get("shape"), entry.get("dtype")
            if dtype not in _DTYPES:
                raise ModelError(
                    f"{self.path}: tensor {name!r} has type {dtype!r}, which is not supported.",
                    f"Convert it to one of {', '.join(_DTYPES)}.",
                    id="HF050",
                )
            if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
                self._fail(f"tensor {name!r} has shape {str(shape)[:80]}")
            own, carrier = _DTYPES[dtype]
            nbytes = np.dtype(carrier).itemsize
            for n in shape:
                nbytes *= n
            if begin != end or stop - begin != nbytes:
                self._fail(f"tensor {name!r} of {nbytes} bytes has bytes {begin} to {stop}; it should start at {end}")
            end = stop
            if base + stop > len(self._file.data):
                self._fail(f"tensor {name!r} ends at byte {base + stop}, but the file has {len(self._file.data)}")
            self.tensors[name] = TensorInfo(own, tuple(shape), nbytes)
            self._begins[name] = base + begin
            try:
                self._views[name] = self._file.data[base + begin : base + stop].view(carrier).reshape(shape)
            except ValueError as error:  # an empty tensor with a dimension too large for numpy
                self._fail(f"tensor {name!r} has shape {str(shape)[:80]} ({error})")
        if base + end != len(self._file.data):
            self._fail(f"its tensors end at byte {base + end}, but the file has {len(self._file.data)}")

    def _offsets(self, name: str, entry: Any) -> tuple[int, int]:
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            self._fail(f"tensor {name!r} has the offsets {str(offsets)[:80]}")
        return offsets[0], offsets[1]

    def _fail(self, cause: str, remedy: str = "Download the file again.") -> NoReturn:
        raise ModelError(f"{self.path} is not a usable safetensors file: {cause}.", remedy, id="HF041")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found
