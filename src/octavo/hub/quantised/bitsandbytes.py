"""Weights that bitsandbytes wrote, in four bits and in eight."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

import numpy as np

from octavo.errors import ModelError
from octavo.hub.gguf_quants import Bytes, Floats
from octavo.hub.quantised.settings import Settings, are_sizes
from octavo.hub.quantised.stored import Stored
from octavo.hub.quantised.weights import Found, Grouped, Listed, Numbers, Part

MAX_STATE: Final = 1 << 16  # bytes of the description of a weight
_STATES: Final = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


def bitsandbytes(stored: Stored, settings: Settings) -> Found:
    """Four bits: ``weight``, ``.absmax``, ``.quant_map``, ``.quant_state``; eight: ``weight`` int8 and ``SCB[out]``."""
    found = Found()
    for leaf in _STATES:
        for name in stored.stems(leaf):
            found.weights[name] = _four(stored, name, leaf)
            leaves = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", leaf)
            found.spent |= {f"{name}{each}" for each in leaves}
    for stem in stored.stems(".SCB"):
        out, size = stored.sizes(f"{stem}.weight", 2)
        stored.check_kind(f"{stem}.weight", "int8")
        if stored.shape(f"{stem}.SCB") != (out,):
            raise stored.misfit(f"{stem}.SCB", f"{out} scales were expected")
        scales = _over_127(stored.matrix(f"{stem}.SCB"))
        found.weights[f"{stem}.weight"] = Grouped((out, size), 8, size, stored.matrix(f"{stem}.weight"), scales, 0)
        found.spent |= {f"{stem}.SCB", f"{stem}.weight_format"}
    return found


def _over_127(greatest: Part) -> Part:
    return lambda rows, columns: greatest(rows, columns) / np.float32(127)


def _four(stored: Stored, name: str, leaf: str) -> Listed:
    stored.shape(name)
    state = _state(stored, name + leaf)
    count = 2 * stored.tensors[name].nbytes  # of whatever type bnb_4bit_quant_storage says
    wanted, block = state.get("shape", [count, 1]), state.get("blocksize", 64)  # a header alone has neither
    if not are_sizes([*wanted, block] if isinstance(wanted, list) else None, 3) or block % 2:
        raise stored.misfit(name, f"{leaf.rpartition('.')[2]} says shape {wanted} in blocks of {block}")
    if not 0 <= count - int(np.prod(wanted)) <= 1:
        raise stored.misfit(name, f"shape {wanted} needs half as many bytes")
    listed = np.asarray(_listed(stored, f"{name}.quant_map", 16), np.float32)
    blocks = -(-int(np.prod(wanted)) // block)

    def codes(first: int, last: int) -> Bytes:
        octets: Bytes = stored.read(name).reshape(-1).view(np.uint8)[first:last]
        return octets

    absmax = _absmax(stored, name, state, blocks)
    return Listed((wanted[0], wanted[1]), codes, listed, absmax, block)


def _absmax(stored: Stored, name: str, state: Settings, blocks: int) -> Callable[[int, int], Floats]:
    """The scales of blocks, first to last, of which there are ``blocks``; they may be quantised themselves."""
    scales, nested = f"{name}.absmax", f"{name}.nested_absmax" in stored.tensors
    if state and stored.shape(scales) != (blocks,):
        raise stored.misfit(scales, f"scales of {blocks} blocks were expected")
    if not nested:
        return lambda first, last: np.asarray(stored.values(scales, slice(first, last)), np.float32)
    inner, offset = state.get("nested_blocksize", 256), state.get("nested_offset") or 0
    if not are_sizes([inner], 1) or not isinstance(offset, int | float):
        raise stored.misfit(scales, f"their description says blocks of {inner} from {offset} on")
    stored.check_kind(scales, "uint8")
    listed = _listed(stored, f"{name}.nested_quant_map", 256)
    outer = _listed(stored, f"{name}.nested_absmax", -(-blocks // inner) if state else None)

    def absmax(first: int, last: int) -> Floats:
        own = listed[stored.read(scales, slice(first, last))]
        return np.asarray(own * outer[np.arange(first, last) // inner] + np.float32(offset), np.float32)

    return absmax


def _listed(stored: Stored, name: str, count: int | None) -> Numbers:
    """A list of ``count`` numbers, None: of any; raises `ModelError` HF043, or HF044 for another number of them."""
    found = stored.shape(name)
    if len(found) != 1 or count not in (None, found[0]):
        raise stored.misfit(name, f"{count or 'some'} numbers in a row were expected")
    return stored.values(name)


def _state(stored: Stored, name: str) -> Settings:
    octets = stored.read(name).astype(np.uint8).tobytes()[:MAX_STATE]
    if not octets.strip(b"\0"):  # the hole behind a header
        return {}
    try:
        state = json.loads(octets)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ModelError(f"{name} holds no JSON object.", "Download the weights again.", id="HF041")
    return state
