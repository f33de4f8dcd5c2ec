"""Weights on disk behind one face: names, shapes and slices of tensors as numpy arrays, without torch.

`open_checkpoint` picks the files (index, shards, duplicates) and the reader. Pickled PyTorch files need torch to read,
so their reader is `runtime.torch_checkpoint.PyTorchCheckpoint`, which the caller hands in as ``pytorch``; readers of
safetensors that need it, too, are in `runtime.safetensors_packages`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, runtime_checkable

import numpy.typing as npt

from octavo.config import LOAD_PACKAGES
from octavo.errors import ModelError
from octavo.hub.gguf_quants import Bytes
from octavo.hub.safetensors_file import SafetensorsFile, TensorInfo

if TYPE_CHECKING:
    from octavo.hub.source import Source

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Array:
    """A tensor's values. bfloat16 travels as uint16 and the float8 types as uint8; ``dtype`` names the real type."""

    data: npt.NDArray[Any]
    dtype: str


class Checkpoint(Protocol):
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its Hugging Face name. ``nbytes`` is the size of what `read` returns."""
        ...

    def read(self, name: str, slices: Slices | None = None) -> Array:
        """Tensor ``name``, or the part of it in ``slices`` (step 1; trailing dimensions may be left out).

        The array may be a read-only view of the file: copy it before writing.
        """
        ...

    def forget(self) -> None:
        """Lets go of memory that holds what was read; arrays stay as they are."""
        ...


@runtime_checkable
class BlockCheckpoint(Checkpoint, Protocol):
    """A checkpoint with weights of few bits, which `read` gives as floats."""

    @property
    def stored(self) -> int:
        """Bytes of all tensors as they are stored."""
        ...

    def block_types(self) -> dict[str, str]:
        """GGUF's name of the type of each matrix that can be had in blocks."""
        ...

    def read_raw(self, name: str, rows: slice = slice(None)) -> Bytes:
        """``rows`` of such a matrix: uint8 [rows, blocks in a row, bytes of a block]."""
        ...


class SafetensorsCheckpoint:
    """One or more safetensors files. Nothing but the headers is read before `read`, and then only the slices asked."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._files: dict[str, SafetensorsFile] = {}
        for path in paths:
            file = SafetensorsFile(path)
            for name in file.tensors:
                if name in self._files:
                    raise ModelError(
                        f"tensor {name!r} is in {self._files[name].path.name} and in {path.name}.",
                        f"Remove the file that does not belong to the model from {path.parent}.",
                        id="HF041",
                    )
                self._files[name] = file
        self._tensors = {name: file.tensors[name] for name, file in self._files.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def file(self, name: str) -> SafetensorsFile:
        """The file that tensor ``name`` is in."""
        return self._files[name]

    def read(self, name: str, slices: Slices | None = None) -> Array:
        file = self._files[name]
        return Array(file.read(name, slices), file.tensors[name].dtype)

    def forget(self) -> None:
        """See `Checkpoint`."""
        for file in set(self._files.values()):
            file.forget()


class WithoutPrefix:
    """A checkpoint that was saved without a head, so that names lack the ``model.`` of a model with one."""

    PREFIX = "model."

    def __init__(self, inner: Checkpoint) -> None:
        self._inner = inner
        self._tensors = {self.PREFIX + name: info for name, info in inner.tensors().items()}

    @classmethod
    def over(cls, checkpoint: Checkpoint) -> Checkpoint:
        """``checkpoint`` under the names of a model with a head, whichever it has."""
        return cls(checkpoint) if "embed_tokens.weight" in checkpoint.tensors() else checkpoint

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, slices: Slices | None = None) -> Array:
        return self._inner.read(name.removeprefix(self.PREFIX), slices)

    def forget(self) -> None:
        """See `Checkpoint`."""
        self._inner.forget()


# --- which files ----------------------------------------------------------------------------------------------------

_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})
_MAX_INDEX = 100_000_000  # bytes


def open_checkpoint(
    source: Source,
    load_format: str = "auto",
    *,
    pytorch: Callable[[tuple[Path, ...]], Checkpoint] | None = None,
    safetensors: Callable[[tuple[Path, ...]], Checkpoint] = SafetensorsCheckpoint,
) -> Checkpoint:
    """The weights of ``source``. ``load_format`` is that of `ModelOptions`.

    ``pytorch`` opens pickled files; without it, finding only such files is an error. ``safetensors`` opens those of
    Transformers' layout. Raises `ModelError`: HF040 if files are missing, HF041 if one is damaged.
    """
    if source.kind == "gguf":
        return _gguf(source.path)
    folder = source.path
    if load_format in ("auto", "hf", "safetensors", *LOAD_PACKAGES):
        paths = safetensors_paths(folder)
        if paths and not _is_consolidated(paths):
            return safetensors(paths)
    if load_format in ("auto", "mistral"):
        from octavo.hub.mistral_weights import MistralCheckpoint

        paths, params = consolidated_paths(folder), folder / "params.json"
        if paths and (load_format == "mistral" or params.is_file() or not pickled_paths(folder)):
            return MistralCheckpoint(paths, params)
    if load_format in ("auto", "hf", "pt"):
        paths = pickled_paths(folder)
        if paths and pytorch:
            return pytorch(paths)
        if paths:
            raise ModelError(f"{folder} has only PyTorch .bin weights.", "Convert them to safetensors.", id="HF040")
    if load_format in ("auto", "gguf"):
        paths = tuple(sorted(folder.glob("*.gguf"))) if folder.is_dir() else ()
        if len(paths) == 1 or (paths and "-00001-of-" in paths[0].name):
            return _gguf(paths[0])
    present = sorted(p.name for p in folder.iterdir())[:10] if folder.is_dir() else []
    raise ModelError(
        f"{folder} has no weights for load format {load_format}; found {', '.join(present) or 'nothing'}.",
        "Download *.safetensors, or give the path of a .gguf file.",
        id="HF040",
    )


def _gguf(path: Path) -> Checkpoint:
    from octavo.hub.gguf import GgufReader
    from octavo.hub.gguf_weights import GgufCheckpoint

    return GgufCheckpoint(GgufReader(path))


def safetensors_paths(folder: Path) -> tuple[Path, ...]:
    """What ``model.safetensors.index.json`` names, else ``model.safetensors``, else every file at the top level.

    Without an index, ``consolidated*`` (Mistral's own layout of the same weights) gives way to ``model*``; subfolders
    such as ``original/`` are never searched. Files are in natural order.
    """
    indexed = _indexed(folder / "model.safetensors.index.json")
    if indexed:
        return indexed
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    found = sorted(folder.glob("*.safetensors"), key=_natural)
    model = [p for p in found if p.name.startswith("model")]
    return _whole(tuple(model or found))


def consolidated_paths(folder: Path) -> tuple[Path, ...]:
    """The weights in Mistral's own layout, in the order of `safetensors_paths`."""
    indexed = _indexed(folder / "consolidated.safetensors.index.json")
    return indexed or _whole(tuple(sorted(folder.glob("consolidated*.safetensors"), key=_natural)))


def _is_consolidated(paths: tuple[Path, ...]) -> bool:
    return all(path.name.startswith("consolidated") for path in paths)


def pickled_paths(folder: Path) -> tuple[Path, ...]:
    """``*.bin`` of the model by the same rules, else ``*.pt``; what trainers leave beside them is not weights."""
    indexed = _indexed(folder / "pytorch_model.bin.index.json")
    if indexed:
        return indexed
    for pattern in ("*.bin", "*.pt"):
        found = sorted((p for p in folder.glob(pattern) if p.name not in _NOT_WEIGHTS), key=_natural)
        model = [p for p in found if p.name.startswith("pytorch_model")]
        if found:
            return _whole(tuple(model or found))
    return ()


def _indexed(index: Path) -> tuple[Path, ...]:
    """The files that an index names, all of them there; empty if there is no index."""
    if not index.is_file():
        return ()
    if index.stat().st_size > _MAX_INDEX:
        _bad_index(index, f"it has {index.stat().st_size} bytes, more than {_MAX_INDEX}")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _bad_index(index, f"no weight_map can be read from it ({type(error).__name__}: {error})")
    if not names:
        _bad_index(index, "its weight_map is empty")
    paths = []
    for name in names:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or "\\" in name:
            _bad_index(index, f"it names the file {name!r}, which is not inside the folder")
        paths.append(index.parent / name)
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        _missing(index.parent, missing, f"named by {index.name}")
    return tuple(sorted(paths, key=_natural))


def _whole(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """``paths``, if for every ``…-00001-of-00003…`` among them the other parts are there too."""
    names = {p.name for p in paths}
    for path in paths:
        match = re.fullmatch(r"(.+-)(\d{5})-of-(\d{5})(\..+)", path.name)
        if match:
            first, last = 1, min(int(match[3]), 10_000)
            expected = [f"{match[1]}{i:05d}-of-{match[3]}{match[4]}" for i in range(first, last + 1)]
            missing = [name for name in expected if name not in names]
            if missing:
                _missing(path.parent, missing, f"implied by the name of {path.name}")
    return paths


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts shard 2 before shard 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _missing(folder: Path, names: list[str], why: str) -> NoReturn:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    raise ModelError(f"{folder} lacks {', '.join(names[:10])}{more}, {why}.", "Download the missing files.", id="HF040")


def _bad_index(index: Path, cause: str) -> NoReturn:
    raise ModelError(f"{index} is not a usable index of shards: {cause}.", "Download it again.", id="HF041")
