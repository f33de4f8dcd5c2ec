"""What comes to a card before `kernels.sampling_triton` draws, and what stays there after it."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from octavo.kernels.pdl import chained, release, wait
from octavo.kernels.race_triton import SLOT


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["token_ptr", "settings_ptr"])
def _record_kernel(token_ptr, settings_ptr, seen_ptr, count, SIZE, CHAINED: tl.constexpr):
    row = tl.program_id(0)
    release(CHAINED)
    wait(CHAINED)
    slot = tl.load(settings_ptr + count * SLOT + row).to(tl.int64)
    if slot >= 0:
        place = seen_ptr + slot * SIZE + tl.load(token_ptr + row)
        seen = tl.load(place).to(tl.int32)
        tl.store(place, (seen + ((seen & 0x7FFF) < 0x7FFF).to(tl.int32)).to(tl.int16))


def send(array: npt.NDArray[np.int32], device: torch.device) -> torch.Tensor:
    """A copy on ``device`` that is made beside what runs there; what is launched next waits for it."""
    if device.type != "cuda":
        return torch.from_numpy(array)
    host = torch.empty(array.shape, dtype=torch.int32, pin_memory=True)
    host.numpy()[:] = array
    aside, current = _side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(aside):
        out = host.to(device, non_blocking=True)
    current.wait_stream(aside)
    out.record_stream(current)
    return out


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def record_(tokens: torch.Tensor, settings: torch.Tensor, seen: torch.Tensor) -> None:
    """``tokens[S]`` are counted for those rows that have a slot in ``seen``, see `runtime.penalties`."""
    chain = chained(tokens.device)
    _record_kernel[(len(tokens),)](
        tokens, settings, seen, len(tokens), seen.shape[1], chain, num_warps=1, launch_pdl=chain
    )
