"""What befalls a server of several engines and several API processes: every request gets one terminal answer."""

from __future__ import annotations

import asyncio
import collections
import json
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

from tests.e2e.serving import PACED, STUB, Server, running, total
from tests.waiting import PATIENCE, children, ended, until

LONG = {"prompt": [5, 6, 7], "max_tokens": 500, "ignore_eos": True, "stream": True}


# Code for engines: none starts while the file is there.
GATE = """
import os, time
while os.path.exists({gate!r}):
    time.sleep(0.01)
"""


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file for `GATE`."""
    return tmp_path / "gate"


@pytest.fixture
def server(model: Path, tmp_path: Path, gate: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Of the parameters (seconds to drain, engines, API processes)."""
    command = ["-c", STUB, str(model), *map(str, request.param)]
    with running(command, tmp_path / "log", engines=GATE.format(gate=str(gate)) + PACED) as made:
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
    """How ``count`` requests ended, each on a connection of its own, in the middle of which ``fault`` happened.

    By then the engines have all of the requests, as many as fit into a step have begun, and none has ended.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    served = server.metric("request_success_total")
    async with httpx.AsyncClient(base_url=server.url, timeout=2 * PATIENCE, limits=limits) as client:
        begun = asyncio.Semaphore(0)
        if fault is not None:
            server.hold()
        tasks = [asyncio.create_task(terminal(client, begun)) for _ in range(count)]
        if fault is not None:
            for _ in range(8 * len(server.cores)):
                await begun.acquire()
            there = 0.0
            while there < count:
                text = (await client.get("/metrics")).text
                there = sum(total(text, f"num_requests_{what}") for what in ("running", "waiting"))
                there += total(text, "request_success_total") - served
            fault()
            server.release()
        return collections.Counter(await asyncio.gather(*tasks))


def health(server: Server) -> str:
    return str(server.get("/health").json()["status"])


@pytest.mark.parametrize("server", [(0, 2, 1)], indirect=True)
def test_a_killed_engine_takes_only_its_running_requests_along_and_comes_back(server: Server, gate: Path) -> None:
    def kill() -> None:
        gate.touch()
        server.core.kill()
        assert ended(server.core)
        until(lambda: health(server) == "degraded")
        gate.unlink()

    ends = asyncio.run(under_load(server, 40, kill))
    assert set(ends) == {"length", "ENG001"}
    assert 1 <= ends["ENG001"] <= 24
    until(lambda: health(server) == "ok")
    assert len(server.children("octavo.core.process")) == 2
    assert "killed by signal 9" in server.log()
    assert asyncio.run(under_load(server, 16)) == {"length": 16}
    server.process.terminate()
    assert server.wait() == 0


@pytest.mark.parametrize("server", [(0, 1, 2)], indirect=True)
def test_a_killed_api_process_cuts_its_own_connections_frees_their_pages_and_comes_back(server: Server) -> None:
    ends = asyncio.run(under_load(server, 40, server.apis[0].kill))
    assert set(ends) == {"length", "cut"}
    port = int(server.url.rpartition(":")[2])
    for one in [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(16)]:  # none is refused
        one.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert one.recv(100).startswith(b"HTTP/1.1 200")
        one.close()
    until(lambda: len(server.children("octavo.server.api_process")) == 2 and "runs again" in server.log())
    until(lambda: server.metric("num_requests_running") == 0)
    assert server.metric("kv_cache_usage_perc") == 0
    assert asyncio.run(under_load(server, 16)) == {"length": 16}
    until(lambda: server.metric("request_success_total") >= ends["length"] + 16)  # over both, and over the restart
    server.process.terminate()
    assert server.wait() == 0


@pytest.mark.parametrize("server", [(0, 1, 2)], indirect=True)
def test_the_only_engine_of_several_api_processes_ends_all_with_1(server: Server) -> None:
    ends = asyncio.run(under_load(server, 40, server.core.kill))
    assert set(ends) <= {"ENG001", "length"}
    assert ends["ENG001"] >= 8
    assert server.wait() == 1


@pytest.mark.parametrize(
    ("server", "number"), [((0, 2, 2), signal.SIGTERM), ((0, 2, 1), signal.SIGINT)], indirect=["server"]
)
def test_a_signal_under_load_answers_every_request_and_ends_all(server: Server, number: signal.Signals) -> None:
    ends = asyncio.run(under_load(server, 40, lambda: server.process.send_signal(number)))
    assert set(ends) <= {"abort", "length"}
    assert ends["abort"] > 8  # those that ran and those that waited were not let go on to their ends
    assert server.wait() == 0


@pytest.mark.parametrize("server", [(100, 2, 2)], indirect=True)
def test_draining_lets_the_requests_of_all_api_processes_end_by_themselves(server: Server) -> None:
    assert asyncio.run(under_load(server, 40, server.process.terminate)) == {"length": 40}
    assert server.wait() == 0


@pytest.mark.parametrize("server", [(0, 2, 2)], indirect=True)
def test_a_killed_supervisor_leaves_no_process_behind(server: Server) -> None:
    started = server.children("")
    assert len(started) == 4
    server.process.kill()
    assert server.wait() == -signal.SIGKILL
    assert all(ended(child) for child in started)


@pytest.mark.parametrize("server", [(0, 2, 2)], indirect=True)
def test_an_address_is_not_shared_with_another_server(server: Server, model: Path) -> None:
    port = server.url.rpartition(":")[2]
    for apis in ("1", "2"):
        command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", port, "--api-server-count", apis]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 2
        assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


@pytest.mark.parametrize("apis", ["1", "2"])
def test_an_engine_that_hangs_at_its_start_does_not_keep_the_server_from_ending(model: Path, apis: str) -> None:
    command = [sys.executable, "-c", STUB, str(model), "0", "2", apis]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    parent = psutil.Process(process.pid)
    until(lambda: len(children(parent, "octavo.core.process")) == 2)
    children(parent, "octavo.core.process")[0].suspend()
    time.sleep(1.0)
    assert process.poll() is None
    started = children(parent)
    process.terminate()
    assert process.wait(PATIENCE) in (0, -signal.SIGTERM)
    assert all(ended(child) for child in started)


def test_a_start_that_fails_ends_with_its_own_exit_code_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = set(children())
    command = [sys.executable, "-m", "octavo", "serve", str(tmp_path), "--port", "0"]
    for more in (["--data-parallel-size", "2"], ["--api-server-count", "2"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
    assert set(children()) <= before


@pytest.mark.parametrize("count", ["0", "1000"])
def test_a_count_of_api_processes_out_of_range_is_refused(model: Path, count: str) -> None:
    command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", "0", "--api-server-count", count]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert "outside [1, 256]" in done.stderr
