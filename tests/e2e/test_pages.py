"""The chat page and the dashboard in a real browser. Skipped where Chromium or Playwright is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import Server, running
from tools import tiny

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright, and a Chromium on the PATH")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
SMALL = ("--max-model-len", "128", "--kv-cache-memory-bytes", "4M", "--max-num-seqs", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tiny.make(tmp_path_factory.mktemp("pages") / "tiny", "llama")
    command = ["-m", "octavo", "serve", str(folder), *SMALL, "--port", "0", "--api-key", "secret"]
    with running(command, folder.parent / "log") as server:
        yield server


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    """A page on which nothing may fail, with the key where the pages keep it."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, problems = browser.new_page(), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: dialog.accept("secret"))
        yield page
        browser.close()
    assert [one for one in problems if "status of 40" not in one] == []  # no key yet, and what tests provoke


def test_a_conversation_is_streamed_into_the_chat_page(server: Server, page: Any, tmp_path: Path) -> None:
    page.goto(f"{server.url}/")
    page.wait_for_selector("#model:has-text('tiny')")
    page.fill("#longest", "12")
    page.fill("#text", "the quick <b>brown</b> fox")
    page.press("#text", "Enter")
    page.wait_for_selector(".assistant .facts")
    assert page.inner_text(".user") == "the quick <b>brown</b> fox"
    assert "first token after" in page.inner_text(".assistant .facts")
    page.fill("#text", "and then")
    page.click("#send")
    page.wait_for_selector(".assistant:nth-of-type(4) .facts")
    page.click("#new")
    assert page.query_selector(".user") is None


def test_an_error_of_the_server_is_shown(server: Server, page: Any) -> None:
    page.goto(f"{server.url}/")
    page.wait_for_selector("#model:has-text('tiny')")
    page.fill("#text", "long " * 400)
    page.press("#text", "Enter")
    page.wait_for_selector(".error")
    assert "128" in page.inner_text(".error")


def test_the_dashboard_shows_what_was_asked(server: Server, page: Any) -> None:
    body = {"model": "tiny", "prompt": "the", "max_tokens": 9, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, headers={"authorization": "Bearer secret"}).raise_for_status()
    page.goto(f"{server.url}/dashboard")
    page.wait_for_selector("#latency td:has-text('first token')")
    assert "tiny" in page.inner_text("#model")
    assert page.inner_text("#rows") == "of 4"
    assert int(page.inner_text("#latency tr:first-child td:last-child")) >= 1
    assert "ms" in page.inner_text("#latency tr:first-child td:nth-child(2)")
    drawn = "document.querySelector('#timeline').getContext('2d').getImageData(0, 0, 4000, 100).data.some(x => x)"
    assert page.evaluate(drawn)
