"""A checkpoint whose quantised weights look like plain ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from octavo.hub.checkpoint import Array, Checkpoint, Slices
from octavo.hub.gguf_quants import Bytes
from octavo.hub.quantised.methods import METHODS
from octavo.hub.quantised.stored import Stored
from octavo.hub.quantised.weights import Found
from octavo.hub.safetensors_file import TensorInfo

_NOT_WEIGHTS: Final = (
    *(".input_scale", ".output_scale", ".input_zero_point", ".input_global_scale", ".activation_scale"),
    *(".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale", ".input_scale_ub"),
)
"""Scales of activations and of the KV cache, which are not rounded here."""


class QuantisedCheckpoint:
    """``inner`` with the weights of ``found`` in the place of the tensors that they are made of."""

    def __init__(self, inner: Checkpoint, found: Found) -> None:
        self._inner = inner
        self._weights = found.weights
        tensors = {
            name: info
            for name, info in inner.tensors().items()
            if name not in found.spent and not name.endswith(_NOT_WEIGHTS)
        }
        for name, weight in found.weights.items():
            tensors[name] = TensorInfo("float32", weight.shape, 4 * math.prod(weight.shape))
        self._tensors = tensors
        self.stored = sum(info.nbytes for info in inner.tensors().values())
        self.optional = frozenset(self._idle_biases())

    def _idle_biases(self) -> list[str]:
        """Biases that GPTQ's tools write as zeros for layers without."""
        names = (name.removesuffix(".weight") + ".bias" for name in self._weights)
        return [name for name in names if name in self._tensors and not self._inner.read(name).data.any()]

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, slices: Slices | None = None) -> Array:
        weight = self._weights.get(name)
        if weight is None:
            return self._inner.read(name, slices)
        return Array(np.ascontiguousarray(weight.read(_whole(slices or (), weight.shape))), "float32")

    def forget(self) -> None:
        """See `hub.checkpoint.Checkpoint`."""
        self._inner.forget()

    def block_types(self) -> dict[str, str]:
        """See `hub.checkpoint.BlockCheckpoint`."""
        types = {name: weight.block_type for name, weight in self._weights.items()}
        return {name: type for name, type in types.items() if type is not None}

    def read_raw(self, name: str, rows: slice = slice(None)) -> Bytes:
        """See `hub.checkpoint.BlockCheckpoint`."""
        weight = self._weights[name]
        return weight.blocks(_whole((rows,), weight.shape)[0])


def _whole(slices: Slices, shape: tuple[int, ...]) -> Slices:
    """``slices`` with start and stop for each dimension."""
    every = (*slices, *(slice(None) for _ in range(len(shape) - len(slices))))
    return tuple(slice(*part.indices(size)) for part, size in zip(every, shape, strict=True))


def unquantised(checkpoint: Checkpoint, hf: Mapping[str, Any]) -> Checkpoint:
    """``checkpoint`` with plain weights, as the normalised config ``hf`` says that they are to be read.

    Raises `ModelError`: HF043 for a part of a weight that is missing, HF044 for one of an odd shape, HF050 for one that
    cannot be read; `settings.check` has been asked before.
    """
    settings = hf.get("quantization_config")
    if not settings:
        return checkpoint
    return QuantisedCheckpoint(checkpoint, METHODS[settings["quant_method"]](Stored(checkpoint), settings))


def optional_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors that a model may have no place for."""
    return checkpoint.optional if isinstance(checkpoint, QuantisedCheckpoint) else frozenset()
