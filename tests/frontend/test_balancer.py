"""Several engines in processes behind one client: shares, deaths, restarts."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Awaitable, Callable

import psutil
import pytest

from octavo.cache.prefix import page_hashes
from octavo.config import EngineConfig
from octavo.errors import ConfigError, EngineDead, OctavoError, Overloaded, RequestError
from octavo.frontend import core_client, fleet
from octavo.frontend.balancer import Balancer, open_engines
from octavo.frontend.core_client import CoreClient
from octavo.frontend.core_process import Core, CoreProcess
from octavo.frontend.fleet import Processes
from octavo.types import Request, Sampling, TokenOutput
from tests.core.stub_engine import expected
from tests.waiting import PATIENCE, children

CONFIG = EngineConfig.of(
    model="stub", max_num_seqs=8, max_num_batched_tokens=64, data_parallel_size=2, device="cpu", max_waiting=1000
)


class Stubs(Processes):
    """Engines in processes, which a test can reach; ``broken`` ones do not start any more, ``hung`` ones for ever."""

    def __init__(self, tries: int = 3) -> None:
        super().__init__(CONFIG, "stub", log_level="error", hash_key=b"k" * 32)
        self.tries = tries
        self.cores: dict[int, CoreProcess] = {}
        self.broken: set[int] = set()
        self.hung: set[int] = set()

    async def open(self, index: int) -> Core:
        if index in self.broken:
            raise ConfigError("it is broken.")
        core = await super().open(index)
        assert isinstance(core, CoreProcess)
        if index in self.hung:
            psutil.Process(core.process.pid).suspend()
        self.cores[index] = core
        return core


def run(work: Callable[[Balancer, Stubs], Awaitable[None]], *, tries: int = 3) -> list[OctavoError]:
    """Runs ``work`` over two engines; returns what `on_death` was called with. No process may be left."""
    deaths: list[OctavoError] = []
    before = set(children())

    async def session() -> None:
        stubs = Stubs(tries)
        balancer = await Balancer(stubs, 2, on_death=deaths.append).start()
        try:
            await asyncio.wait_for(work(balancer, stubs), 2 * PATIENCE)
        finally:
            await balancer.close()

    asyncio.run(session())
    assert set(children()) <= before
    return deaths


def request(balancer: Balancer, id: str, tokens: list[int], max_tokens: int = 8) -> Request:
    raw = array("i", tokens).tobytes()
    hashes = page_hashes(balancer.info.hash_key, b"", raw, balancer.info.page_size)
    return Request(id=id, token_ids=raw, page_hashes=hashes, sampling=Sampling(max_tokens=max_tokens))


async def collect(balancer: Balancer, one: Request) -> list[TokenOutput]:
    return [output async for batch in await balancer.submit(one) for output in batch]


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def owners(balancer: Balancer, id: str) -> list[int]:
    """Engines that have request ``id``."""
    found = []
    for slot in balancer._fleet.slots:
        assert isinstance(slot.client, CoreClient | None)
        if slot.client is not None and id in slot.client._pending:
            found.append(slot.index)
    return found


def test_requests_are_shared_out_answered_rightly_and_counted_in_sum() -> None:
    async def work(balancer: Balancer, stubs: Stubs) -> None:
        assert (balancer.info.max_num_seqs, balancer.info.num_pages) == (16, 2048)
        prompts = [list(range(i + 1, i + 30)) for i in range(64)]
        results = await asyncio.gather(
            *(collect(balancer, request(balancer, f"r{i}", p)) for i, p in enumerate(prompts))
        )
        assert [tokens(outputs) for outputs in results] == [expected(p, 8) for p in prompts]
        assert (await balancer.health()).generation_tokens == 64 * 8
        each = [state.stats.generation_tokens for state in balancer.engines()]
        assert sum(each) == 64 * 8
        assert min(each) > 64
        await balancer.reset_prefix_cache()

    assert run(work) == []


def test_an_equal_prefix_is_found_in_the_cache_of_the_engine_that_has_it() -> None:
    async def work(balancer: Balancer, stubs: Stubs) -> None:
        for i in range(6):
            outputs = await collect(balancer, request(balancer, f"r{i}", [*range(160), i]))
            assert outputs[0].cached == (160 if i else 0)
        each = sorted(state.stats.prompt_tokens for state in balancer.engines())
        assert each == [0, 6 * 161]

    run(work)


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    async def work(balancer: Balancer, stubs: Stubs) -> None:
        stream = await balancer.submit(request(balancer, "a", [1, 2], 1000))
        with pytest.raises(RequestError, match="is running"):
            await balancer.submit(request(balancer, "a", [1, 2]))
        await balancer.abort(["a"])
        async for batch in stream:
            last = batch[-1]
        assert last.finish_reason == "abort"
        assert len(tokens(await collect(balancer, request(balancer, "a", [1, 2])))) == 8

    run(work)


def test_aborts_reach_the_engine_that_has_the_request() -> None:
    async def work(balancer: Balancer, stubs: Stubs) -> None:
        ids = [f"r{i}" for i in range(6)]
        streams = [await balancer.submit(request(balancer, id, [i], 2000)) for i, id in enumerate(ids)]
        await balancer.abort([*ids, "unknown"])
        for stream in streams:
            assert [o.finish_reason async for batch in stream for o in batch][-1] == "abort"
        stats = await balancer.health()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)

    run(work)


def test_a_dead_engine_fails_what_had_begun_others_do_not_notice_and_it_comes_back() -> None:
    async def work(balancer: Balancer, stubs: Stubs) -> None:
        first = psutil.Process(stubs.cores[0].process.pid)
        for attempt in range(10):  # it may be done before it is stopped
            first.suspend()
            ids = [f"r{attempt}-{i}" for i in range(4)]
            streams = {id: await balancer.submit(request(balancer, id, [i, i], 2000)) for i, id in enumerate(ids)}
            on_first = {id for id in streams if owners(balancer, id) == [0]}
            assert len(on_first) == 2
            first.resume()
            for id in on_first:
                await anext(streams[id])
            first.suspend()
            await asyncio.sleep(0.2)  # what it has sent arrives
            if all(owners(balancer, id) == [0] for id in on_first):
                break
            first.resume()
            for stream in streams.values():
                async for _ in stream:
                    pass
        first.kill()
        for id, stream in streams.items():
            if id in on_first:
                with pytest.raises(EngineDead, match="killed by signal 9"):
                    async for _ in stream:
                        pass
            else:
                assert [o.finish_reason async for batch in stream for o in batch][-1] == "length"
        await until(lambda: all(state.running for state in balancer.engines()))
        outputs = [await collect(balancer, request(balancer, f"s{i}", [50 + i])) for i in range(4)]
        assert [tokens(o) for o in outputs] == [expected([50 + i], 8) for i in range(4)]
        assert all(state.stats.generation_tokens for state in balancer.engines())

    assert run(work) == []


@pytest.fixture
def _no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that has died is not started again during the test."""
    monkeypatch.setattr(fleet, "FIRST_PAUSE_SECONDS", 1e6)
    monkeypatch.setattr(fleet, "LONGEST_PAUSE_SECONDS", 1e6)


@pytest.mark.usefixtures("_no_restart")
def test_what_had_not_begun_is_given_to_another_engine() -> None:
    async def work(balancer: Balancer, stubs: Stubs) -> None:
        psutil.Process(stubs.cores[0].process.pid).suspend()
        tasks = [asyncio.create_task(collect(balancer, request(balancer, f"r{i}", [i, i]))) for i in range(8)]
        await until(lambda: any(owners(balancer, f"r{i}") == [0] for i in range(8)))
        await balancer.abort(["r0"])
        stubs.cores[0].process.kill()
        results = await asyncio.gather(*tasks)
        assert [tokens(o) for o in results[1:]] == [expected([i, i], 8) for i in range(1, 8)]
        assert results[0][-1].finish_reason == "abort"
        assert not balancer.engines()[0].running
        assert "killed by signal 9" in balancer.engines()[0].reason

    run(work)


@pytest.mark.usefixtures("_no_restart")
def test_a_request_that_kills_engines_gets_its_error_after_two() -> None:
    async def work(balancer: Balancer, stubs: Stubs) -> None:
        for core in stubs.cores.values():
            psutil.Process(core.process.pid).suspend()
        task = asyncio.create_task(collect(balancer, request(balancer, "bad", [1])))
        for _ in range(2):
            await until(lambda: owners(balancer, "bad") != [])
            (index,) = owners(balancer, "bad")
            stubs.cores[index].process.kill()
            await until(lambda: not balancer.engines()[index].running)  # noqa: B023
        with pytest.raises(EngineDead):
            await task

    run(work)


def test_an_engine_that_does_not_start_again_is_given_up_and_the_last_one_ends_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "FIRST_PAUSE_SECONDS", 0.01)

    async def work(balancer: Balancer, stubs: Stubs) -> None:
        stubs.broken = {0, 1}
        stubs.cores[0].process.kill()
        await until(lambda: balancer._fleet.slots[0].given_up)
        assert "broken" in balancer.engines()[0].reason
        assert len(tokens(await collect(balancer, request(balancer, "a", [1])))) == 8
        stubs.cores[1].process.kill()
        await until(lambda: balancer._fleet.slots[1].given_up)
        with pytest.raises(Overloaded):
            await balancer.submit(request(balancer, "b", [1]))
        with pytest.raises(EngineDead):
            await balancer.health()

    (death,) = run(work)
    assert "no engine is left" in death.cause


def test_the_health_of_all_does_not_wait_for_one_that_is_late() -> None:
    async def work(balancer: Balancer, stubs: Stubs) -> None:
        psutil.Process(stubs.cores[0].process.pid).suspend()
        late = asyncio.timeout(core_client.HEARTBEAT_SECONDS - 5)  # which the late one has for its answer
        async with late:
            assert (await balancer.health()).pages_total == balancer.info.num_pages
        psutil.Process(stubs.cores[1].process.pid).suspend()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(balancer.health(), 1.5)

    run(work)


def test_an_engine_that_hangs_is_ended_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PING_SECONDS", 0.1)
    monkeypatch.setattr(core_client, "HEARTBEAT_SECONDS", 0.5)
    answers = CoreClient.answers
    hung: CoreProcess | None = None

    async def answers_in_time(self: CoreClient, seconds: float) -> bool:
        """The others have all the time that they may need on a busy machine."""
        return await answers(self, 2.0 if self._core is hung else seconds)

    monkeypatch.setattr(CoreClient, "answers", answers_in_time)

    async def work(balancer: Balancer, stubs: Stubs) -> None:
        nonlocal hung
        hung = stubs.cores[0]
        psutil.Process(hung.process.pid).suspend()
        tasks = [asyncio.create_task(collect(balancer, request(balancer, f"r{i}", [i, i]))) for i in range(8)]
        results = await asyncio.gather(*tasks)
        assert [tokens(o) for o in results] == [expected([i, i], 8) for i in range(8)]
        await until(lambda: stubs.cores[0] is not hung and all(state.running for state in balancer.engines()))

    assert run(work) == []


def test_a_start_that_fails_raises_its_error_and_ends_the_others() -> None:
    async def work() -> None:
        stubs = Stubs()
        stubs.broken = {1}
        with pytest.raises(ConfigError, match="broken"):
            await open_engines(stubs, 2)

    before = set(children())
    asyncio.run(work())
    assert set(children()) <= before


def test_closing_while_an_engine_hangs_at_its_start_leaves_no_process() -> None:
    async def work(balancer: Balancer, stubs: Stubs) -> None:
        first, stubs.hung = stubs.cores[0], {0}
        first.process.kill()
        await until(lambda: stubs.cores[0] is not first)
        assert len(tokens(await collect(balancer, request(balancer, "a", [1])))) == 8

    run(work)
