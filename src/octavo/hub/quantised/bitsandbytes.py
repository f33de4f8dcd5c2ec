"""Weights that bitsandbytes wrote, in four bits and in eight."""

from __future__ import annotations

import json
from typing import Final

import numpy as np

from octavo.errors import ModelError
from octavo.hub.checkpoint import Checkpoint
from octavo.hub.gguf_quants import Bytes, Floats
from octavo.hub.quantised.found import Found, Settings, are_sizes, stems
from octavo.hub.quantised.stored import matrix, misfit, shape, sizes, values
from octavo.hub.quantised.weights import Grouped, Listed, Part

MAX_STATE: Final = 1 << 16  # bytes of the description of a weight
_STATES: Final = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


def bitsandbytes(checkpoint: Checkpoint, settings: Settings) -> Found:
    """Four bits: ``weight``, ``.absmax``, ``.quant_map``, ``.quant_state``; eight: ``weight`` int8 and ``SCB[out]``."""
    found = Found()
    for leaf in _STATES:
        for name in stems(checkpoint, leaf):
            found.weights[name] = _four(checkpoint, name, leaf)
            leaves = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", leaf)
            found.spent |= {f"{name}{each}" for each in leaves}
    for stem in stems(checkpoint, ".SCB"):
        out, size = sizes(checkpoint, f"{stem}.weight", 2)
        greatest = matrix(checkpoint, f"{stem}.SCB")
        scales: Part = _over_127(greatest)
        found.weights[f"{stem}.weight"] = Grouped((out, size), 8, size, matrix(checkpoint, f"{stem}.weight"), scales, 0)
        found.spent |= {f"{stem}.SCB", f"{stem}.weight_format"}
    return found


def _over_127(greatest: Part) -> Part:
    return lambda rows, columns: greatest(rows, columns) / np.float32(127)


def _four(checkpoint: Checkpoint, name: str, leaf: str) -> Listed:
    state, size = _state(checkpoint, name + leaf), shape(checkpoint, name)
    count = 2 * int(np.prod(size))
    wanted, block = state.get("shape", [count, 1]), state.get("blocksize", 64)  # a header alone has neither
    fits = are_sizes(wanted, 2) and are_sizes([block, inner := state.get("nested_blocksize", 256)], 2)
    if not fits or block % 2 or not 0 <= count - int(np.prod(wanted)) <= 1:
        raise misfit(name, size, f"{leaf.rpartition('.')[2]} says shape {wanted} in blocks of {block}")
    octets = checkpoint.tensors()[name]

    def codes(first: int, last: int) -> Bytes:
        return checkpoint.read(name).data.reshape(-1)[first:last]

    def absmax(first: int, last: int) -> Floats:
        scales = values(checkpoint.read(f"{name}.absmax", (slice(first, last),)))
        if f"{name}.nested_absmax" not in checkpoint.tensors():
            return np.asarray(scales, np.float32)
        outer = values(checkpoint.read(f"{name}.nested_absmax"))
        listed = values(checkpoint.read(f"{name}.nested_quant_map"))
        own = listed[scales] * outer[np.arange(first, last) // inner] + np.float32(state.get("nested_offset") or 0)
        return np.asarray(own, np.float32)

    listed = np.asarray(values(checkpoint.read(f"{name}.quant_map")), np.float32)
    if octets.dtype not in ("uint8", "int8") or listed.shape != (16,):
        raise misfit(name, size, f"bytes and 16 values were expected, not {octets.dtype} and {listed.shape}")
    return Listed((wanted[0], wanted[1]), codes, listed, absmax, block)


def _state(checkpoint: Checkpoint, name: str) -> Settings:
    octets = checkpoint.read(name).data.astype(np.uint8).tobytes()[:MAX_STATE]
    if not octets.strip(b"\0"):  # the hole behind a header
        return {}
    try:
        state = json.loads(octets)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ModelError(f"{name} holds no JSON object.", "Download the weights again.", id="HF041")
    return state
