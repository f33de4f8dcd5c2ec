"""What ends ``octavo serve``, on purpose or not: every process ends, and every pending request is answered."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.serving import STUB, Server, ended, running

LONG = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture
def server(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    drain = getattr(request, "param", 0.0)
    with running(["-c", STUB, str(model), str(drain)], tmp_path / "log") as made:
        yield made


async def pending(
    server: Server, count: int, fault: object, *, stream: bool = False, n: int = 4
) -> list[httpx.Response]:
    """``count`` long requests, during which ``fault`` happens. With 40 times 4 sequences they take ten seconds."""
    async with httpx.AsyncClient(base_url=server.url, timeout=20, limits=httpx.Limits(max_connections=None)) as client:
        body = LONG | {"stream": stream, "n": n}
        tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(count)]
        while 'num_requests_running{engine="0",model_name="stub"} 0.0' in (await client.get("/metrics")).text:
            assert not all(task.done() for task in tasks)
        fault()  # type: ignore[operator]
        return list(await asyncio.gather(*tasks))


@pytest.mark.parametrize("stream", [False, True])
def test_a_killed_engine_fails_every_pending_request_and_ends_the_server_with_1(server: Server, stream: bool) -> None:
    answers = asyncio.run(pending(server, 40, server.core.kill, stream=stream))
    for answer in answers:
        if answer.status_code == 200:  # a stream that had begun
            assert "ENG001" in answer.text or '"length"' in answer.text  # the first may have ended just in time
            assert answer.text.endswith("data: [DONE]\n\n" if stream else "}")
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "ENG001")
    assert sum("ENG001" in answer.text for answer in answers) >= 8
    assert server.wait(2) == 1
    assert "killed by signal 9" in server.log()


def test_a_killed_api_process_leaves_no_engine_behind(server: Server) -> None:
    server.process.kill()
    assert server.wait(2) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_answers_pending_requests_and_ends_all_within_2_seconds(
    server: Server, number: signal.Signals
) -> None:
    began = 0.0

    def stop() -> None:
        nonlocal began
        began = time.monotonic()
        server.process.send_signal(number)

    answers = asyncio.run(pending(server, 40, stop))
    assert server.wait(3) == 0
    assert time.monotonic() - began < 2
    reasons = [choice["finish_reason"] for answer in answers for choice in answer.json()["choices"]]
    assert len(reasons) == 160
    assert set(reasons) <= {"abort", "length"}
    assert "abort" in reasons


@pytest.mark.parametrize("server", [20.0], indirect=True)
def test_with_drain_seconds_running_requests_end_by_themselves_and_new_ones_are_refused(server: Server) -> None:
    late: list[int] = []

    def stop() -> None:
        server.process.terminate()
        time.sleep(0.1)
        late.append(httpx.post(f"{server.url}/v1/completions", json=LONG).status_code)

    answers = asyncio.run(pending(server, 40, stop, n=1))
    assert [answer.json()["choices"][0]["finish_reason"] for answer in answers] == ["length"] * 40
    assert late == [503]
    assert server.wait(3) == 0


@pytest.mark.parametrize("server", [60.0], indirect=True)
def test_a_second_signal_cuts_the_drain_short(server: Server) -> None:
    def stop() -> None:
        server.process.terminate()
        time.sleep(0.1)
        server.process.terminate()

    answers = asyncio.run(pending(server, 40, stop))
    assert all(answer.status_code == 200 for answer in answers)
    assert server.wait(2) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_pages(server: Server, stream: bool) -> None:
    body = {"prompt": [[5, 6, i] for i in range(40)], "max_tokens": 2000, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.3 if not stream else 1e-4)
        )
    deadline = time.monotonic() + 2
    while server.metric("num_requests_running") or server.metric("num_requests_waiting"):
        assert time.monotonic() < deadline
    assert server.metric("kv_cache_usage_perc") == 0
    assert 'reason="abort"' in httpx.get(f"{server.url}/metrics").text


def test_an_idle_server_uses_almost_no_cpu(server: Server) -> None:
    httpx.post(f"{server.url}/v1/completions", json=LONG | {"max_tokens": 5})
    processes = [psutil.Process(server.process.pid), server.core]
    before = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(1)
    api, core = (sum(p.cpu_times()[:2]) - b for p, b in zip(processes, before, strict=True))
    assert core <= 0.01
    assert api <= 0.05  # uvicorn looks at its clock ten times a second


def test_a_signal_during_the_start_ends_it(tmp_path: Path, model: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    process = subprocess.Popen([sys.executable, "-c", STUB, str(model), "0"], env=env, stderr=subprocess.DEVNULL)
    while not psutil.Process(process.pid).children():
        time.sleep(0.005)
    (core,) = psutil.Process(process.pid).children()
    process.terminate()
    assert process.wait(2) in (0, -signal.SIGTERM)
    assert ended(core, 2)


def test_a_model_that_is_not_there_ends_the_start_with_its_own_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUB, str(tmp_path / "nothing"), "0"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1  # `serve` raises; the command line turns it into exit code 3
    assert "ModelError" in done.stderr


def test_a_port_in_use_is_refused_before_anything_starts(server: Server, model: Path) -> None:
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", port]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


def test_neither_a_long_text_nor_half_a_request_holds_up_the_end(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    answers: list[int] = []

    def tokenize() -> None:
        answers.append(
            httpx.post(f"{server.url}/tokenize", json={"prompt": "aé1 " * 5_000_000}, timeout=60).status_code
        )

    thread = threading.Thread(target=tokenize)
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        thread.start()
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(2) == 0
        assert half.recv(100).startswith(b"HTTP/1.1 503")
    thread.join()
    assert answers == [503]
    assert "Traceback" not in server.log()
