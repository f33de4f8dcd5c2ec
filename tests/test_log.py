from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from octavo import log


@pytest.fixture
def logger() -> Iterator[None]:
    all = [logging.getLogger(name) for name in ("octavo", *log.OTHERS)]
    before = [(one.handlers[:], one.propagate, one.level) for one in all]
    yield
    for one, (handlers, propagate, level) in zip(all, before, strict=True):
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.mark.usefixtures("logger")
def test_an_exception_is_logged_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info")
    try:
        raise ZeroDivisionError("why it failed")
    except ZeroDivisionError:
        log.get_logger().exception("request 1 failed")
    said = capsys.readouterr().err
    assert "error: request 1 failed" in said
    assert "why it failed" in said
    assert "test_log.py" in said


@pytest.mark.usefixtures("logger")
def test_json_is_one_object_a_line_with_the_traceback_inside(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(log.FORMAT, "json")
    log.configure("info")
    log.get_logger().info("first %s", "line\nwith a break")
    try:
        raise ZeroDivisionError("why it failed")
    except ZeroDivisionError:
        logging.getLogger("asyncio").exception("request 1 failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"]) == ("info", "first line\nwith a break")
    assert first["time"] > 1e9
    assert (second["level"], second["message"]) == ("error", "request 1 failed")
    assert "why it failed" in second["exception"]


def test_processes_count_from_the_start_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.START, repr(log._START))
    code = "from octavo import log; log.configure(); log.get_logger().info('here')"
    time.sleep(max(0.0, 1.0 + log._START - time.monotonic()))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stderr.split()[1].rstrip("s")) >= 1.0


@pytest.mark.usefixtures("logger")
@pytest.mark.parametrize("form", ["text", "json"])
def test_one_of_several_processes_names_itself(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(log.FORMAT, form)
    monkeypatch.setenv(log.PROCESS, "engine 1")
    log.configure("info")
    log.get_logger().warning("out of memory")
    said = capsys.readouterr().err
    if form == "json":
        assert json.loads(said)["name"] == "engine 1"
    else:
        assert said.endswith("s  engine 1: warning: out of memory\n")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("HF_TOKEN=hf_ABCDEFGHIJKL in the environment", "hf_ABCDEFGHIJKL"),
        ("started with {'api_key': 'verysecret1', 'port': 80}", "verysecret1"),
        ("--admin-api-key=another-one --port 1", "another-one"),
        ("password: hunter2hunter2", "hunter2hunter2"),
        ("GET https://user:passw0rd@example.test/x", "passw0rd"),
        ("key sk-proj-0123456789abcdef was sent", "sk-proj-0123456789abcdef"),
    ],
)
@pytest.mark.parametrize("style", ["text", "json"])
@pytest.mark.usefixtures("logger")
def test_secrets_are_not_logged(
    style: str, text: str, secret: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(log.FORMAT, style)
    log.configure("info")
    log.get_logger().info("%s", text)
    said = capsys.readouterr().err
    assert secret not in said
    assert "***" in said


@pytest.mark.parametrize(
    "text",
    [
        "weights: 272 tensors, 0.27 GB in 0.41 s (0.66 GB/s)",
        "kv cache: 283 pages of 16 tokens: 23040 bytes a token",
        "tool calls: hermes; reasoning: not read",
        "max length: 8192 (the model was made for 8192 = max_position_embeddings)",
        "POST /v1/chat/completions 200 1.154s dc7b5cc359134ef98319b63128cb820f",
        "prompt tokens: 1234567, of a token: 12",
        "serving tiny at http://127.0.0.1:8000/v1",
    ],
)
def test_what_is_no_secret_is_logged_as_it_is(text: str) -> None:
    assert log.redacted(text) == text
