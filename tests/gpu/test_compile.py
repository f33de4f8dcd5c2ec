"""Kernels compile for a card where there is none: Triton's compilers need only its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile them for the card at hand")

# In a process of its own, since this one has an interpreter in the compilers' place.
PROGRAM = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


driver.set_active(Hopper())
from octavo.kernels import attn_triton, blocks_triton, edit_triton, experts_triton, linear_triton, peers_triton
from octavo.kernels import logprobs_triton, rehearsal, sampling_triton, step_triton, survey_triton, triton_ops
from octavo.kernels.linear_triton import Launch
from tests.kernels import grid

blocks_triton._selects_bytes = lambda x: True
survey_triton.is_card = lambda device: True
for module in (attn_triton, blocks_triton, edit_triton, linear_triton, peers_triton, step_triton, survey_triton,
               triton_ops):
    module.chained = lambda device: True
half = torch.bfloat16


def launches():
    batch = grid.Case(items=grid.DECODES).batch(half)
    batch.cache = batch.cache.to(torch.float8_e4m3fn)
    attn_triton.attention(*batch.arguments())
    batch.fill_up(10, 2)
    attn_triton.attention(*batch.arguments())
    ints = batch.meta.rows
    step_triton.take_in_(ints, ints, ints, ints, ints, ints)
    step_triton.put_(ints, ints, ints)
    x, weight = torch.zeros(64, 1024, dtype=half), torch.zeros(512, 1024, dtype=half)
    linear_triton.split_linear(x, weight, None, Launch(64, 128, 2, 4, 5, prefetch=256), "silu")
    for kind in ("Q4_1", "Q8_0"):
        blocks = torch.zeros(64, 32 * blocks_triton.SIZES[kind], dtype=torch.uint8)
        blocks_triton.pack_blocks([(kind, blocks)], None, half)(x)
    logits, settings = torch.zeros(2, 128256, dtype=half), torch.zeros(11, 2, dtype=torch.int32)
    seen = torch.zeros(1, 128256, dtype=torch.int16)
    sampling_triton.draw(logits, settings, settings, seen, True, True)
    edit_triton.record_(settings[0], settings, seen)
    logprobs_triton.logprobs(logits, settings[0], 3)
    triton_ops.greedy(logits)
    pairs = experts_triton.group(torch.zeros(2, 2, dtype=torch.int64), 4)
    experts_triton.grouped_linear(x, weight.view(4, 128, 1024), None, pairs, by_token=True)
    experts_triton.grouped_linear(x.float()[:, :128], weight.float().view(4, 128, 1024).mT, None, pairs, by_token=False)
    experts_triton.combine(x, x, pairs)
    peers = peers_triton.PeerMemory(0, torch.zeros(2, dtype=torch.int64), None)
    peers.sum(x)
    peers.add_rms_norm(x, x, x[0], 1e-5)
    peers.gather(x)


compiled = []
__import__("triton").knobs.runtime.jit_post_compile_hook = lambda **details: compiled.append(details["repr"])
rehearsal._SLOW = float("inf")  # in this process alone: a test machine has few cores
rehearsal.rehearse(launches)
print(len(compiled))
"""


@pytest.mark.timeout(600)  # ten seconds of a core, which others may want
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 12


def test_work_that_fails_does_not_leave_compilers_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    broken = PROGRAM.replace("    x, weight = ", "    raise ZeroDivisionError('in the middle')\n    x, weight = ")
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert "in the middle" in done.stderr
