"""What befalls a server of several engines and several API processes: every request gets one terminal answer."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.serving import STUB, Server, ended, running

LONG = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True, "stream": True}
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


@pytest.fixture
def server(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Of the parameters (seconds to drain, engines, API processes)."""
    with running(["-c", STUB, str(model), *map(str, request.param)], tmp_path / "log") as made:
        yield made


async def terminal(client: httpx.AsyncClient, begun: asyncio.Semaphore) -> str:
    """How a long streamed request ended: the reason of its last choice, an error's code, or "cut" without either.

    Releases ``begun`` with its first token.
    """
    ends, tokens = [], 0
    try:
        async with client.stream("POST", "/v1/completions", json=LONG) as answer:
            if answer.status_code != 200:
                return str(json.loads(await answer.aread())["error"]["code"])
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                tokens += 1
                if tokens == 1:
                    begun.release()
                if "error" in event:
                    ends.append(str(event["error"]["code"]))
                ends += [choice["finish_reason"] for choice in event.get("choices", ()) if choice["finish_reason"]]
    except httpx.TransportError:
        return "cut"
    (end,) = ends
    return end


async def under_load(server: Server, count: int, fault: Callable[[], None] | None = None) -> collections.Counter[str]:
    """How ``count`` requests ended, each on a connection of its own, in the middle of which ``fault`` happened."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:
        begun = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(terminal(client, begun)) for _ in range(count)]
        if fault is not None:
            for _ in range(8 * len(server.cores)):
                await begun.acquire()
            fault()
        return collections.Counter(await asyncio.gather(*tasks))


def health(server: Server) -> str:
    return str(httpx.get(f"{server.url}/health", timeout=10).json()["status"])


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("server", [(0, 2, 1)], indirect=True)
def test_a_killed_engine_takes_only_its_running_requests_along_and_comes_back(server: Server) -> None:
    seen = []

    def kill() -> None:
        server.core.kill()
        ended(server.core, 5)
        until(lambda: seen.append(health(server)) or seen[-1] == "degraded")  # type: ignore[func-returns-value]

    ends = asyncio.run(under_load(server, 40, kill))
    assert set(ends) == {"length", "ENG001"}
    assert 1 <= ends["ENG001"] <= 24
    until(lambda: health(server) == "ok")
    assert len(server.children("octavo.core.process")) == 2
    assert "killed by signal 9" in server.log()
    assert asyncio.run(under_load(server, 16)) == {"length": 16}
    server.process.terminate()
    assert server.wait(3) == 0


@pytest.mark.parametrize("server", [(0, 1, 2)], indirect=True)
def test_a_killed_api_process_cuts_its_own_connections_frees_their_pages_and_comes_back(server: Server) -> None:
    ends = asyncio.run(under_load(server, 40, server.apis[0].kill))
    assert set(ends) == {"length", "cut"}
    port = int(server.url.rpartition(":")[2])
    for one in [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(16)]:  # none is refused
        one.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert one.recv(100).startswith(b"HTTP/1.1 200")
        one.close()
    until(lambda: len(server.children("octavo.server.api_process")) == 2 and "runs again" in server.log())
    until(lambda: server.metric("num_requests_running") == 0)
    assert server.metric("kv_cache_usage_perc") == 0
    assert asyncio.run(under_load(server, 16)) == {"length": 16}
    assert server.metric("request_success_total") >= ends["length"] + 16  # counted over both, and over the restart
    server.process.terminate()
    assert server.wait(3) == 0


@pytest.mark.parametrize("server", [(0, 1, 2)], indirect=True)
def test_the_only_engine_of_several_api_processes_ends_all_with_1(server: Server) -> None:
    ends = asyncio.run(under_load(server, 40, server.core.kill))
    assert set(ends) <= {"ENG001", "length"}
    assert ends["ENG001"] >= 8
    assert server.wait(3) == 1


@pytest.mark.parametrize(
    ("server", "number"), [((0, 2, 2), signal.SIGTERM), ((0, 2, 1), signal.SIGINT)], indirect=["server"]
)
def test_a_signal_under_load_answers_every_request_and_ends_all(server: Server, number: signal.Signals) -> None:
    began = 0.0

    def stop() -> None:
        nonlocal began
        began = time.monotonic()
        server.process.send_signal(number)

    ends = asyncio.run(under_load(server, 40, stop))
    assert set(ends) <= {"abort", "length"}
    assert ends["abort"]
    assert server.wait(3) == 0
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("server", [(20, 2, 2)], indirect=True)
def test_draining_lets_the_requests_of_all_api_processes_end_by_themselves(server: Server) -> None:
    assert asyncio.run(under_load(server, 40, server.process.terminate)) == {"length": 40}
    assert server.wait(3) == 0


@pytest.mark.parametrize("server", [(0, 2, 2)], indirect=True)
def test_a_killed_supervisor_leaves_no_process_behind(server: Server) -> None:
    children = server.children("")
    assert len(children) == 4
    server.process.kill()
    assert server.wait(3) == -signal.SIGKILL
    assert all(ended(child, 3) for child in children)


@pytest.mark.parametrize("server", [(0, 2, 2)], indirect=True)
def test_an_address_is_not_shared_with_another_server(server: Server, model: Path) -> None:
    port = server.url.rpartition(":")[2]
    for apis in ("1", "2"):
        command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", port, "--api-server-count", apis]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 2
        assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


@pytest.mark.parametrize("apis", ["1", "2"])
def test_an_engine_that_hangs_at_its_start_does_not_keep_the_server_from_ending(model: Path, apis: str) -> None:
    command = [sys.executable, "-c", STUB, str(model), "0", "2", apis]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.DEVNULL)
    parent, cores = psutil.Process(process.pid), []
    while len(cores) < 2:
        cores = [child for child in parent.children() if "octavo.core.process" in " ".join(child.cmdline())]
    cores[0].suspend()
    time.sleep(1.0)
    assert process.poll() is None
    children = parent.children()
    process.terminate()
    assert process.wait(8) in (0, -signal.SIGTERM)
    assert all(ended(child, 3) for child in children)


def test_a_start_that_fails_ends_with_its_own_exit_code_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "octavo", "serve", str(tmp_path), "--port", "0"]
    for more in (["--data-parallel-size", "2"], ["--api-server-count", "2"]):
        done = subprocess.run([*command, *more], env=ENV, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
    assert psutil.Process().children() == []


@pytest.mark.parametrize("count", ["0", "1000"])
def test_a_count_of_api_processes_out_of_range_is_refused(model: Path, count: str) -> None:
    command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", "0", "--api-server-count", count]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert "outside [1, 256]" in done.stderr
