"""Pages from elsewhere (CORS), a prefix that a proxy puts before all paths, and the ids that clients send."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.app import DOCS, build_app
from octavo.server.edge import Edge
from octavo.server.keys import Keys
from tests.server.fake import CHAT, Server, run

PAGE = "https://chat.example.org"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}


def asked(
    config: ServerConfig, method: str, path: str, *, app: dict[str, Any] | None = None, **request: Any
) -> httpx.Response:
    """The answer of a server that needs the key ``k``."""
    answers = []

    async def work() -> None:
        made = build_app(Server().service, keys=Keys.of("k"), **(app or {}))
        transport = httpx.ASGITransport(Edge.of(config).around(made))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answers.append(await client.request(method, path, **request))

    run(work)
    return answers[0]


def test_nothing_is_said_to_other_origins_unless_asked_for() -> None:
    assert asked(ServerConfig(), "OPTIONS", "/v1/chat/completions", headers=PREFLIGHT).status_code == 401
    answer = asked(ServerConfig(), "GET", "/ping", headers={"origin": PAGE})
    assert [name for name in answer.headers if name.startswith("access-control")] == []


def test_a_preflight_needs_no_key_and_the_request_does() -> None:
    config = ServerConfig(allowed_origins=[PAGE])
    answer = asked(config, "OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in answer.headers["access-control-allow-headers"]
    answer = asked(config, "POST", "/v1/chat/completions", headers={"origin": PAGE}, json=CHAT)
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == PAGE  # or the page could not read the error
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"allowed_origins": ["https://other.example.org"]}, False),
        ({"allowed_origins": ["*"]}, True),
        ({"allowed_origins": [PAGE], "allowed_methods": ["GET"]}, False),
        ({"allowed_origins": [PAGE], "allowed_headers": ["x-api-key"]}, False),
        ({"allowed_origins": [PAGE], "allowed_headers": ["authorization"], "allowed_methods": ["POST"]}, True),
    ],
)
def test_origins_methods_and_headers_are_those_that_are_allowed(options: dict[str, Any], allowed: bool) -> None:
    answer = asked(ServerConfig(**options), "OPTIONS", "/v1/models", headers=PREFLIGHT)
    assert (answer.status_code == 200) is allowed


def test_credentials_are_for_origins_that_are_named() -> None:
    config = ServerConfig(allowed_origins=[PAGE], allow_credentials=True)
    answer = asked(config, "GET", "/ping", headers={"origin": PAGE})
    assert answer.headers["access-control-allow-credentials"] == "true"
    with pytest.raises(ConfigError, match="every origin"):
        Edge.of(ServerConfig(allowed_origins=["*"], allow_credentials=True))


@pytest.mark.parametrize("path", ["/llm/v1/models", "/v1/models"])
def test_a_prefix_may_be_left_on_or_taken_off_by_the_proxy(path: str) -> None:
    answer = asked(ServerConfig(root_path="/llm/"), "GET", path, headers={"authorization": "Bearer k"})
    assert answer.json()["data"][0]["id"] == "m"


def test_behind_a_prefix_paths_are_guarded_as_without() -> None:
    config = ServerConfig(root_path="/llm")
    assert asked(config, "GET", "/llm/ping").status_code == 200
    assert asked(config, "GET", "/llm").headers["content-type"].startswith("text/html")
    for path in ("/llm/v1/models", "/llm/ping/../metrics", "/llmping", "/llm/llm/ping"):
        assert asked(config, "GET", path).status_code == 401


def test_the_description_says_where_the_server_is() -> None:
    config, headers = ServerConfig(root_path="/llm"), {"authorization": "Bearer k"}
    assert asked(config, "GET", "/llm/openapi.json", headers=headers).json()["servers"] == [{"url": "/llm"}]
    assert "servers" not in asked(ServerConfig(), "GET", "/openapi.json", headers=headers).json()


@pytest.mark.parametrize("prefix", ["llm", "/v1", "https://x/llm"])
def test_a_prefix_that_is_none_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="root_path"):
        Edge.of(ServerConfig(root_path=prefix))


def test_the_description_can_be_left_out() -> None:
    headers = {"authorization": "Bearer k"}
    for path in sorted(DOCS):
        assert asked(ServerConfig(), "GET", path, headers=headers).status_code == 200
        assert asked(ServerConfig(), "GET", path, app={"without": DOCS}, headers=headers).status_code == 404


@pytest.mark.parametrize(("sent", "echoed"), [("trace-7", True), ("a b", False), ("x" * 200, False), ("", False)])
def test_an_answer_has_the_id_that_the_client_sent_if_that_is_wanted(sent: str, echoed: bool) -> None:
    headers = {"x-request-id": sent}
    answer = asked(ServerConfig(), "GET", "/v1/models", app={"echo_ids": True}, headers=headers)
    assert (answer.headers["x-request-id"] == sent) is echoed
    assert asked(ServerConfig(), "GET", "/ping", headers=headers).headers["x-request-id"] != sent
