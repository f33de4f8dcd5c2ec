"""Edits of logits and records of tokens in Triton, for the batches that `kernels.sampling_triton` draws from."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from octavo.kernels.pdl import chained, release, wait
from octavo.kernels.sampling_triton import float_of

_BLOCK = 4096
_HISTORY = 1024  # tokens of a history that a program looks at


@triton.jit(do_not_specialize=["count", "words"])
def _copy_kernel(
    x_ptr, settings_ptr, bits_ptr, out_ptr, stride, count, words, SIZE, BLOCK: tl.constexpr, CHAINED: tl.constexpr
):
    """float32 copies of rows; what row ``PLACE`` of ``bits_ptr`` does not allow is -inf, if it was finite."""
    row = tl.program_id(0)
    release(CHAINED)
    wait(CHAINED)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < SIZE
    x = tl.load(x_ptr + row.to(tl.int64) * stride + at, live, 0.0).to(tl.float32)
    place = tl.load(settings_ptr + 6 * count + row)
    if place >= 0:
        word = tl.load(bits_ptr + place.to(tl.int64) * words + at // 32, live, 0)
        banned = ((word >> (at % 32)) & 1) == 0
        x = tl.where(banned & (x < float("inf")), float("-inf"), x)
    tl.store(out_ptr + row.to(tl.int64) * SIZE + at, x, live)


@triton.jit(do_not_specialize=["count", "width"])
def _penalise_kernel(
    x_ptr, settings_ptr, history_ptr, counts_ptr, prompt_ptr, scratch_ptr, count, width, SIZE,
    CHUNK: tl.constexpr, BACK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Into ``scratch_ptr[S, width]`` the penalised logits of the tokens of each history; with ``BACK``, from there to
    the logits. In two launches, since a token may be in a history twice."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    release(CHAINED)
    wait(CHAINED)
    slot = tl.load(settings_ptr + 7 * count + row).to(tl.int64)
    if slot >= 0:
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        live = at < tl.load(settings_ptr + 8 * count + row)
        token = tl.load(history_ptr + slot * width + at, live, 0)
        here = x_ptr + row.to(tl.int64) * SIZE + token
        there = scratch_ptr + row.to(tl.int64) * width + at
        if BACK:
            tl.store(here, tl.load(there, live, 0.0), live)
        else:
            x = tl.load(here, live, 0.0)
            generated = tl.load(counts_ptr + slot * SIZE + token, live, 0)
            seen = (generated > 0) | (tl.load(prompt_ptr + slot * SIZE + token, live, 0) != 0)
            factor = tl.where(seen, float_of(settings_ptr, 9, count, row), 1.0)
            x = tl.where(x > 0, x / factor, x * factor)
            x -= float_of(settings_ptr, 11, count, row) * generated.to(tl.float32)
            x -= float_of(settings_ptr, 10, count, row) * (generated > 0).to(tl.float32)
            tl.store(there, x, live)


@triton.jit(do_not_specialize=["count", "width"], do_not_specialize_on_alignment=["token_ptr"])
def _record_kernel(
    token_ptr, settings_ptr, history_ptr, counts_ptr, count, width, SIZE, CHAINED: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    release(CHAINED)
    wait(CHAINED)
    slot = tl.load(settings_ptr + 7 * count + row).to(tl.int64)
    if slot >= 0:
        token = tl.load(token_ptr + row).to(tl.int64)
        tl.store(history_ptr + slot * width + tl.load(settings_ptr + 8 * count + row), token)
        place = counts_ptr + slot * SIZE + token
        tl.store(place, tl.load(place) + 1)


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


def copy_masked(x: torch.Tensor, settings: torch.Tensor, bits: torch.Tensor | None) -> torch.Tensor:
    """``x[S, V]`` in float32, -inf where row ``settings[PLACE]`` of ``bits`` (see `sampling.allowed_bias`) has a 0."""
    count, size = x.shape
    out = torch.empty((count, size), dtype=torch.float32, device=x.device)
    words, chain = 0 if bits is None else bits.shape[1], chained(x.device)
    _copy_kernel[(count, triton.cdiv(size, _BLOCK))](
        x, settings, settings if bits is None else bits, out, x.stride(0), count, words, size, _BLOCK, chain,
        num_warps=8, launch_pdl=chain,
    )  # fmt: skip
    return out


def penalise_(
    x: torch.Tensor,
    settings: torch.Tensor,
    history: torch.Tensor,
    counts: torch.Tensor,
    prompt: torch.Tensor,
    longest: int,
) -> None:
    """`sampling.penalise` of the rows of ``x[S, V]`` (float32, dense) that have a slot in the tables of
    `runtime.penalties`; ``longest`` of their histories."""
    width, chain = history.shape[1], chained(x.device)
    scratch = torch.empty((len(x), width), dtype=torch.float32, device=x.device)
    for back in (False, True):
        _penalise_kernel[(len(x), triton.cdiv(longest, _HISTORY))](
            x, settings, history, counts, prompt.view(torch.uint8), scratch, len(x), width, x.shape[1], _HISTORY, back,
            chain, num_warps=4, launch_pdl=chain,
        )  # fmt: skip


def record_(tokens: torch.Tensor, settings: torch.Tensor, history: torch.Tensor, counts: torch.Tensor) -> None:
    """``tokens[S]`` go to the ends of the histories of those rows that have a slot."""
    chain = chained(tokens.device)
    _record_kernel[(len(tokens),)](
        tokens, settings, history, counts, len(tokens), history.shape[1], counts.shape[1], chain,
        num_warps=1, launch_pdl=chain,
    )  # fmt: skip
