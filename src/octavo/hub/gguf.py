"""Reader of GGUF files, versions 2 and 3, little endian.

Layout (ggml's ``docs/gguf.md``): magic, version, number of tensors, number of metadata entries, the entries, one
record for each tensor (name, dimensions, type, offset), padding to ``general.alignment``, data. A file is untrusted:
every count, length, type, dimension and offset is checked against a limit and against the bytes that are there before
anything is allocated. Anything wrong is a `ModelError` with id HF041 (HF050 for a tensor type not implemented here).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from octavo.errors import ModelError
from octavo.hub.gguf_quants import FORMATS, OTHER_TYPES, BlockFormat, Bytes, Floats, dequantise
from octavo.hub.mapped import MappedFile

MAX_HEADER = 1 << 28  # bytes before the tensors' data; real ones stay under 32 MiB
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 20
MAX_STRING = 1 << 26  # bytes
MAX_ARRAY = 1 << 24  # elements of a numeric array
MAX_STRINGS = 1 << 22  # elements of an array of strings
MAX_ARRAY_DEPTH = 2
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4
MAX_SPLITS = 1000

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. ``shape`` has rows first, as numpy does (the file has them last); ``blocks`` is a view of the file.

    ``blocks`` is uint8 [*shape[:-1], shape[-1] // format.values, format.nbytes].
    """

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    blocks: Bytes
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.blocks.nbytes)

    def read(self, slices: tuple[slice, ...] | None = None, rows: np.ndarray[Any, Any] | None = None) -> Floats:
        """Dequantised values of ``slices`` (step 1, missing trailing ones mean all); touches only the blocks they need.

        ``rows`` reorders the first dimension before slicing: row i of the result's source is ``rows[i]``.
        """
        bounds = [_bounds(s, n) for s, n in zip(slices or (), self.shape, strict=False)]
        bounds += [(0, n) for n in self.shape[len(bounds) :]]
        first, last = bounds[-1]
        values = self.format.values
        outer: list[Any] = [slice(*b) for b in bounds[:-1]]
        if rows is not None:
            order = rows[slice(*bounds[0])]
            if len(self.shape) == 1:
                return np.asarray(dequantise(self.blocks, self.format)[order], np.float32)
            outer[0] = order
        part = self.blocks[(*outer, slice(first // values, -(-last // values)))]
        skip = first - first // values * values
        return dequantise(part, self.format)[..., skip : skip + last - first]


def _bounds(s: slice, size: int) -> tuple[int, int]:
    start, stop, step = s.indices(size)
    if step != 1:
        raise ValueError(f"a slice of a tensor has step {step}; only 1 is supported")
    return start, max(start, stop)


class GgufReader:
    """Metadata and tensors of one GGUF file, or of all parts of a split one. The data stays in the file (mmap).

    ``tensors`` are by their name in the file; ``metadata`` values are int, float, bool, str, list of str, or a numpy
    array. Raises `ModelError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = _Parser(path)
        self._files = [first.file]
        self.metadata, self.tensors = first.parse()
        for part in self._other_parts():
            parser = _Parser(part)
            self._files.append(parser.file)
            _, tensors = parser.parse()
            twice = sorted(set(tensors) & set(self.tensors))
            if twice:
                _broken(part, f"tensor {twice[0]!r} is also in another part")
            self.tensors.update(tensors)

    def forget(self) -> None:
        """See `MappedFile.forget`."""
        for file in self._files:
            file.forget()

    @property
    def architecture(self) -> str:
        return self.text("general.architecture") or ""

    def text(self, key: str) -> str | None:
        """A string of the metadata; an entry of another type is an error."""
        value: str | None = self._typed(key, str)
        return value

    def integer(self, key: str) -> int | None:
        value: int | None = self._typed(key, int)
        return value

    def number(self, key: str) -> float | None:
        value = self._typed(key, (int, float))
        return None if value is None else float(value)

    def flag(self, key: str) -> bool | None:
        value: bool | None = self._typed(key, bool)
        return value

    def strings(self, key: str) -> list[str] | None:
        value: list[Any] | None = self._typed(key, list)
        if value and not isinstance(value[0], str):
            _broken(self.path, f"metadata entry {key} is not a list of strings")
        return value

    def fail(self, cause: str) -> NoReturn:
        """Raises the error for a file that is whole but contradicts itself."""
        _broken(self.path, cause)

    def _typed(self, key: str, kinds: Any) -> Any:
        value = self.metadata.get(key)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)):
            _broken(self.path, f"metadata entry {key} is of type {type(value).__name__}")
        return value

    def _other_parts(self) -> list[Path]:
        """Of ``name-00001-of-00003.gguf``: the files of parts 2 and 3."""
        count = self.integer("split.count") or 1
        if count == 1:
            return []
        match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", self.path.name)
        if not match or not 1 <= count <= MAX_SPLITS or int(match[3]) != count or int(match[2]) != 1:
            _broken(
                self.path,
                f"it is part of a model in {count} files, and not named as the first of them",
                f"Give the file whose name ends in -00001-of-{count:05d}.gguf.",
            )
        parts = [self.path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)]
        missing = [p.name for p in parts if not p.is_file()]
        if missing:
            raise ModelError(f"{self.path}: missing {', '.join(missing[:10])}.", "Download every part.", id="HF040")
        return parts


def _broken(path: Path, cause: str, remedy: str = "Download the file again.") -> NoReturn:
    raise ModelError(f"{path} is not a usable GGUF file: {cause}.", remedy, id="HF041")


def read_header(path: Path) -> Mapping[str, GgufTensor]:
    """The tensors of this one file, which may be part of a split model, without their data. Raises `ModelError`."""
    return _Parser(path).parse()[1]


class _Parser:
    """A cursor over the header of one file. ``_at`` never passes ``_end``, the end of what may be header."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.file = MappedFile(path)
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist.", "Check the path.", id="HF001") from None
        except (ValueError, OSError) as error:
            _broken(path, f"it cannot be read ({error})")
        self._view = self.file.data.data
        self._size = len(self._view)
        self._end = min(self._size, MAX_HEADER)
        self._at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        self._head()
        count, entries = self._count("tensors", MAX_TENSORS, 24), self._count("metadata entries", MAX_ENTRIES, 13)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            if key in metadata:
                self._fail(f"metadata entry {key!r} is there twice")
            metadata[key] = self._value(self._number("<I"), 0)
        records = [self._record() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self._fail(f"general.alignment is {alignment!r}, not a power of two up to {MAX_ALIGNMENT}")
        return metadata, self._place(records, alignment)

    def _head(self) -> None:
        magic = bytes(self._view[:64])
        if magic.startswith(b"version https://git-lfs"):
            _broken(
                self._path,
                f"it is a Git LFS pointer of {self._size} bytes, not the file itself",
                "Run git lfs pull, or download the file itself.",
            )
        if magic[:4] != b"GGUF":
            self._fail(f"it starts with {magic[:4]!r}, not b'GGUF'")
        self._skip(4)
        version = self._number("<I")
        if version not in (2, 3):
            hint = " (big endian)" if version & 0xFFFF == 0 else ""
            self._fail(f"its version is {version}{hint}; 2 and 3 are supported")

    def _record(self) -> tuple[str, tuple[int, ...], BlockFormat, int]:
        """(name, shape with rows first, format, offset from the start of the data)."""
        name = self._string()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self._fail(f"tensor {name!r} has {dimensions} dimensions, outside [1, {MAX_DIMENSIONS}]")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        if min(shape) < 1:
            self._fail(f"tensor {name!r} has shape {shape}")
        kind = self._number("<I")
        if kind not in FORMATS:
            raise ModelError(
                f"{self._path}: tensor {name!r} has type {OTHER_TYPES.get(kind, kind)}, which is not supported.",
                f"Take a file that uses only {', '.join(f.name for f in FORMATS.values())}.",
                id="HF050",
            )
        return name, shape, FORMATS[kind], self._number("<Q")

    def _place(
        self, records: list[tuple[str, tuple[int, ...], BlockFormat, int]], alignment: int
    ) -> dict[str, GgufTensor]:
        """Checks that tensors lie aligned, apart from each other and inside the file. Python integers do not wrap."""
        base = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end = base
        for name, shape, format, offset in sorted(records, key=lambda r: r[3]):
            if name in tensors:
                self._fail(f"tensor {name!r} is there twice")
            if shape[-1] % format.values:
                self._fail(f"tensor {name!r} has rows of {shape[-1]}, no multiple of {format.values} ({format.name})")
            grid = (*shape[:-1], shape[-1] // format.values, format.nbytes)
            size = 1
            for n in grid:
                size *= n
            if offset % alignment:
                self._fail(f"tensor {name!r} is at offset {offset}, which is not aligned to {alignment}")
            if base + offset < end:
                self._fail(f"tensor {name!r} at offset {offset} overlaps another one")
            end = base + offset + size
            if end > self._size:
                self._fail(f"tensor {name!r} ends at byte {end}, but the file has {self._size}")
            blocks = self.file.data[base + offset : end].reshape(grid)
            tensors[name] = GgufTensor(name, format, shape, blocks, base + offset)
        return tensors

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth + 1)
        if kind not in _NUMBERS:
            self._fail(f"a metadata entry has the unknown type {kind}")
        return self._numbers(_NUMBERS[kind], 1)[0].item()

    def _array(self, depth: int) -> Any:
        if depth > MAX_ARRAY_DEPTH:
            self._fail(f"metadata arrays are nested deeper than {MAX_ARRAY_DEPTH}")
        kind = self._number("<I")
        if kind == _STRING:
            return self._strings(self._count("strings of an array", MAX_STRINGS, 8))
        if kind == _ARRAY:
            return [self._array(depth + 1) for _ in range(self._count("arrays of an array", MAX_ENTRIES, 12))]
        if kind not in _NUMBERS:
            self._fail(f"a metadata array has the unknown type {kind}")
        dtype = _NUMBERS[kind]
        return self._numbers(dtype, self._count("elements of an array", MAX_ARRAY, np.dtype(dtype).itemsize)).copy()

    def _numbers(self, dtype: str, count: int) -> np.ndarray[Any, Any]:
        start = self._skip(count * np.dtype(dtype).itemsize)
        if dtype == "|b1":  # any byte but 0 is true; numpy's bool must hold 0 or 1
            return np.asarray(self.file.data[start : self._at] != 0)
        found: np.ndarray[Any, Any] = self.file.data[start : self._at].view(dtype)
        return found

    def _strings(self, count: int) -> list[str]:
        """As `_string`, ``count`` times; written out because vocabularies have some 100,000 of them."""
        unpack: Callable[..., tuple[Any, ...]] = struct.Struct("<Q").unpack_from
        view, at, limit, out = self._view, self._at, self._end, []
        try:
            for _ in range(count):
                (length,) = unpack(view, at)
                end = at + 8 + length
                if end > limit or length > MAX_STRING:
                    self._fail(f"a string at byte {at} has {length} bytes, but {limit - at - 8} are left")
                out.append(str(view[at + 8 : end], "utf-8"))
                at = end
        except struct.error:
            self._fail(f"it ends inside a string, at byte {self._size}")
        except UnicodeDecodeError:
            self._fail(f"the string at byte {at} is not UTF-8")
        self._at = at
        return out

    def _string(self) -> str:
        return self._strings(1)[0]

    def _count(self, what: str, limit: int, least: int) -> int:
        """A number of things that take ``least`` bytes each at the least."""
        count = self._number("<Q")
        if count > limit:
            self._fail(f"it claims {count} {what}; the limit is {limit}")
        if count * least > self._end - self._at:
            self._fail(f"it claims {count} {what}, but only {self._end - self._at} bytes are left")
        return count

    def _number(self, form: str) -> int:
        start = self._skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self._view, start)[0])

    def _skip(self, count: int) -> int:
        start = self._at
        if start + count > self._end:
            self._fail(f"its header runs past byte {self._end}")
        self._at = start + count
        return start

    def _fail(self, cause: str) -> NoReturn:
        _broken(self._path, cause)
