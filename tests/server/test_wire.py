"""A peer that does nothing: over a socket, with the limit of time that a test is about made short."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from octavo.server import guard, run, wire
from tests.server.fake import Server, speak, until
from tests.waiting import PATIENCE

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
SHORT = 0.3
UNSHORTENED = 25.0  # less than any of the limits is without that


def talk(server: Server, work: Callable[[tuple[str, int]], Awaitable[None]]) -> None:
    """Runs ``work`` with the address of a listening ``server``."""

    async def both() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            started = asyncio.Event()
            http = run._Http(run._http_config(server.app, {}), started.set)
            serving = asyncio.create_task(http.serve([listener]))
            await started.wait()
            try:
                await asyncio.wait_for(work(listener.getsockname()), PATIENCE)
            finally:
                http.should_exit = True
                await serving

    asyncio.run(both())


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"GET /ping HTTP/1.1\r\nhost: x\r\nx-slow: "])
def test_a_head_that_does_not_come_ends_the_connection(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEAD_SECONDS", SHORT)

    async def work(address: tuple[str, int]) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        with pytest.raises(asyncio.IncompleteReadError):
            await asyncio.wait_for(reader.readexactly(1), UNSHORTENED)
        writer.close()

    talk(Server(), work)


def test_a_body_that_does_not_come_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", SHORT)

    async def work(address: tuple[str, int]) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(HEAD % 100 + b'{"prompt": ')
        assert b"408" in await asyncio.wait_for(reader.readline(), UNSHORTENED)
        assert b"request_timeout" in await asyncio.wait_for(reader.read(), UNSHORTENED)
        writer.close()

    talk(Server(), work)


def test_a_slow_body_that_comes_is_answered_and_so_is_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 4.0)  # a machine that stands still for three seconds may do that

    async def work(address: tuple[str, int]) -> None:
        reader, writer = await asyncio.open_connection(*address)
        body = b'{"prompt": "hello", "max_tokens": 2}'
        for pause in (0.9, 0.01):
            writer.write(HEAD % len(body))
            for at in range(0, len(body), 6):
                writer.write(body[at : at + 6])
                await asyncio.sleep(pause)
            assert b"200" in await reader.readline()
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(length)
        writer.close()

    talk(Server(), work)


def test_a_client_that_stops_reading_is_cut_off_and_its_request_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALL_SECONDS", SHORT)
    server = Server(max_model_len=100_000)
    server.fake.script = speak(server.tokenizer.encode("hello " * 20_000), ends=False)

    async def work(address: tuple[str, int]) -> None:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(slow, address)
            body = b'{"prompt": "hello", "max_tokens": 90000, "stream": true, "return_token_ids": true}'
            await loop.sock_sendall(slow, HEAD % len(body) + body)
            await until(lambda: server.fake.aborted != [])
            assert await server.service.drained(PATIENCE)

    talk(server, work)


UPGRADE = b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"


@pytest.mark.parametrize("sent", [b"\0\1\r\n\r\n", UPGRADE])
def test_what_a_client_sends_wrong_is_no_line_of_the_log(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def work(address: tuple[str, int]) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        assert await reader.readline()
        writer.close()

    talk(Server(), work)
    assert not caplog.records
