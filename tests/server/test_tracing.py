"""Spans of requests: what they say, what they are part of, and where they are sent."""

from __future__ import annotations

import asyncio
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from octavo.errors import ConfigError
from octavo.server.tracing import Tracing
from tests.server.fake import Server

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ASK: Any = {"prompt": "hello", "max_tokens": 5, "temperature": 0.5}


def spans(headers: dict[str, str], **changes: Any) -> list[Any]:
    """Of one completion."""
    exporter = InMemorySpanExporter()

    async def work() -> None:
        server = Server()
        server.service.tracing = Tracing("", "m", exporter=exporter)
        assert (await server.post("/v1/completions", {**ASK, **changes}, headers=headers)).status_code == 200
        server.service.tracing.close()

    asyncio.run(work())
    return list(exporter.get_finished_spans())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_parameters_counts_and_times(stream: bool) -> None:
    (span,) = spans({"traceparent": f"00-{TRACE}-{PARENT}-01"}, stream=stream)
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    found = span.attributes
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.max_tokens"]) == (0.5, 5)
    assert found["gen_ai.usage.completion_tokens"] == 5
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    parts = [found[f"gen_ai.latency.time_in_{name}"] for name in ("queue", "model_prefill", "model_decode")]
    assert sum(parts) == pytest.approx(found["gen_ai.latency.e2e"])
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(found["gen_ai.latency.e2e"], abs=1e-3)


@pytest.mark.parametrize("header", [{}, {"traceparent": "00-nonsense"}])
def test_without_a_parent_a_span_is_the_root(header: dict[str, str]) -> None:
    (span,) = spans(header)
    assert span.parent is None


def test_spans_reach_a_collector() -> None:
    got: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    async def work(port: int) -> None:
        server = Server()
        server.service.tracing = Tracing(f"http://127.0.0.1:{port}/v1/traces", "m")
        await server.post("/v1/completions", ASK)
        await asyncio.to_thread(server.service.tracing.close)

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            asyncio.run(work(collector.server_port))
        finally:
            collector.shutdown()
            thread.join()
    assert b"llm_request" in b"".join(got)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"octavo\[otel\]"):
        Tracing("http://127.0.0.1:1", "m")
