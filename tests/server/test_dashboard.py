"""The pages for people and the data behind them, over a fake engine."""

from __future__ import annotations

import asyncio
import base64
import re
from hashlib import sha256
from pathlib import Path

import pytest

from octavo.server.dashboard import PAGES
from octavo.server.history import KEPT
from tests.server.fake import Server, run, speak

BODY = {"prompt": "hello", "max_tokens": 4}


def test_a_request_that_ended_is_told_with_its_times_and_counts() -> None:
    async def work() -> None:
        server = Server()
        await server.post("/v1/completions", BODY)
        told = (await server.http.get("/dashboard/data")).json()
        (span,) = told["ended"]
        assert (span["number"], span["output_tokens"], span["cached_tokens"], span["reason"]) == (1, 4, 4, "length")
        assert span["prompt_tokens"] == len(server.tokenizer.encode("hello"))
        assert 0 <= span["arrived"] <= span["first_token"] <= span["ended"] <= told["now"]
        assert told["model"] == "m"
        assert [engine["running"] for engine in told["engines"]] == [True]
        assert not told.get("running")

    run(work)


def test_only_requests_that_ended_since_are_told_again() -> None:
    async def work() -> None:
        server = Server()
        for _ in range(3):
            await server.post("/v1/completions", BODY)
        told = (await server.http.get("/dashboard/data", params={"after": 1})).json()
        assert [span["number"] for span in told["ended"]] == [2, 3]

    run(work)


def test_a_request_that_runs_is_told_with_what_it_has_so_far_and_then_as_aborted() -> None:
    async def work() -> None:
        server = Server(speak([65, 66], ends=False))
        task = asyncio.create_task(server.post("/v1/completions", {**BODY, "max_tokens": 50}))
        running: list[dict[str, object]] = []
        while not running or running[0].get("output_tokens") != 2:  # each turn of it lets the request go on
            running = (await server.http.get("/dashboard/data")).json()["running"]
        assert "ended" not in running[0]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        told = (await server.http.get("/dashboard/data")).json()
        assert not told["running"]
        assert told["ended"][0]["reason"] == "abort"

    run(work)


def test_the_history_is_bounded() -> None:
    async def work() -> None:
        server = Server(speak([65]))
        for _ in range(KEPT + 5):
            await server.post("/v1/completions", {**BODY, "max_tokens": 1})
        told = (await server.http.get("/dashboard/data")).json()["ended"]
        assert [told[0]["number"], told[-1]["number"], len(told)] == [6, KEPT + 5, KEPT]

    run(work)


@pytest.mark.parametrize("after", ["-1", "x", "1" * 16, "٣", ""])
def test_a_number_that_is_none_is_refused(after: str) -> None:
    async def work() -> None:
        response = await Server().http.get("/dashboard/data", params={"after": after})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "after"

    run(work)


@pytest.mark.parametrize(("path", "file"), [("/", "chat.html"), ("/dashboard", "dashboard.html")])
def test_a_page_may_run_its_own_script_and_nothing_else(path: str, file: str) -> None:
    async def work() -> None:
        response = await Server().http.get(path)
        assert response.headers["content-type"].startswith("text/html")
        policy = response.headers["content-security-policy"]
        (script,) = re.findall(r"<script>(.*?)</script>", response.text, re.DOTALL)
        digest = base64.b64encode(sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy

    run(work)


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.html")), ids=lambda path: path.name)
def test_a_page_names_no_other_server_and_writes_no_html_from_data(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", text)
    assert not re.findall(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|\son[a-z]+=", text)
