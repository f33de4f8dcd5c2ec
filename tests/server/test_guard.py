from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from octavo.server.app import ROUTES
from octavo.types import Request, TokenOutput
from tests.server.fake import TEXT, Server, run


def test_unknown_paths_and_methods_get_json_errors() -> None:
    async def work() -> None:
        server = Server()
        missing = await server.http.get("/v1/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        wrong = await server.http.get("/v1/completions")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"
        assert (await server.http.put("/v1/files")).headers["allow"] == "GET, HEAD, POST"
        assert "allow" not in missing.headers
        assert (await server.http.head("/v1/models")).status_code == 200

    run(work)


def test_a_body_over_the_limit_is_413_announced_or_not() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async def work() -> None:
        server = Server(max_body=1000)
        announced = await server.http.post("/v1/completions", content=b"x" * 2000)
        streamed = await server.http.post("/v1/completions", content=pieces())
        lying = await server.http.post("/v1/completions", content=pieces(), headers={"content-length": "x"})
        assert [r.status_code for r in (announced, streamed, lying)] == [413, 413, 413]
        assert (await server.post("/v1/completions", TEXT)).status_code == 200

    run(work)


def test_the_key_guards_every_route_but_health_ping_and_empty_pages() -> None:
    async def work() -> None:
        server = Server(api_key="secret")
        for method, path in [(route.method, route.path) for route in ROUTES]:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                response = await server.http.request(method, path, headers=headers)
                assert (response.status_code == 401) == (path not in ("/health", "/ping", "/", "/dashboard")), path
        assert (await server.http.get("/v1/nothing")).status_code == 401
        good = {"authorization": "Bearer secret"}
        assert (await server.post("/v1/completions", TEXT, headers=good)).status_code == 200
        assert (await server.post("/reset_prefix_cache", {}, headers=good)).status_code == 200
        assert (await server.http.get("/metrics", headers=good)).status_code == 200

    run(work)


def test_an_unexpected_exception_is_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    def script(request: Request) -> list[TokenOutput]:
        raise ZeroDivisionError("secret internals")

    async def work() -> None:
        server = Server(script)
        response = await server.post("/v1/completions", TEXT)
        assert response.status_code == 500
        assert "secret internals" not in response.text
        assert response.headers["x-request-id"] in response.text
        assert response.headers["x-request-id"] in caplog.text

    run(work)
