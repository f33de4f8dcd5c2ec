"""The recurrent layers of a Transformers model that runs over a flat list of tokens.

What mixes tokens in such a layer is one module of it (a mixer): linear attention, a state space model, a short
convolution. It alone is run by sequences. All rows with one token in a step are a batch of it, with their states; a
piece of a prompt is a call of its own. Everything else of the model sees the tokens of all sequences at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.kernels.metadata import AttentionMetadata
from octavo.models.hf.states import Key, States, StateShape, StateTable


@dataclass(frozen=True)
class TracedMixer:
    """A module of a model that was seen to ask the cache for the states ``keys``; ``cache`` is the number or the name
    of the argument that it gets the cache by."""

    name: str
    cache: int | str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``start : stop`` of a step, which are of ``row``, and its first if they ``begin`` it."""

    row: int
    start: int
    stop: int
    begin: bool


class Mixers:
    """All mixers of a model: their states, and whose tokens those of the running step are."""

    def __init__(self, traced: Sequence[TracedMixer], shapes: Mapping[Key, StateShape]) -> None:
        self.traced = tuple(traced)
        self.shapes = dict(shapes)
        self.token_by_token = False
        """Whether they do not take several tokens at once after a sequence's first ones."""
        self.table = StateTable(shapes)
        self.decoding = torch.empty(0, dtype=torch.long)
        """The rows of the first tokens of the step, one token each."""
        self.pieces: list[Piece] = []
        """What the tokens after these are."""

    def __str__(self) -> str:
        count = len(self.traced)
        way = " (prompts token by token after their first piece)" if self.token_by_token else ""
        layers = f"{count} recurrent {'layer' if count == 1 else 'layers'}"
        return f"{layers} in batches{way}, {self.row_bytes} bytes a sequence"

    @property
    def row_bytes(self) -> int:
        """What is kept of a row."""
        return self.table.row_bytes

    def release(self, row: int) -> None:
        """Forgets the sequence of ``row``."""
        self.table.clear(row)

    def install(self, body: nn.Module) -> None:
        """Wraps the mixers of the decoder ``body``, which runs steps from now on."""
        for traced in self.traced:
            parent, _, name = traced.name.rpartition(".")
            setattr(body.get_submodule(parent), name, Mixer(body.get_submodule(traced.name), traced, self))

    def begin(self, step: AttentionMetadata) -> None:
        """Before the forward of ``step``. Looks at the device only if a row has several tokens."""
        decodes = step.num_decodes
        if decodes is None:
            raise RuntimeError("a step whose rows only the device knows cannot be run by sequences")
        self.table.reserve(len(step.block_table), step.rows.device)
        self.decoding = step.rows[:decodes].long()
        self.pieces = []
        if decodes < len(step.rows):
            ends = step.query_start[decodes + 1 :]
            parts = torch.stack([step.rows[decodes:], step.query_start[decodes:-1], ends, step.seq_lens[decodes:]])
            for row, start, stop, length in parts.T.tolist():
                self._add(Piece(row, start, stop, begin=length == stop - start))

    def _add(self, piece: Piece) -> None:
        if piece.begin or not self.token_by_token:
            self.pieces.append(piece)
        else:
            self.pieces += [Piece(piece.row, at, at + 1, begin=False) for at in range(piece.start, piece.stop)]


class Mixer(nn.Module):
    """Stands for a mixer of the model, and runs it with the tokens of each sequence."""

    def __init__(self, inner: nn.Module, traced: TracedMixer, mixers: Mixers) -> None:
        super().__init__()
        self.inner = inner
        self._traced = traced
        self._mixers = mixers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors ``[1, T, …]`` among the arguments are of the step's tokens; so are those that it returns."""
        mixers, keys = self._mixers, self._traced.keys
        count = len(mixers.decoding)
        total = mixers.pieces[-1].stop if mixers.pieces else count
        outputs = []
        if count:
            states = mixers.table.gather(keys, mixers.decoding)
            batch = _each((args, kwargs), (1, total), lambda x: x[:, :count].transpose(0, 1))
            output = self._run(batch, states)
            mixers.table.scatter(states, mixers.decoding)
            outputs.append(_each(output, (count, 1), lambda x: x.transpose(0, 1), others=False))
        for piece in mixers.pieces:
            states = {} if piece.begin else mixers.table.of_row(keys, piece.row)
            chunk = _each((args, kwargs), (1, total), lambda x, p=piece: x[:, p.start : p.stop])  # type: ignore[misc]
            output = self._run(chunk, states)
            mixers.table.put_row(states, piece.row)
            outputs.append(_each(output, (1, piece.stop - piece.start), lambda x: x, others=False))
        return _joined(outputs)

    def _run(self, arguments: tuple[tuple[Any, ...], dict[str, Any]], states: dict[Key, torch.Tensor]) -> Any:
        """The mixer's output; ``states`` become those after the tokens."""
        args, kwargs = list(arguments[0]), arguments[1]
        if isinstance(self._traced.cache, int):
            args[self._traced.cache] = States(states)
        else:
            kwargs[self._traced.cache] = States(states)
        return self.inner(*args, **kwargs)


def _each(
    value: Any, shape: tuple[int, int], change: Callable[[torch.Tensor], torch.Tensor], *, others: bool = True
) -> Any:
    """``value`` with each tensor ``[*shape, …]`` in it changed; None in place of other tensors, unless they stay."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.shape[:2] == shape else value if others else None
    if isinstance(value, dict):
        return {name: _each(item, shape, change, others=others) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_each(item, shape, change, others=others) for item in value)
    return value


def _joined(outputs: list[Any]) -> Any:
    """Outputs of the same structure for tokens that follow each other, as one."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, tuple):
        return tuple(_joined(list(items)) for items in zip(*outputs, strict=True))
    return torch.cat(outputs, dim=1) if all(isinstance(item, torch.Tensor) for item in outputs) else None
