from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from octavo.config import EngineConfig
from octavo.core.process import run
from octavo.errors import EngineDead, OutOfMemory, RequestError
from octavo.frontend import core_process
from octavo.frontend.core_client import MAX_BURST, CoreClient
from octavo.frontend.core_process import Core, CoreProcess, decode_output, spawn
from octavo.types import (
    Abort,
    Dead,
    Hello,
    Outputs,
    Ping,
    Pong,
    Ready,
    Request,
    ResetPrefixCache,
    Shutdown,
    Submit,
    TokenOutput,
)
from tests.core.memory_channel import MemoryChannel
from tests.core.stub_engine import expected, make_engine, make_request
from tests.waiting import PATIENCE, ended, until

CONFIG = EngineConfig.of(model="stub", max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture
def core() -> Iterator[CoreProcess]:
    made = spawn(CONFIG, "stub", log_level="error")
    yield made
    made.stop()


def folder_of(core: CoreProcess) -> Path:
    return core._folder


async def tokens_of(client: CoreClient, request: Request) -> tuple[list[int], TokenOutput]:
    ids: list[int] = []
    async for batch in await client.submit(request):
        assert batch
        for output in batch:
            ids += output.token_ids
            last = output
    return ids, last


# --- the loop, without a process -------------------------------------------------------------------------------------


def test_loop_answers_requests_aborts_pings_and_resets_and_ends_on_shutdown() -> None:
    engine, channel = make_engine(), MemoryChannel()
    prompt = list(range(40, 60))
    for message in (
        Hello(),
        Submit([make_request(engine, "a", prompt), make_request(engine, "b", prompt, max_tokens=100)]),
        Ping(5),
        Abort(["b"]),
        ResetPrefixCache(6),
        Submit([make_request(engine, "", [])]),
    ):
        channel.put(message)
    original, steps = engine.step, []

    def step() -> list[TokenOutput]:
        steps.append(1)
        if len(steps) == 20:
            channel.put(Shutdown())
        return original() if engine.scheduler.has_work() else []

    engine.step = step  # type: ignore[method-assign]
    engine.has_work = lambda: True  # type: ignore[method-assign]
    assert run(lambda: engine, channel) == 0
    messages = []
    while not channel.outbox.empty():
        messages.append(channel.outbox.get())
    assert messages[0] == Ready(engine.info)
    assert [m.nonce for m in messages if isinstance(m, Pong)] == [5, 6]
    outputs = [o for m in messages if isinstance(m, Outputs) for o in m.outputs]
    assert [t for o in outputs if o.id == "a" for t in o.token_ids] == expected(prompt, 8)
    ends = {o.id: (o.finish_reason, o.status) for o in outputs if o.finish_reason}
    assert ends == {"a": ("length", 0), "b": ("abort", 0), "": ("error", 400)}


def test_an_exception_in_the_loop_becomes_one_dead_message_and_exit_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    engine, channel = make_engine(), MemoryChannel()

    def step() -> list[TokenOutput]:
        raise ZeroDivisionError("seven by zero")

    engine.step = step  # type: ignore[method-assign]
    channel.put(Hello())
    channel.put(Submit([make_request(engine, "a", [1, 2, 3])]))
    assert run(lambda: engine, channel) == 1
    assert isinstance(channel.outbox.get_nowait(), Ready)
    dead = channel.outbox.get_nowait()
    assert isinstance(dead, Dead)
    assert "ZeroDivisionError" in dead.cause
    assert "seven by zero" not in dead.cause  # clients see the cause, and what an error says can be anything
    log = capfd.readouterr().err
    assert "in step" in log and "ZeroDivisionError: seven by zero" in log


def test_an_error_at_start_carries_its_class_id_and_exit_code() -> None:
    channel = MemoryChannel()

    def build() -> object:
        raise OutOfMemory("12 GB do not fit into 8 GB.", "Use a smaller model.", id="MEM007")

    assert run(build, channel) == 4  # type: ignore[arg-type]
    error = channel.outbox.get_nowait().error()  # type: ignore[union-attr]
    assert type(error) is OutOfMemory
    assert (error.cause, error.remedy, error.id) == ("12 GB do not fit into 8 GB.", "Use a smaller model.", "MEM007")


# --- the process -----------------------------------------------------------------------------------------------------


def test_a_spawned_core_serves_64_requests_at_once_and_is_idle_afterwards(
    core: CoreProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_process, "GRACE_SECONDS", PATIENCE)  # that it ends when asked is what matters
    info = core.wait_ready()
    assert (info.max_num_seqs, info.vocab_size, len(info.hash_key)) == (4, 256, 32)

    async def session() -> None:
        client = CoreClient(core, info)
        prompts = [list(range(i + 1, i + 30)) for i in range(64)]
        requests = [make_request_for(client, f"r{i}", prompt) for i, prompt in enumerate(prompts)]
        results = await asyncio.gather(*(tokens_of(client, r) for r in requests))
        assert [ids for ids, _ in results] == [expected(p, 8) for p in prompts]
        stats = await client.health()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        assert stats.generation_tokens == 64 * 8
        await client.reset_prefix_cache()
        assert (await tokens_of(client, make_request_for(client, "again", prompts[0])))[1].cached == 0
        process = psutil.Process(core.process.pid)
        before = sum(process.cpu_times()[:2])
        await asyncio.sleep(0.5)
        assert sum(process.cpu_times()[:2]) - before < 0.1  # 0.00 where it is quiet
        await client.close()
        with pytest.raises(EngineDead):
            await client.submit(requests[0])

    asyncio.run(session())
    assert core.process.returncode == 0


def make_request_for(client: CoreClient, id: str, prompt: list[int], **sampling: object) -> Request:
    return make_request(client, id, prompt, **sampling)  # type: ignore[arg-type]


def steps_of(core: CoreProcess) -> int:
    """Asked for over another connection, so that nothing is read from that of ``core``."""
    other = Core(core.address)
    try:
        other.wait_ready()
        other.send(Ping(1))
        answer = decode_output(other.socket.recv())
        assert isinstance(answer, Pong)
        return answer.stats.steps
    finally:
        other.stop()


def test_a_backlog_of_outputs_leaves_other_tasks_their_turn(core: CoreProcess) -> None:
    async def session() -> None:
        client = CoreClient(core, core.wait_ready())
        streams = [await client.submit(make_request_for(client, f"r{i}", [1, 2, 3], max_tokens=2000)) for i in range(4)]
        await anext(streams[0])
        behind = client.stats.steps
        until(lambda: steps_of(core) > behind + 500)  # the engine runs ahead
        for _ in range(5):
            await asyncio.sleep(0)
        assert client.stats.steps - behind < 6 * (MAX_BURST + 1)
        assert (await client.health()).steps - behind > 200
        assert len(await anext(streams[1])) > MAX_BURST  # what came meanwhile is handed over at once
        await client.close()

    asyncio.run(session())


def test_abort_ends_a_request_and_frees_its_pages(core: CoreProcess) -> None:
    async def session() -> None:
        client = CoreClient(core, core.wait_ready())
        stream = await client.submit(make_request_for(client, "a", [1, 2, 3], max_tokens=2000))
        await client.abort(["a", "unknown"])
        reasons = [output.finish_reason async for batch in stream for output in batch]
        assert reasons[-1] == "abort"
        stats = await client.health()
        assert (stats.running, stats.pages_used) == (0, 0)
        await client.close()

    asyncio.run(session())


def test_an_id_in_use_and_a_message_over_the_limit_are_refused(
    core: CoreProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def session() -> None:
        client = CoreClient(core, core.wait_ready())
        first = make_request_for(client, "a", [1, 2, 3])
        await client.submit(first)
        with pytest.raises(RequestError, match="is running"):
            await client.submit(first)
        monkeypatch.setattr("octavo.frontend.core_client.MAX_MESSAGE_BYTES", 100)
        with pytest.raises(RequestError, match="over 100"):
            await client.submit(make_request_for(client, "long", [1] * 100))
        await client.close()

    asyncio.run(session())


def test_close_answers_what_is_pending(core: CoreProcess) -> None:
    async def session() -> None:
        client = CoreClient(core, core.wait_ready())
        stream = await client.submit(make_request_for(client, "a", [1, 2, 3], max_tokens=2000))
        await client.close()
        assert [o.finish_reason async for batch in stream for o in batch][-1] == "abort"

    asyncio.run(session())


def test_a_killed_engine_ends_every_pending_request_with_an_error(core: CoreProcess) -> None:
    async def session() -> None:
        deaths: list[Exception] = []
        client = CoreClient(core, core.wait_ready(), on_death=deaths.append)
        streams = [
            await client.submit(make_request_for(client, f"r{i}", [1, 2, 3], max_tokens=2000)) for i in range(10)
        ]
        core.process.kill()
        for stream in streams:
            with pytest.raises(EngineDead, match="killed by signal 9"):
                async for _ in stream:
                    pass
        assert len(deaths) == 1
        with pytest.raises(EngineDead):
            await client.health()
        with pytest.raises(EngineDead):
            await client.submit(make_request_for(client, "later", [1]))
        await client.close()

    asyncio.run(session())


def test_the_last_message_of_a_core_that_was_not_killed_is_waited_for_longer(core: CoreProcess) -> None:
    core.wait_ready()
    core.send(Shutdown())
    assert core.process.wait(PATIENCE) == 0
    patient = core.last_words_ms()
    killed = spawn(CONFIG, "stub")
    killed.process.kill()
    killed.process.wait()
    assert killed.last_words_ms() < patient
    killed.stop()


def test_a_core_that_is_killed_during_its_start_reports_how(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(600)")  # it is not ready before it is killed
    core = spawn(CONFIG, "stub", env={"PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))})
    core.process.kill()
    with pytest.raises(EngineDead, match="killed by signal 9"):
        core.wait_ready()
    core.stop()
    assert not folder_of(core).exists()


def test_sigint_and_sigterm_are_left_to_the_parent(core: CoreProcess) -> None:
    core.wait_ready()
    os.kill(core.process.pid, signal.SIGINT)
    os.kill(core.process.pid, signal.SIGTERM)
    core.send(Ping(1))
    assert core.socket.poll(PATIENCE * 1000)
    assert core.process.poll() is None


def test_the_sockets_lie_in_a_private_folder_that_goes_away(core: CoreProcess) -> None:
    core.wait_ready()
    assert folder_of(core).stat().st_mode & 0o777 == 0o700
    core.stop()
    assert not folder_of(core).exists()


def test_a_core_whose_parent_is_killed_ends_at_once_and_removes_the_sockets() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    child = psutil.Process(int(pid))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert ended(child)
    assert not Path(folder).exists()


PARENT = textwrap.dedent(
    """
    import time
    from octavo.config import EngineConfig
    from octavo.frontend.core_process import spawn
    core = spawn(EngineConfig.of(model="stub"), "stub", log_level="error")
    core.wait_ready()
    print(core.process.pid, core._folder, flush=True)
    time.sleep(600)
    """
)
