"""What ends ``octavo serve``, on purpose or not: every process ends, and every pending request is answered."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.serving import PACED, STUB, Server, running, total
from tests.waiting import PATIENCE, children, ended, until

LONG = {"prompt": [5, 6, 7], "max_tokens": 500, "ignore_eos": True}


@pytest.fixture
def server(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    drain = getattr(request, "param", 0.0)
    with running(["-c", STUB, str(model), str(drain)], tmp_path / "log", engines=PACED) as made:
        yield made


async def pending(
    server: Server, count: int, fault: object, *, stream: bool = False, n: int = 4
) -> list[httpx.Response]:
    """``count`` long requests, of which none has ended when ``fault`` happens."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=2 * PATIENCE, limits=limits) as client:
        body = LONG | {"stream": stream, "n": n}
        server.hold()
        tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(count)]
        while not (load := (await client.get("/load")).json())["running"] or load["server_load"] < count:
            assert not any(task.done() for task in tasks)
        fault()  # type: ignore[operator]
        server.release()
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
    assert server.wait() == 1
    assert "killed by signal 9" in server.log()


def test_a_killed_api_process_leaves_no_engine_behind(server: Server) -> None:
    server.process.kill()
    assert server.wait() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_answers_pending_requests_at_once_and_ends_all(server: Server, number: signal.Signals) -> None:
    answers = asyncio.run(pending(server, 40, lambda: server.process.send_signal(number)))
    assert server.wait() == 0
    reasons = [choice["finish_reason"] for answer in answers for choice in answer.json()["choices"]]
    assert len(reasons) == 160
    assert set(reasons) <= {"abort", "length"}
    assert reasons.count("abort") > 80  # those that ran and those that waited were not let go on to their ends


@pytest.mark.parametrize("server", [100.0], indirect=True)
def test_with_drain_seconds_running_requests_end_by_themselves_and_new_ones_are_refused(server: Server) -> None:
    late: list[int] = []

    def stop() -> None:
        server.process.terminate()
        until(lambda: server.get("/health").status_code == 503)
        late.append(server.post("/v1/completions", LONG).status_code)

    answers = asyncio.run(pending(server, 40, stop, n=1))
    assert [answer.json()["choices"][0]["finish_reason"] for answer in answers] == ["length"] * 40
    assert late == [503]
    assert server.wait() == 0


@pytest.mark.parametrize("server", [100.0], indirect=True)
def test_a_second_signal_cuts_the_drain_short(server: Server) -> None:
    def stop() -> None:
        server.process.terminate()
        until(lambda: "stopping on SIGTERM" in server.log())  # two signals at once would be one
        server.process.terminate()

    answers = asyncio.run(pending(server, 40, stop))
    assert all(answer.status_code == 200 for answer in answers)
    assert sum(choice["finish_reason"] == "abort" for answer in answers for choice in answer.json()["choices"]) > 80
    assert server.wait() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_pages(server: Server, stream: bool) -> None:
    body = LONG | {"prompt": [[5, 6, i] for i in range(40)], "max_tokens": 2000, "stream": stream}
    server.hold()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(PATIENCE, read=0.3 if not stream else 1e-4)
        )
    until(lambda: server.metric("request_success_total") == 40)
    until(lambda: not any(map(server.metric, ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))))
    ends = server.get("/metrics").text.splitlines()
    (aborted,) = [line for line in ends if line.startswith("vllm:request_success_total") and 'reason="abort"' in line]
    assert total(aborted, "request_success_total") == 40


def test_an_idle_server_uses_almost_no_cpu(server: Server) -> None:
    server.post("/v1/completions", LONG | {"max_tokens": 5})
    processes = [psutil.Process(server.process.pid), server.core]
    before = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(1)
    api, core = (sum(p.cpu_times()[:2]) - b for p, b in zip(processes, before, strict=True))
    assert core < 0.1  # 0.00 where it is quiet; a clock that ticks in hundredths of a second may add some
    assert api < 0.2  # 0.01: uvicorn looks at its clock ten times a second


def test_a_signal_during_the_start_ends_it(tmp_path: Path, model: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", STUB, str(model), "0"], stderr=subprocess.DEVNULL)
    parent = psutil.Process(process.pid)
    until(lambda: children(parent) != [])
    (core,) = children(parent)
    process.terminate()
    assert process.wait(PATIENCE) in (0, -signal.SIGTERM)
    assert ended(core)


def test_a_model_that_is_not_there_ends_the_start_with_its_own_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUB, str(tmp_path / "nothing"), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1  # `serve` raises; the command line turns it into exit code 3
    assert "ModelError" in done.stderr


def test_a_port_in_use_is_refused_before_anything_starts(server: Server, model: Path) -> None:
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


def test_neither_a_long_text_nor_half_a_request_holds_up_the_end(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    answers: list[int] = []

    def tokenize() -> None:
        answers.append(server.post("/tokenize", {"prompt": "aé1 " * 5_000_000}).status_code)

    def busy() -> Any:
        """Seconds of processor time of the threads that are not the event loop's."""
        threads = psutil.Process(server.process.pid).threads()
        return sum(one.user_time + one.system_time for one in threads if one.id != server.process.pid)

    thread = threading.Thread(target=tokenize)
    before = busy()
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        thread.start()
        until(lambda: busy() > before + 0.3)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(15) == 0  # it takes two seconds; the text takes half a minute
        assert half.recv(100).startswith(b"HTTP/1.1 503")
    thread.join()
    assert answers == [503]
    assert "Traceback" not in server.log()
