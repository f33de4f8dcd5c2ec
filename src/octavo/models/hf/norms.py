"""RMS norms of Transformers that ours can stand for, found by trying."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.kernels.select import REFERENCE, Ops
from octavo.layers.norm import RMSNorm
from octavo.models.hf.probe import Call, same


@dataclass(frozen=True)
class NormFormula:
    """``x / sqrt(mean(x * x) + eps) * (weight + add)``; Gemma adds 1."""

    eps: float
    add: float


Formulas = dict[Hashable, NormFormula | None]
"""What was found, by `kind`."""


def kind(module: nn.Module) -> Hashable:
    """Norms of one kind have one formula: a class computes by nothing but its numbers and its weight."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    return type(module), shape, tuple(sorted(plain.items()))


def norm_formula(module: nn.Module) -> NormFormula | None:
    """The formula of ``module`` if it is an RMS norm with one weight.

    Found with random weights, on inputs so small that the epsilon counts; those of ``module`` may be without memory.
    """
    weight = getattr(module, "weight", None)
    if [name for name, _ in module.named_parameters()] != ["weight"] or not isinstance(weight, torch.Tensor):
        return None
    if weight.dim() != 1 or list(module.children()):
        return None
    wide = copy.deepcopy(module).float()
    strong = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    wide.weight = nn.Parameter(strong, requires_grad=False)
    small = torch.linspace(-3e-3, 2e-3, 5 * weight.shape[0]).view(1, 5, -1)
    wanted = wide(small)
    for formula in (NormFormula(eps, add) for eps in _epsilons(module) for add in (0.0, 1.0)):
        if same(REFERENCE.rms_norm(small, strong + formula.add, formula.eps), wanted):
            return formula
    return None


def native_norm(module: nn.Module, call: Call, chosen: Ops, known: Formulas) -> RMSNorm | None:
    """`RMSNorm` with the weight of ``module``, if it computes the same, by formula and for the input of ``call``.

    The weight is the same memory, unless the formula adds something to it: the sum is in float32, which is what such
    norms multiply by.
    """
    weight: Any = getattr(module, "weight", None)
    x: Any = call.args[0] if len(call.args) == 1 and not call.kwargs else None  # a gated norm has two
    if not all(isinstance(tensor, torch.Tensor) for tensor in (weight, x, call.output)):
        return None
    if not x.dtype == weight.dtype == call.output.dtype or x.shape[-1:] != weight.shape:
        return None
    formula = formula_of_kind(module, known)
    if formula is None:
        return None
    value = weight.data.float() + formula.add if formula.add else weight.data
    made = RMSNorm(weight.shape[0], formula.eps, dtype=value.dtype)
    made.weight = nn.Parameter(value, requires_grad=False)
    made.finish(chosen)
    return made if same(made(x), call.output) else None


def formula_of_kind(module: nn.Module, known: Formulas) -> NormFormula | None:
    """`norm_formula`, once for each `kind`."""
    own = kind(module)
    if own not in known:
        known[own] = norm_formula(module)
    return known[own]


def _epsilons(module: nn.Module) -> list[float]:
    """What may be the epsilon: every small number that the module keeps."""
    found = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2]
    return list(dict.fromkeys(found))
