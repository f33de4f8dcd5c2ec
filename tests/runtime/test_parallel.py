"""Engines whose model is divided among processes: their answers, and what happens when a process fails."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from octavo import LLM, SamplingParams
from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.errors import ConfigError, EngineDead, OctavoError, OutOfMemory
from octavo.parallel import group
from octavo.runtime import parallel
from octavo.runtime.executor import Executor
from octavo.runtime.worker import worker_for
from tests.core.stub_engine import collect, make_request, run
from tests.waiting import PATIENCE, children, ended, until
from tools import tiny

PROMPTS = [{"prompt_token_ids": [5 + i, 7, 9, 20, 30, 40 + i] * (3 + i)} for i in range(5)]
HUNG_SECONDS = 5  # more than what a machine that is busy lets a rank wait for another that does its part
OPTIONS: dict[str, Any] = {"device": "cpu", "kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 4}
WISHES = {
    "greedy": SamplingParams(max_tokens=10, temperature=0, ignore_eos=True),
    "drawn": SamplingParams(max_tokens=10, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True),
    "penalised": SamplingParams(max_tokens=10, temperature=0, repetition_penalty=1.3, min_tokens=4),
    "scored": SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2, logprobs=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def both(folder: Path) -> Iterator[tuple[LLM, LLM]]:
    with LLM(folder, **OPTIONS) as one, LLM(folder, tensor_parallel_size=2, **OPTIONS) as two:
        yield one, two


def config_of(folder: Path, **options: Any) -> EngineConfig:
    return EngineConfig.of(**{"model": str(folder), "tensor_parallel_size": 2, **OPTIONS, **options})


def followers(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """Processes of ranks that ``parent``, by default this process, has started and that live."""
    return children(parent, "octavo.runtime.follower")


@pytest.mark.parametrize("wish", WISHES)
def test_answers_are_those_of_one_rank(wish: str, both: tuple[LLM, LLM]) -> None:
    one, two = (llm.generate(PROMPTS, WISHES[wish], use_tqdm=False) for llm in both)
    assert [o.outputs[0].token_ids for o in one] == [o.outputs[0].token_ids for o in two]
    if wish == "scored":
        wanted, found = one[4].prompt_logprobs, two[4].prompt_logprobs
        assert wanted is not None and found is not None and len(wanted) == len(found) > 1
        for a, b in zip(wanted[1:], found[1:], strict=True):
            assert a is not None and b is not None and a.keys() == b.keys()
            assert all(abs(a[token].logprob - b[token].logprob) < 1e-4 for token in a)


def test_threads_that_listen_to_ranks_do_not_keep_what_joins_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may end last. A process group that one of them lets go of while the interpreter ends aborts the process."""
    joined: list[weakref.ref[group.Group]] = []
    executors: list[Executor] = []

    def connect(*args: Any) -> group.Group:
        made = connected(*args)
        joined.append(weakref.ref(made))
        return made

    def start_ranks(*args: Any, **options: Any) -> Executor:
        executors.append(Executor(*args, **options))
        return executors[0]

    connected = group.connect
    monkeypatch.setattr(group, "connect", connect)
    monkeypatch.setattr(parallel, "Executor", start_ranks)
    core = EngineCore(config_of(folder), worker_for(config_of(folder)))
    assert joined[0]() is not None
    core.close()
    del core
    gc.collect()
    assert len(executors) == 1 and joined[0]() is None


def test_steps_that_overlap_give_the_same(folder: Path, both: tuple[LLM, LLM]) -> None:
    wanted = both[0].generate(PROMPTS[:3], WISHES["drawn"], use_tqdm=False)
    core = EngineCore(config_of(folder), worker_for(config_of(folder)), overlap=True)
    try:
        drawn = {"max_tokens": 10, "temperature": 0.8, "top_p": 0.9, "seed": 3}
        for i, prompt in enumerate(PROMPTS[:3]):
            core.add(make_request(core, str(i), prompt["prompt_token_ids"], **drawn))
        found = collect(run(core))
    finally:
        core.close()
    assert [found[str(i)] for i in range(3)] == [o.outputs[0].token_ids for o in wanted]
    assert not core.has_work()


def test_one_rank_starts_no_process_and_imports_nothing_for_several_or_for_transformers(folder: Path) -> None:
    code = (
        "import sys; from octavo import LLM\n"
        f"llm = LLM({str(folder)!r}, device='cpu', kv_cache_memory_bytes=1 << 20)\n"
        "print([m for m in sys.modules if m.startswith('octavo.runtime.exec') or m == 'torch.distributed.tensor'"
        " or m == 'octavo.runtime.parallel' or m.startswith('octavo.models.hf')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout.strip() == "[]"


def test_a_closed_engine_leaves_no_process(folder: Path) -> None:
    before = set(followers())
    llm = LLM(folder, tensor_parallel_size=2, **OPTIONS)
    started = set(followers()) - before
    assert len(started) == 1
    llm.close()
    assert not started & set(followers())


def test_a_model_that_cannot_be_divided_is_refused_and_leaves_no_process(folder: Path) -> None:
    before = followers()
    with pytest.raises(ConfigError, match="Give one of 1, 2, 4"):
        LLM(folder, tensor_parallel_size=3, **OPTIONS)
    assert followers() == before


def start(folder: Path, **options: Any) -> tuple[EngineCore, psutil.Process, list[OctavoError]]:
    """An engine, the process of rank 1, and what the engine is told when it dies."""
    deaths: list[OctavoError] = []
    before = set(followers())
    config = config_of(folder, **options)
    core = EngineCore(config, worker_for(config, on_death=deaths.append))
    (rank,) = set(followers()) - before
    return core, rank, deaths


def end_of_a_request(core: EngineCore) -> OctavoError:
    """How a request ends."""
    core.add(make_request(core, "a", [5, 6, 7] * 20, max_tokens=200))
    with pytest.raises(OctavoError) as error:
        run(core)
    core.close()
    return error.value


def test_a_killed_rank_is_told_at_once_and_ends_the_next_step(folder: Path) -> None:
    core, rank, deaths = start(folder)
    rank.kill()
    until(lambda: bool(deaths))
    error = end_of_a_request(core)
    assert error is deaths[0]
    assert isinstance(error, EngineDead)
    assert "rank 1 was killed by signal 9" in error.cause


def test_a_rank_that_is_killed_in_a_step_ends_the_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core, rank, deaths = start(folder)
    step, steps = core._worker.step, []

    def killed_in_the_fourth(plan: Any) -> None:
        steps.append(plan)
        if len(steps) == 4:
            rank.kill()
        step(plan)

    monkeypatch.setattr(core._worker, "step", killed_in_the_fourth)
    error = end_of_a_request(core)
    assert len(steps) >= 4
    assert "rank 1 was killed by signal 9" in error.cause
    until(lambda: deaths == [error])


def test_a_rank_that_hangs_is_named_when_the_time_is_over(folder: Path) -> None:
    core, rank, deaths = start(folder, distributed_timeout_seconds=HUNG_SECONDS)
    rank.suspend()
    error = end_of_a_request(core)
    assert "rank 1 did not take part in a step" in error.cause
    until(lambda: deaths == [error])
    assert rank not in followers()


def test_a_rank_without_memory_is_named(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "intermediate_size": 8192, "max_position_embeddings": 2048}
    wide = tiny.make(tmp_path, "llama", **sizes)  # the first layer of 1800 tokens asks the system for 59 MB at once
    core, rank, _ = start(wide)
    used = int(Path(f"/proc/{rank.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (40 << 20)  # for threads' own stacks and data, without which the C library ends the process
    resource.prlimit(rank.pid, resource.RLIMIT_AS, (limit, limit))
    core.add(make_request(core, "a", [5, 6, 7] * 600, max_tokens=2))
    with pytest.raises(OctavoError) as error:
        run(core)
    core.close()
    assert isinstance(error.value, OutOfMemory), error.value
    assert "rank 1" in error.value.cause


def test_ranks_end_with_a_parent_that_is_killed(folder: Path) -> None:
    code = (
        f"from octavo import LLM\nllm = LLM({str(folder)!r}, tensor_parallel_size=2, device='cpu',"
        " kv_cache_memory_bytes=1 << 20)\nprint('ready', flush=True)\nimport time; time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == b"ready\n"
    (rank,) = followers(psutil.Process(parent.pid))
    parent.kill()
    parent.wait()
    assert ended(rank)


@pytest.mark.parametrize(
    ("how", "cause"),
    [(signal.SIGKILL, "rank 1 was killed"), (signal.SIGSTOP, "rank 1 did not take part in a step")],
    ids=["killed", "stopped"],
)
def test_a_service_answers_every_request_and_leaves_no_process(how: signal.Signals, cause: str, folder: Path) -> None:
    asyncio.run(_fell_a_rank_of_a_service(folder, how, cause))


async def _fell_a_rank_of_a_service(folder: Path, how: signal.Signals, cause: str) -> None:
    deaths: list[OctavoError] = []
    config = config_of(folder, max_model_len=200, distributed_timeout_seconds=HUNG_SECONDS)
    llm = await AsyncLLM.start(config, log_level="error", on_death=deaths.append)
    try:
        (core,) = (child for child in children() if followers(child))
        (rank,) = followers(core)
        params = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)
        runs = [llm.run(await llm.prepare(prompt, params)) for prompt in PROMPTS]
        async for _ in runs[0]:
            break
        rank.send_signal(how)
        for generation in runs[1:]:
            with pytest.raises(EngineDead, match=cause):
                async for _ in generation:
                    pass
        assert ended(rank)
        until(lambda: not followers(core))
    finally:
        await llm.close()
    assert len(deaths) == 1
