"""Which instruction set the C++ kernels run: the best there is. AMX, which was never run on a processor, has to
multiply as the next best does first, at every start."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo import _cpu
from octavo.errors import ConfigError

INTERFACE = 2  # as csrc/module.cpp has it; raised there and here with every change of what is called
ROWS, INPUTS, OUTPUTS = 37, 1074, 80  # of tiles of rows, steps of inputs and groups of outputs: whole ones and parts


def check_interface(built: int) -> None:
    """Raises `ConfigError` for an extension that was ``built`` from other sources than these."""
    if built != INTERFACE:
        raise ConfigError(
            f"the C++ extension is older or newer than its callers: interface {built}, not {INTERFACE}.",
            "Build it again, in a checkout: python tools/build_native.py; else install octavo again.",
        )


def choose(names: Sequence[str]) -> str:
    """Makes one of ``names``, best first, the extension's; returns why better ones are passed over, "" if none is."""
    best, *others = names
    if best.startswith("amx") and not torch.equal(product(best), product(others[0])):
        _cpu.use(others[0])
        return f"{best} is not used: it multiplies wrongly on this processor"
    _cpu.use(best)
    return ""


def product(name: str) -> torch.Tensor:
    """A product by the kernels of ``name``; of small integers, so that their sums are exact in every order."""
    _cpu.use(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (ROWS, INPUTS), generator=generator).bfloat16()
    panels = torch.randint(-4, 5, (OUTPUTS // 16, INPUTS // 2, 16, 2), generator=generator).bfloat16()
    out = torch.empty(ROWS, OUTPUTS, dtype=torch.bfloat16)
    weight = _cpu.Weight([("bf16", panels.data_ptr(), OUTPUTS)], 0, INPUTS)
    weight.product(True, x.data_ptr(), out.data_ptr(), ROWS, INPUTS)
    return out
