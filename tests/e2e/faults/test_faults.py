"""Faults beside the end of a process: in a step, in the network, in the number of requests.

Required of each: every request that was accepted gets one terminal answer, nothing hangs, no process is left over, and
all pages are free at the end. ``python tools/faults.py`` runs these at full size, with those of the processes' ends.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import STUB, Server, running

FULL = "OCTAVO_FAULTS_FULL" in os.environ
BEYOND = 10_000 if FULL else 600  # requests, of which 60 may wait
LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True}
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # one for all: each takes long to make
SHORT: dict[str, Any] = {"prompt": [5], "max_tokens": 3}

# Breaks the engine's process from inside: the worker's step number STEP raises ERROR, once.
BROKEN = """
import sys
if "octavo.core.process" in sys.orig_argv:
    from octavo.runtime.stub import StubWorker
    step = StubWorker.step
    def broken(self, plan):
        if plan.step == {step}:
            raise {error}
        step(self, plan)
    StubWorker.step = broken
"""


@pytest.fixture
def server(model: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    options: dict[str, Any] = getattr(request, "param", {})
    script = STUB.replace("max_num_batched_tokens=256", f"max_num_batched_tokens=256, {options.get('limits', '')}")
    if "error" in options:
        (tmp_path / "sitecustomize.py").write_text(BROKEN.format(step=200, error=options["error"]))
        monkeypatch.syspath_prepend(str(tmp_path))
    with running(["-c", script, str(model), "1"], tmp_path / "log") as made:
        yield made


async def ask_all(url: str, bodies: list[dict[str, Any]], clients: int = 100) -> list[httpx.Response]:
    """By so many clients at once, each with a connection of its own; every request must be answered in time."""
    left, answers = iter(bodies), []

    async def client(http: httpx.AsyncClient) -> None:
        for body in left:
            answers.append(await http.post("/v1/completions", json=body))

    async with contextlib.AsyncExitStack() as stack:
        made = [httpx.AsyncClient(base_url=url, timeout=60, verify=NO_TLS) for _ in range(min(clients, len(bodies)))]
        await asyncio.gather(*[client(await stack.enter_async_context(one)) for one in made])
    return answers


def settle(server: Server) -> None:
    """Waits until nothing runs and no page is held."""
    deadline = time.monotonic() + 10
    while any(map(server.metric, ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))):
        assert time.monotonic() < deadline, "pages are still held"
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.post(f"{server.url}/v1/completions", json=SHORT).status_code == 200


@pytest.mark.parametrize("server", [{"error": "RuntimeError('device at 0xdead')"}], indirect=True)
def test_an_engine_whose_loop_raises_answers_all_without_its_words_and_ends_the_server(server: Server) -> None:
    answers = asyncio.run(ask_all(server.url, [LONG | {"stream": i % 2 == 0} for i in range(30)]))
    assert len(answers) == 30
    for answer in answers:
        assert "ENG001" in answer.text
        assert "0xdead" not in answer.text
        assert answer.status_code == 500 or answer.text.endswith("data: [DONE]\n\n")
    assert server.wait(10) == 1
    assert "device at 0xdead" in server.log()


@pytest.mark.parametrize("server", [{"error": "MemoryError('12 GB')"}], indirect=True)
def test_out_of_memory_in_a_step_fails_its_requests_alone(server: Server) -> None:
    answers = asyncio.run(ask_all(server.url, [LONG | {"max_tokens": 600} for _ in range(30)]))
    statuses = collections.Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503}
    assert 1 <= statuses[503] <= 8  # no more are in a step
    assert statuses.total() == 30
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
            assert "12 GB" not in answer.text
        else:
            assert answer.json()["usage"]["completion_tokens"] == 600
    settle(server)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("server", [{"limits": "max_waiting=60"}], indirect=True)
def test_requests_beyond_the_limit_are_told_when_to_come_again(server: Server) -> None:
    blocking = [LONG | {"n": 8, "max_tokens": 800}] * 6
    answers = asyncio.run(ask_all(server.url, [*blocking, *[SHORT] * BEYOND], clients=200))
    statuses = collections.Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503}
    assert sum(statuses.values()) == BEYOND + 6
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
    settle(server)


def test_half_requests_hold_up_nobody_and_leave_nothing(server: Server) -> None:
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    halves = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le",
        b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{"prompt": [5',
        b'POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"mes\r\n',
        b"\x16\x03\x01 this is no HTTP",
    )
    sockets = [socket.create_connection(address) for _ in halves * 10]
    try:
        for one, half in zip(sockets, halves * 10, strict=True):
            one.sendall(half)
        answers = asyncio.run(ask_all(server.url, [SHORT] * 20))
        assert [answer.status_code for answer in answers] == [200] * 20
    finally:
        for one in sockets:
            one.close()
    settle(server)
    assert "Traceback" not in server.log()


def test_clients_that_vanish_mid_stream_leave_their_pages_at_once(server: Server) -> None:
    for _ in range(20 if FULL else 4):
        with httpx.Client(base_url=server.url, timeout=10) as client:
            for _ in range(5):
                with client.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 2}) as response:
                    next(response.iter_raw())
    began = time.monotonic()
    settle(server)
    assert time.monotonic() - began < 2


def test_the_port_can_be_used_again_at_once(server: Server, model: Path, tmp_path: Path) -> None:
    port = int(server.url.rpartition(":")[2])
    with httpx.Client(base_url=server.url) as open_connection:
        assert open_connection.post("/v1/completions", json=SHORT).status_code == 200
        server.process.kill()
        assert server.wait(5) != 0
        with running(["-c", STUB, str(model), "0", "1", "1", str(port)], tmp_path / "again") as again:
            assert again.url == server.url
            assert httpx.post(f"{again.url}/v1/completions", json=SHORT).status_code == 200
            again.process.terminate()
            assert again.wait(5) == 0


def test_a_stopped_client_does_not_keep_the_server_from_draining(server: Server) -> None:
    body = b'{"prompt": [5, 6], "max_tokens": 2000, "n": 8, "stream": true, "return_token_ids": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        slow.sendall(head + body)
        time.sleep(0.5)
        server.process.terminate()
        assert server.wait(12) == 0
