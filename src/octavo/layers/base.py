"""What every layer is: a module that says which checkpoint tensors fill it, and that takes its operators once.

The life of a layer: built without memory (its parameters are on the meta device), `materialise`d on a device, filled
by the loader according to `load_rules`, then `finish`ed. A method of quantisation belongs here too: it gives a layer
other parameters, other rules and another `finish`; the loader stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from octavo.kernels.select import REFERENCE, Ops
from octavo.parallel.shards import Cut

Shard = Literal["out", "in"]
"""How a product is divided among ranks: by its outputs, each rank a part of the result, or by its inputs, each rank a
summand of it."""


@dataclass(frozen=True, slots=True)
class LoadRule:
    """Tensor ``source`` of the checkpoint, or the ``cut`` of it that this rank holds, is rows ``start : start + rows``
    of the layer's ``parameter``. ``raw``: its blocks as they are stored, bytes a row, and not the values in them."""

    source: str
    parameter: str
    start: int
    rows: int
    cut: Cut | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tensor of the checkpoint that is stored in blocks of few bits: GGUF's name of the type, bytes of a row, and
    how many values of a row are in a block."""

    kind: str
    row_bytes: int
    values: int

    def cut(self, inputs: Cut) -> Cut | None:
        """The bytes of each row that hold ``inputs``; None if these are no whole blocks."""
        if inputs.first % self.values or inputs.size % self.values:
            return None
        nbytes = self.row_bytes * self.values // inputs.whole
        return Cut(1, inputs.first // self.values * nbytes, inputs.size // self.values * nbytes, self.row_bytes)


class Layer(nn.Module):
    """Base of the layers that own parameters or call operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Ops = REFERENCE

    def load_rules(self, name: str) -> list[LoadRule]:
        """Where the parameters come from; ``name`` is the layer's dotted name in the model.

        By default each parameter is the checkpoint tensor of its own name.
        """
        return [
            LoadRule(f"{name}.{parameter}", parameter, 0, tensor.shape[0])
            for parameter, tensor in self.named_parameters(recurse=False)
        ]

    def use_blocks(self, name: str, blocks: Mapping[str, Blocks]) -> None:
        """Replaces the layer's weight by ``blocks``, if it can multiply by them and all of its weight is among them.

        ``blocks`` are by the name in the checkpoint and of types that the operators take; ``name`` is as in
        `load_rules`, whose rules differ after it. Called before `materialise`.
        """

    def materialise(self, device: torch.device) -> None:
        """Gives the layer's own parameters memory on ``device``; their content is undefined."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            # Not empty_like: from a meta tensor it imports a symbolic algebra system, which takes seconds.
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(self, name, nn.Parameter(memory, requires_grad=False))

    @torch.no_grad()
    def fill_dummy(self, name: str, generator: torch.Generator) -> None:
        """Random content for the parameter ``name``: normal with standard deviation 0.02."""
        self.get_parameter(name).normal_(0.0, 0.02, generator=generator)

    def finish(self, ops: Ops) -> None:
        """Called once when the parameters are filled: takes the operators, and may re-pack what it holds."""
        self.ops = ops


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without memory."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
