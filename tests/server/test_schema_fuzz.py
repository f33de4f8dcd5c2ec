"""Requests made from the server's own description (schemathesis): no answer is a 5xx, and none takes long.

It is no part of the environment for tests, being large; without it these are skipped: ``pip install schemathesis``.
``OCTAVO_FUZZ_EXAMPLES=500`` makes more requests of each kind.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.server.app import ROUTES
from octavo.server.files.store import FileStore
from octavo.server.openapi import document
from tests.server.fake import Server

schemathesis: Any = pytest.importorskip("schemathesis", reason="needs the package schemathesis")
hypothesis: Any = pytest.importorskip("hypothesis")

EXAMPLES = int(os.environ.get("OCTAVO_FUZZ_EXAMPLES", "4"))
SLOWEST = 5.0  # seconds for one answer
OPERATIONS = [(route.method, route.path.replace(":path", "")) for route in ROUTES]


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda value: str(value))
def test_no_request_breaks_the_server(method: str, path: str, tmp_path: Path) -> None:
    described = schemathesis.openapi.from_dict(document(ROUTES))
    operation = described[path][method]
    mode = schemathesis.GenerationMode
    strategy = operation.as_strategy(generation_mode=mode.POSITIVE) | operation.as_strategy(
        generation_mode=mode.NEGATIVE
    )

    @hypothesis.given(case=strategy)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case: Any) -> None:
        asyncio.run(asyncio.wait_for(_ask(case, tmp_path), 4 * SLOWEST))

    check()


async def _ask(case: Any, folder: Path) -> None:
    server = Server(max_model_len=4096)
    server.service.files = FileStore(folder)
    sent = case.as_transport_kwargs(base_url="http://test")
    sent = {key: value for key, value in sent.items() if key in ("method", "url", "json", "data", "params", "headers")}
    if isinstance(sent.get("data"), bytes | str):
        sent["content"] = sent.pop("data")
    began = time.monotonic()
    try:
        response = await server.http.request(**sent)
    except (UnicodeError, ValueError, TypeError) as error:  # what no client can send
        hypothesis.reject() if "surrogate" in str(error) or "JSON" in str(error) else None
        raise
    assert response.status_code < 500, (sent, response.text)
    assert time.monotonic() - began < SLOWEST
    assert "x-request-id" in response.headers
    for task in [*server.service.batches.values(), *server.service.background.values()]:
        task.cancel()
    await server.http.aclose()
