from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from octavo.types import Request, TokenOutput
from tests.server.fake import TEXT, Server, events, run, speak, until
from tests.waiting import PATIENCE


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "header"), [(503, "1"), (400, None)])
def test_a_refusal_of_the_core_has_its_status_streamed_or_not(stream: bool, status: int, header: str | None) -> None:
    def script(request: Request) -> list[TokenOutput]:
        return [TokenOutput(id=request.id, finish_reason="error", error="No room.", status=status)]

    async def work() -> None:
        server = Server(script)
        response = await server.post("/v1/completions", TEXT | {"stream": stream})
        assert response.status_code == status
        assert response.json()["error"]["message"].startswith("No room.")
        assert response.headers.get("retry-after") == header

    run(work)


@pytest.mark.parametrize(
    "body", [{"prompt": [65] * 500}, {"prompt": "hi", "max_tokens": 500}, {"prompt": "w" * 99_999}]
)
def test_a_prompt_that_is_too_long_has_the_code_that_openai_s_clients_look_for(body: dict[str, object]) -> None:
    async def work() -> None:
        response = await Server().post("/v1/completions", body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["type"] == "invalid_request_error"
        assert "max_model_len" in error["message"]

    run(work)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    def script(request: Request) -> list[TokenOutput]:
        token = TokenOutput(id=request.id, token_ids=[70])
        return [token, token, TokenOutput(id=request.id, finish_reason="error", error="Broke.", status=500)]

    async def work() -> None:
        server = Server(script)
        response = await server.post("/v1/completions", TEXT | {"stream": True, "max_tokens": 9})
        chunks = events(response.text)
        assert [len(chunk.get("choices", ())) for chunk in chunks] == [1, 1, 0]
        assert chunks[-1]["error"]["message"].startswith("Broke.")
        assert chunks[-1]["error"]["type"] == "server_error"

    run(work)


def test_one_failing_prompt_ends_its_siblings() -> None:
    def script(request: Request) -> list[TokenOutput]:
        if request.token_ids[0] == 66:
            return [TokenOutput(id=request.id, finish_reason="error", error="No room.", status=503)]
        return speak([70] * 50, ends=False)(request)

    async def work() -> None:
        server = Server(script)
        response = await server.post("/v1/completions", {"prompt": [[65], [66], [67]], "max_tokens": 60})
        assert response.status_code == 503
        assert {id[-1] for id in server.fake.aborted} >= {"0", "2"}

    run(work)


def test_a_dead_engine_is_500_for_requests_and_503_for_health() -> None:
    async def work() -> None:
        server = Server()
        assert (await server.http.get("/health")).status_code == 200
        server.die()
        response = await server.post("/v1/completions", TEXT)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "ENG001")
        assert (await server.http.get("/health")).status_code == 503
        assert (await server.http.get("/ping")).status_code == 200
        assert (await server.http.get("/metrics")).status_code == 200

    run(work)


def test_a_server_that_is_shutting_down_refuses_and_lets_running_requests_end() -> None:
    async def work() -> None:
        server = Server(speak([70] * 50, ends=False))
        running = asyncio.create_task(server.post("/v1/completions", TEXT | {"max_tokens": 60}))
        await until(lambda: server.fake.requests != [])
        assert await server.service.drained(0.01) is False
        late = await server.post("/v1/completions", TEXT)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert (await server.http.get("/health")).status_code == 503
        await server.fake.abort([r.id for r in server.fake.requests])
        answer = (await running).json()
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert await server.service.drained(PATIENCE) is True

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_all_its_requests(stream: bool) -> None:
    async def work() -> None:
        server = Server(speak([70] * 50, ends=False))
        body = json.dumps({"prompt": ["a", "b"], "n": 2, "max_tokens": 60, "stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        task = asyncio.create_task(server.app(scope, receive, send))  # type: ignore[arg-type]
        await until(lambda: len(server.fake.requests) == 4)
        assert not server.fake.aborted
        left.set()
        await task
        assert sorted(server.fake.aborted) == sorted(r.id for r in server.fake.requests)
        assert await server.service.drained(PATIENCE)

    run(work)
