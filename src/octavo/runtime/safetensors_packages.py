"""safetensors read by packages that a user has installed: ``--load-format fastsafetensors`` and ``runai_streamer``.

Which files there are and what is in them, `hub.checkpoint.SafetensorsCheckpoint` finds out and checks as ever; the
packages only bring the bytes, with threads of their own, into host memory. Both import torch: not for ``hub``.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.config import LOAD_PACKAGES, package_version
from octavo.errors import ModelError
from octavo.hub.checkpoint import Array, Checkpoint, SafetensorsCheckpoint, Slices
from octavo.log import get_logger
from octavo.runtime.torch_checkpoint import as_array

FILES = 2  # that fastsafetensors holds in memory: layers are spread over files in nearly the order of the model


def safetensors_reader(load_format: str) -> Callable[[tuple[Path, ...]], Checkpoint]:
    """What opens safetensors for ``load_format``: octavo itself unless that is the name of a package."""
    if load_format not in LOAD_PACKAGES:
        return SafetensorsCheckpoint
    package = LOAD_PACKAGES[load_format].name
    get_logger().info("weights: safetensors are read by %s %s", package, package_version(package))
    return FastSafetensorsCheckpoint if load_format == "fastsafetensors" else RunaiCheckpoint


class FastSafetensorsCheckpoint(SafetensorsCheckpoint):
    """By ``SafeTensorsFileLoader``, which reads whole files: each when the first of its tensors is wanted."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        super().__init__(paths)
        self._lock = threading.Lock()
        self._buffers: OrderedDict[Path, Any] = OrderedDict()  # the one used last at the end

    def read(self, name: str, slices: Slices | None = None) -> Array:
        path = self.file(name).path
        with self._lock, _failing(path, "fastsafetensors"):
            buffer = self._buffers.pop(path, None) or _buffer(path)
            self._buffers[path] = buffer
            while len(self._buffers) > FILES:
                self._buffers.popitem(last=False)[1].close()  # tensors taken from it keep the memory that they need
            tensor = buffer.get_tensor(name)
        return as_array(tensor, slices)


def _buffer(path: Path) -> Any:
    """The tensors of the file in host memory; without GPUDirect Storage, which needs a device as their place."""
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
    try:
        loader.add_filenames({0: [str(path)]})
        return loader.copy_files_to_device()
    finally:
        loader.close()


class RunaiCheckpoint(SafetensorsCheckpoint):
    """By ``FileStreamer``, which reads the rows of a slice in parallel; one slice at a time."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        from runai_model_streamer import FileStreamer

        super().__init__(paths)
        self._lock = threading.Lock()
        self._streamer = FileStreamer().__enter__()
        weakref.finalize(self, self._streamer.__exit__, None, None, None)

    def read(self, name: str, slices: Slices | None = None) -> Array:
        info, file = self.tensors()[name], self.file(name)
        begin, carrier = file.place(name)
        if not info.shape or not info.nbytes:
            return Array(self._bytes(file.path, begin, info.nbytes).view(carrier).reshape(info.shape), info.dtype)
        rows, *rest = slices or (slice(None),)
        first, last, _ = rows.indices(info.shape[0])
        stride, shape = info.nbytes // info.shape[0], (max(last - first, 0), *info.shape[1:])
        data = self._bytes(file.path, begin + first * stride, shape[0] * stride).view(carrier).reshape(shape)
        part = data[(slice(None), *rest)]
        return Array(part if part.flags.aligned else part.copy(), info.dtype)

    def _bytes(self, path: Path, begin: int, count: int) -> npt.NDArray[np.uint8]:
        """``count`` bytes of the file from ``begin``, at an address that suits no type in particular."""
        from runai_model_streamer import FileChunks

        if count == 0:
            return np.empty(0, np.uint8)
        with self._lock, _failing(path, "runai-model-streamer"):
            self._streamer.stream_files([FileChunks(0, str(path), [begin], [count])])
            (chunk,) = [tensor for _, _, tensor in self._streamer.get_chunks()]
        found: npt.NDArray[np.uint8] = chunk.numpy().reshape(-1)
        return found


@contextmanager
def _failing(path: Path, package: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of classes that the packages do not name
        raise ModelError(
            f"{package} cannot read {path}: {error}",
            "Leave --load-format out: octavo reads the same files itself.",
            id="HF041",
        ) from error
