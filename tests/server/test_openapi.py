"""What the server says of itself, and the routes for operators: that all of it is so."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from octavo.frontend.client import EngineState
from octavo.server.app import ROUTES
from octavo.server.batches.routes import BatchRequest
from octavo.server.files.store import FileStore
from octavo.server.openapi import document, page
from octavo.server.route import Route
from octavo.types import Stats
from tests.frontend.fakes import prompt_of
from tests.server.fake import POOLER, Server, embed, run, until

LINE = b'{"custom_id": "a", "url": "/v1/completions", "body": {}}'
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, Any] = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 5, "logprobs": 2},
    "/v1/chat/completions": CHAT | {"max_tokens": 5, "logprobs": True, "top_logprobs": 2},
    "/v1/embeddings": {"input": ["hello", "world"]},
    "/v1/responses": {"input": "hi", "max_output_tokens": 5},
    "/v1/messages": CHAT | {"max_tokens": 5},
    "/v1/messages/count_tokens": CHAT,
    "/render": {"body": CHAT},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [70]},
}


async def request_of(server: Server, route: Route, folder: Path) -> dict[str, Any]:
    """A request that ``route`` takes; what it is about is made before."""
    path, body = route.path.replace("{name:path}", "m"), BODIES.get(route.path)
    server.service.files = FileStore(folder)
    file = server.service.files.add(
        b"", "in.jsonl", "batch", b'{"custom_id": "a", "url": "/v1/completions", "body": {}}'
    )
    batch = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    if "/v1/responses/{id}" in path:
        background = path.endswith("/cancel")
        made = await server.post("/v1/responses", BODIES["/v1/responses"] | {"background": background})
        path = path.replace("{id}", made.json()["id"])
    if "/v1/batches/{id}" in path:
        path = path.replace("{id}", (await server.post("/v1/batches", batch)).json()["id"])
    if route.form:
        return {"url": path, "data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", b"x")}}
    if route.body is BatchRequest:
        body = batch
    return {"url": path.replace("{id}", file.id), "json": body}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_answer_is_of_the_type_that_its_route_names(route: Route, tmp_path: Path) -> None:
    async def work() -> None:
        embeds = route.path == "/v1/embeddings"
        server = Server(embed if embeds else None, max_model_len=4096, pooler=POOLER if embeds else None)
        response = await server.http.request(route.method, **await request_of(server, route, tmp_path))
        await asyncio.gather(*server.service.batches.values())
        assert response.status_code == 200, response.text
        if isinstance(route.answer, str):
            assert response.headers["content-type"].startswith(route.answer)
        elif route.answer is None:
            assert response.content == b""
        else:
            read = msgspec.json.decode(response.content, type=route.answer)
            assert msgspec.json.decode(msgspec.json.encode(read)) == response.json()

    run(work)


@pytest.mark.parametrize("route", [r for r in ROUTES if r.event is not None], ids=lambda route: route.path)
def test_every_event_is_of_the_type_that_its_route_names(route: Route) -> None:
    async def work() -> None:
        response = await Server(max_model_len=4096).post(route.path, BODIES[route.path] | {"stream": True})
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
        assert len(events) > 3
        for event in events:
            read = msgspec.json.decode(event, type=route.event)
            assert msgspec.json.decode(msgspec.json.encode(read)) == msgspec.json.decode(event)

    run(work)


def test_the_description_has_every_route_and_every_structure_that_it_refers_to() -> None:
    described = document(ROUTES)
    found = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert found == {(route.method, re.sub(r":\w+}", "}", route.path)) for route in ROUTES}
    text = msgspec.json.encode(described).decode()
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert references == set(described["components"]["schemas"])
    ids = [one["operationId"] for methods in described["paths"].values() for one in methods.values()]
    assert len(ids) == len(set(ids))


def test_bodies_take_exactly_the_fields_that_are_described() -> None:
    async def work() -> None:
        server = Server(max_model_len=4096)
        described = (await server.http.get("/openapi.json")).json()
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
            schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            fields = described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            assert fields["additionalProperties"] is False
            for name in fields["properties"].keys() - BODIES[path].keys():
                assert (await server.post(path, BODIES[path] | {name: None})).status_code == 200, name
            refused = await server.post(path, BODIES[path] | {"horoscope": 1})
            assert refused.status_code == 400

    run(work)


def test_the_limits_that_are_described_hold() -> None:
    async def work() -> None:
        server = Server(max_model_len=4096)
        schema = document(ROUTES)["components"]["schemas"]["ChatRequest"]
        checked = 0
        for name, field in schema["properties"].items():
            for branch in field.get("anyOf", [field]):
                for limit, step in (("minimum", -1), ("maximum", 1)):
                    if limit not in branch or abs(branch[limit]) >= 2**62:
                        continue
                    refused = await server.post("/v1/chat/completions", CHAT | {name: branch[limit] + step})
                    assert (refused.status_code, refused.json()["error"]["param"]) in {(400, name), (400, "max_tokens")}
                    checked += 1
        assert checked > 15

    run(work)


def test_the_page_names_every_route_and_needs_nothing_from_elsewhere() -> None:
    async def work() -> None:
        response = await Server().http.get("/docs")
        assert response.text == page(document(ROUTES))
        for route in ROUTES:
            assert f"<code>{re.sub(':[a-z]+}', '}', route.path)}</code>" in response.text
        assert not re.search(r"<script|<link|<img|src=|@import|https?://", response.text)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        targets = set(re.findall(r'href="#([^"]+)"', response.text))
        assert targets <= set(re.findall(r'id="([^"]+)"', response.text))

    run(work)


# --- render -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_request_is_rendered_to_what_the_engine_would_get(path: str) -> None:
    async def work() -> None:
        server = Server(max_model_len=4096)
        body = BODIES[path] | {"temperature": 0.5}
        rendered = (await server.post("/render", {"endpoint": path, "body": body})).json()
        assert not server.fake.requests
        await server.post(path, body)
        (request,) = server.fake.requests
        (prompt,) = rendered["prompts"]
        assert prompt["token_ids"] == prompt_of(request)
        assert prompt["text"] == ("hello" if path == "/v1/completions" else "[user]hi[bot]")
        assert rendered["sampling"]["temperature"] == request.sampling.temperature == 0.5
        assert rendered["max_tokens"] == request.sampling.max_tokens == 5

    run(work)


def test_rendering_refuses_what_the_endpoint_would() -> None:
    async def work() -> None:
        server = Server()
        unknown = await server.post("/render", {"endpoint": "/v1/embeddings", "body": {}})
        assert "/v1/chat/completions" in unknown.json()["error"]["message"]
        bad = await server.post("/render", {"body": CHAT | {"temperature": -1}})
        assert bad.json()["error"]["param"] == "temperature"

    run(work)


# --- for load balancers -----------------------------------------------------------------------------------------------


def test_ready_is_503_when_the_queue_is_full_the_engine_dead_or_the_server_ending() -> None:
    async def work() -> None:
        server = Server()
        assert (await server.http.get("/ready")).status_code == 200
        server.service.max_waiting = 0
        full = await server.http.get("/ready")
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        server.service.max_waiting = 5
        server.service.closing = True
        assert (await server.http.get("/ready")).status_code == 503
        server.service.closing = False
        server.die()
        assert (await server.http.get("/ready")).status_code == 503

    run(work)


def test_ready_is_200_while_the_queue_of_one_of_several_engines_has_room() -> None:
    async def work() -> None:
        server = Server()
        server.service.max_waiting = 5
        busy, free = EngineState(True, Stats(waiting=5)), EngineState(True, Stats(waiting=4))
        server.fake.engines = lambda: [busy, free]  # type: ignore[method-assign]
        assert (await server.http.get("/ready")).status_code == 200
        server.fake.engines = lambda: [busy, EngineState(False, Stats())]  # type: ignore[method-assign]
        assert (await server.http.get("/ready")).status_code == 503

    run(work)


def test_load_counts_what_is_being_answered() -> None:
    async def work() -> None:
        server = Server(lambda request: [])  # hangs until it is aborted
        running = asyncio.create_task(server.post("/v1/completions", BODIES["/v1/completions"]))
        await until(lambda: server.fake.requests != [])

        async def health() -> Stats:
            return Stats(running=1, waiting=2, pages_used=5, pages_total=20)

        server.fake.health = health  # type: ignore[method-assign]
        load = (await server.http.get("/load")).json()
        assert load == {"server_load": 1, "running": 1, "waiting": 2, "kv_cache_usage": 0.25}
        await server.fake.abort([request.id for request in server.fake.requests])
        await running
        assert (await server.http.get("/load")).json()["server_load"] == 0

    run(work)
