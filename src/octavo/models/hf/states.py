"""What recurrent layers of Transformers keep of a sequence, in a table with a row for each.

Such layers (linear attention, state space models, short convolutions) ask the model's cache for states, and hand new
ones to it. `States` answers them for the sequences of one call; `StateTable` has the states of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

ALIGNMENT = 16  # bytes

Key = tuple[str, int, int]
"""Which state: its kind, the number of its layer, and its number there."""


class States:
    """The cache that a recurrent layer sees: the states of the sequences ``[B, …]`` that it computes tokens of.

    They are in ``kept``, where new ones take their places; a layer may change them in place, too. Nothing is there for
    sequences that begin.
    """

    def __init__(self, kept: dict[Key, torch.Tensor]) -> None:
        self.kept = kept

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The last inputs ``[B, C, K]`` of a convolution."""
        return self._get(("conv", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Takes the next inputs ``[B, C, T]``; returns them behind those that were kept. K are kept from now on."""
        key = ("conv", layer_idx, state_idx)
        before = self._get(key)
        size = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        inputs = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        inputs = F.pad(inputs, (max(size - inputs.shape[-1], 0), 0))
        self._put(key, inputs[..., -size:])
        return inputs

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The state ``[B, …]`` of a recurrence."""
        return self._get(("recurrent", layer_idx, state_idx))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Takes the state after the last token, and returns it."""
        return self._put(("recurrent", layer_idx, state_idx), recurrent_states)

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        """What MiniMax calls its state."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether states may be asked back: never."""
        return False

    def _get(self, key: Key) -> torch.Tensor | None:
        return self.kept.get(key)

    def _put(self, key: Key, state: torch.Tensor) -> torch.Tensor:
        self.kept[key] = state
        return state


@dataclass(frozen=True)
class StateShape:
    """Of one state of one sequence."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def in_float32(self) -> StateShape:
        """The same of a model in float32."""
        return replace(self, dtype=torch.float32) if self.dtype.is_floating_point else self

    @property
    def nbytes(self) -> int:
        size = math.prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT


class StateTable:
    """States of all rows, zero until a row is used; a row's lie one behind the other, so it is cleared at once."""

    def __init__(self, shapes: Mapping[Key, StateShape]) -> None:
        self._shapes = dict(shapes)
        self.row_bytes = sum(shape.nbytes for shape in shapes.values())
        self._memory = torch.zeros(0, self.row_bytes, dtype=torch.uint8)
        self._states: dict[Key, torch.Tensor] = {}

    @torch.inference_mode()
    def reserve(self, rows: int, device: torch.device) -> None:
        """Room for ``rows`` rows, if there is less."""
        if rows <= len(self._memory):
            return
        memory = torch.zeros(rows, self.row_bytes, dtype=torch.uint8, device=device)
        memory[: len(self._memory)] = self._memory
        self._memory, start = memory, 0
        for key, shape in self._shapes.items():
            size = math.prod(shape.shape) * shape.dtype.itemsize
            state = memory[:, start : start + size].view(shape.dtype)
            self._states[key] = state.view(rows, *shape.shape)
            start += shape.nbytes

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Makes the states of ``row`` zero."""
        if row < len(self._memory):
            self._memory[row].zero_()

    def of_row(self, keys: tuple[Key, ...], row: int) -> dict[Key, torch.Tensor]:
        """The states ``[1, …]`` of a row, in place."""
        return {key: self._states[key][row : row + 1] for key in keys}

    def put_row(self, states: Mapping[Key, torch.Tensor], row: int) -> None:
        """Keeps ``states``, ``[1, …]``, for a row."""
        for key, state in states.items():
            self._states[key][row : row + 1].copy_(state)

    def gather(self, keys: tuple[Key, ...], rows: torch.Tensor) -> dict[Key, torch.Tensor]:
        """Copies ``[B, …]`` of the states of ``rows``, int64 ``[B]``."""
        return {key: self._states[key].index_select(0, rows) for key in keys}

    def scatter(self, states: Mapping[Key, torch.Tensor], rows: torch.Tensor) -> None:
        """Keeps ``states``, ``[B, …]``, for ``rows``."""
        for key, state in states.items():
            table = self._states[key]
            table.index_copy_(0, rows, state.to(table.dtype))
