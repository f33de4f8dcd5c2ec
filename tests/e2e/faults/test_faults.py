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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import PACED, STUB, Server, running, total
from tests.waiting import PATIENCE, until

FULL = "OCTAVO_FAULTS_FULL" in os.environ
BEYOND = 10_000 if FULL else 600  # requests, of which 60 may wait
LONG: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": True}
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # one for all: each takes long to make
SHORT: dict[str, Any] = {"prompt": [5], "max_tokens": 3}

# Breaks the engine's process from inside: the first step after number 200 that finds a file named TOLD raises ERROR.
BROKEN = """
import os
from octavo.runtime.stub import StubWorker
whole = StubWorker.step
def broken(self, plan):
    if self.steps >= 200 and os.path.exists({told!r}):
        os.unlink({told!r})
        raise {error}
    whole(self, plan)
StubWorker.step = broken
"""


@pytest.fixture
def server(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    options: dict[str, Any] = getattr(request, "param", {})
    script = STUB.replace("max_num_batched_tokens=256", f"max_num_batched_tokens=256, {options.get('limits', '')}")
    broken = BROKEN.format(told=str(tmp_path / "told"), error=options["error"]) if "error" in options else ""
    with running(["-c", script, str(model), "1"], tmp_path / "log", engines=PACED + broken) as made:
        yield made


async def ask_all(
    url: str, bodies: list[dict[str, Any]], clients: int = 100, *, when_there: Callable[[], object] | None = None
) -> list[httpx.Response]:
    """By so many clients at once, each with a connection of its own; every request must be answered in time.

    Calls ``when_there`` once the server has all of them.
    """
    left, answers = iter(bodies), []

    async def client(http: httpx.AsyncClient) -> None:
        for body in left:
            answers.append(await http.post("/v1/completions", json=body))

    async with contextlib.AsyncExitStack() as stack:
        made = [
            httpx.AsyncClient(base_url=url, timeout=2 * PATIENCE, verify=NO_TLS)
            for _ in range(min(clients, len(bodies)))
        ]
        asking = [asyncio.create_task(client(await stack.enter_async_context(one))) for one in made]
        if when_there is not None:
            other = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=NO_TLS))
            while (await other.get("/load")).json()["server_load"] + len(answers) < len(bodies):
                pass
            when_there()
        await asyncio.gather(*asking)
    return answers


def settle(server: Server) -> None:
    """Waits until nothing runs and no page is held."""
    until(lambda: not any(map(server.metric, ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))))
    assert server.get("/health").status_code == 200
    assert server.post("/v1/completions", SHORT).status_code == 200


@pytest.mark.parametrize("server", [{"error": "RuntimeError('device at 0xdead')"}], indirect=True)
def test_an_engine_whose_loop_raises_answers_all_without_its_words_and_ends_the_server(
    server: Server, tmp_path: Path
) -> None:
    def break_it() -> None:
        (tmp_path / "told").touch()
        server.release()

    server.hold()
    bodies = [LONG | {"stream": i % 2 == 0} for i in range(30)]
    answers = asyncio.run(ask_all(server.url, bodies, when_there=break_it))
    assert len(answers) == 30
    for answer in answers:
        assert "ENG001" in answer.text
        assert "0xdead" not in answer.text
        assert answer.status_code == 500 or answer.text.endswith("data: [DONE]\n\n")
    assert server.wait() == 1
    assert "device at 0xdead" in server.log()


@pytest.mark.parametrize("server", [{"error": "MemoryError('12 GB')"}], indirect=True)
def test_out_of_memory_in_a_step_fails_its_requests_alone(server: Server, tmp_path: Path) -> None:
    def break_it() -> None:
        (tmp_path / "told").touch()
        server.release()

    server.hold()
    bodies = [LONG | {"max_tokens": 600} for _ in range(30)]
    answers = asyncio.run(ask_all(server.url, bodies, when_there=break_it))
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
    rounds = 20 if FULL else 4
    for _ in range(rounds):
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
            for _ in range(5):
                with client.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 2}) as response:
                    next(response.iter_raw())
    until(lambda: server.metric("request_success_total") == rounds * 5 * 2)
    ends = server.get("/metrics").text.splitlines()
    done = [line for line in ends if line.startswith("vllm:request_success_total") and 'reason="length"' in line]
    assert total("\n".join(done), "request_success_total") < rounds * 5  # nearly all go on for seconds if they are let
    settle(server)


def test_the_port_can_be_used_again_at_once(server: Server, model: Path, tmp_path: Path) -> None:
    port = int(server.url.rpartition(":")[2])
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as open_connection:
        assert open_connection.post("/v1/completions", json=SHORT).status_code == 200
        server.process.kill()
        assert server.wait() != 0
        with running(["-c", STUB, str(model), "0", "1", "1", str(port)], tmp_path / "again") as again:
            assert again.url == server.url
            assert again.post("/v1/completions", SHORT).status_code == 200
            again.process.terminate()
            assert again.wait() == 0


def test_a_stopped_client_does_not_keep_the_server_from_draining(server: Server) -> None:
    body = b'{"prompt": [5, 6], "max_tokens": 2000, "n": 8, "stream": true, "return_token_ids": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        slow.sendall(head + body)
        time.sleep(0.5)
        server.process.terminate()
        assert server.wait(30) == 0  # it takes two seconds; a client that reads nothing is cut off after sixty
