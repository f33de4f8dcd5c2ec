"""Pickled PyTorch weights (``.bin``, ``.pt``) behind the face of `hub.checkpoint.Checkpoint`.

Here and not in ``hub``, which never imports torch. Only ``weights_only=True`` is used: it builds tensors and plain
containers and refuses everything else that a pickle could ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from octavo.errors import ModelError
from octavo.hub.checkpoint import Array, Slices
from octavo.hub.safetensors_file import TensorInfo
from octavo.log import get_logger

_CARRIERS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


class PyTorchCheckpoint:
    """The tensors of all ``paths``; the data stays in the files (mmap) until `read`. Raises `ModelError` HF041."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        get_logger().warning("reading pickled weights (%s); safetensors are safer and load faster", paths[0].name)
        self._tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            self._tensors.update(_load(path))
        self._infos = {
            name: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel() * t.element_size())
            for name, t in self._tensors.items()
        }

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, slices: Slices | None = None) -> Array:
        return as_array(self._tensors[name].detach(), slices)

    def forget(self) -> None:
        """The files are torch's."""


def as_array(tensor: torch.Tensor, slices: Slices | None) -> Array:
    """``slices`` of a CPU tensor, whose memory the array shares."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype in _CARRIERS:
        tensor = tensor.contiguous().view(_CARRIERS[tensor.dtype])
    return Array(tensor[slices or ...].numpy(), dtype)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded: Any = _unpickle(path)
    except Exception as error:  # the unpickler fails on damaged input with whatever its opcodes run into
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path} ({path.stat().st_size} bytes) is not a usable PyTorch file: {reason}",
            "Download it again, or take safetensors.",
            id="HF041",
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ModelError(f"{path} does not hold a dict of tensors.", "Take safetensors.", id="HF041")
    return {str(name): tensor for name, tensor in state.items()}


def _unpickle(path: Path) -> Any:
    """mmap needs the zip layout of torch 1.6 and later; older files are read whole."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
