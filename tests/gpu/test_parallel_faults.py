"""One model on two cards, and what befalls its ranks: requests get an error in time, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bench.tensor_parallel import CONFIGS
from octavo import SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import OctavoError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
MIB = 1 << 20
WIDE = {**CONFIGS["llama-3.1-8b"], "num_hidden_layers": 8}  # 5.6 GB of weights; a step of 8192 tokens takes 0.5 GB
OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "tensor_parallel_size": 2,
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 512 * MIB,
}
BALLAST = """
import sys, torch
kept = torch.empty(torch.cuda.mem_get_info(1)[0] - int(sys.argv[1]), dtype=torch.uint8, device="cuda:1")
torch.cuda.synchronize(1)
print("full", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No process, and the memory of both cards as it was."""
    before = used()
    yield
    assert within(10, lambda: not psutil.Process().children(recursive=True))
    assert within(10, lambda: all(now < then + 64 for now, then in zip(used(), before, strict=True))), used()


def used() -> list[int]:
    """MiB in use of each card."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()]


def within(seconds: float, reached: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def config_of(folder: Path, model: dict[str, Any], **options: Any) -> EngineConfig:
    (folder / "config.json").write_text(json.dumps(model))
    return EngineConfig.of(model=str(folder), **{**OPTIONS, "dtype": model["dtype"], **options})


@contextmanager
def ballast(free: int) -> Iterator[None]:
    """Leaves ``free`` bytes of the second card."""
    command = [sys.executable, "-c", BALLAST, str(free)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "full\n"
        yield
        process.kill()


@asynccontextmanager
async def service(config: EngineConfig, deaths: list[OctavoError]) -> AsyncIterator[tuple[AsyncLLM, psutil.Process]]:
    """A service and the process of rank 1."""
    llm = await AsyncLLM.start(config, log_level="error", on_death=deaths.append)
    (rank,) = (p for p in psutil.Process().children(recursive=True) if "octavo.runtime.follower" in p.cmdline())
    try:
        yield llm, rank
    finally:
        await llm.close()


async def ends(llm: AsyncLLM, prompt: int, count: int, befall: Callable[[], object]) -> list[str]:
    """How ten requests of ``count`` tokens end; `befall` is called once all have begun to answer."""
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    begun = asyncio.Semaphore(0)

    async def one(number: int) -> str:
        generation = llm.run(await llm.prepare({"prompt_token_ids": [number + 5] * prompt}, params))
        try:
            async for _ in generation:
                begun.release()
        except OctavoError as error:
            begun.release()
            return str(error)
        return "complete"

    runs = [asyncio.create_task(one(number)) for number in range(10)]
    for _ in runs:
        await begun.acquire()
    befall()
    return await asyncio.gather(*runs)


def test_a_rank_that_is_killed_in_the_middle_of_decoding(tmp_path: Path) -> None:
    async def scene() -> None:
        deaths: list[OctavoError] = []
        async with service(config_of(tmp_path, CONFIGS["tiny"]), deaths) as (llm, rank):
            assert await ends(llm, 20, 5, lambda: None) == ["complete"] * 10
            found = await asyncio.wait_for(ends(llm, 20, 8000, rank.kill), 15)
            assert all("the process of rank 1 was killed by signal 9" in text for text in found), found
        assert len(deaths) == 1

    asyncio.run(scene())


def test_a_rank_that_hangs_is_named_when_the_time_is_over(tmp_path: Path) -> None:
    async def scene() -> None:
        deaths: list[OctavoError] = []
        config = config_of(tmp_path, CONFIGS["tiny"], distributed_timeout_seconds=4)
        async with service(config, deaths) as (llm, rank):
            found = await asyncio.wait_for(ends(llm, 20, 8000, lambda: rank.send_signal(signal.SIGSTOP)), 20)
            assert all("rank 1 did not take part in a step" in text for text in found), found

    asyncio.run(scene())


@pytest.mark.parametrize("free", [300 * MIB, 2000 * MIB, 4200 * MIB], ids=["no context", "no weights", "no cache"])
def test_a_rank_without_memory_at_the_start_is_named(free: int, tmp_path: Path) -> None:
    config = config_of(tmp_path, WIDE, kv_cache_memory_bytes=None)
    with ballast(free), pytest.raises(OctavoError, match="rank 1") as error:
        asyncio.run(asyncio.wait_for(AsyncLLM.start(config, log_level="error"), 60))
    assert error.value.id == "MEM001" or free == 300 * MIB, error.value  # libraries say it in their own words


def test_a_rank_without_memory_in_a_step_is_named(tmp_path: Path) -> None:
    async def scene() -> None:
        async with service(config_of(tmp_path, WIDE), []) as (llm, _):
            with ballast(32 * MIB):
                found = await asyncio.wait_for(ends(llm, 4000, 200, lambda: None), 20)
        assert all("rank 1" in text and "memory" in text for text in found), found

    asyncio.run(scene())


def test_a_closed_engine_gives_the_memory_back(tmp_path: Path) -> None:
    async def scene() -> None:
        async with service(config_of(tmp_path, WIDE), []) as (llm, _):
            assert await ends(llm, 20, 50, lambda: None) == ["complete"] * 10
            began = time.monotonic()
        assert time.monotonic() - began < 10

    asyncio.run(scene())
