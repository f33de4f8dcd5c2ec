"""OpenTelemetry: a span for each request, with the attributes that vLLM's spans have. Only where it is asked for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError
from octavo.sampling_params import SamplingParams
from octavo.types import RequestOutput

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

INSTALL = "Install it: pip install 'octavo[otel]'"


class Tracing:
    """Sends spans to a collector, in batches and from a thread of its own; what cannot be sent is dropped."""

    def __init__(self, endpoint: str, model: str, *, exporter: SpanExporter | None = None) -> None:
        """``endpoint`` is a URL for OTLP over HTTP (``http://host:4318/v1/traces``); ``exporter`` takes its place."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint, timeout=5)
        except ImportError as error:
            raise ConfigError(
                f"--otlp-traces-endpoint needs a package that is missing: {error.name}.", INSTALL
            ) from None
        self._model = model
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "octavo"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("octavo")

    def ended(self, result: RequestOutput, params: SamplingParams, traceparent: str, reason: str) -> None:
        """A request has ended. ``traceparent`` is the header of that name, or empty."""
        from opentelemetry.trace import SpanKind

        times = result.metrics
        offset = time.time() - time.monotonic()  # spans have times of day
        end = times.finished_time or time.monotonic()
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract({"traceparent": traceparent}) if traceparent else None,
            kind=SpanKind.SERVER,
            start_time=int(1e9 * (times.arrival_time + offset)),
            attributes=self._attributes(result, params, end),
        )
        span.set_attribute("gen_ai.response.finish_reasons", [o.finish_reason or reason for o in result.outputs])
        span.end(int(1e9 * (end + offset)))

    def close(self) -> None:
        """Sends what waits. Blocks."""
        self._provider.shutdown()

    def _attributes(self, result: RequestOutput, params: SamplingParams, end: float) -> dict[str, Any]:
        times = result.metrics
        found: dict[str, Any] = {
            "gen_ai.request.id": result.request_id,
            "gen_ai.response.model": self._model,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.n": params.n,
            "gen_ai.usage.prompt_tokens": len(result.prompt_token_ids),
            "gen_ai.usage.completion_tokens": sum(len(output.token_ids) for output in result.outputs),
            "gen_ai.latency.e2e": end - times.arrival_time,
        }
        if params.max_tokens is not None:
            found["gen_ai.request.max_tokens"] = params.max_tokens
        if times.first_token_time is not None and times.scheduled_time is not None:
            found |= {
                "gen_ai.latency.time_in_queue": times.scheduled_time - times.arrival_time,
                "gen_ai.latency.time_to_first_token": times.first_token_time - times.arrival_time,
                "gen_ai.latency.time_in_model_prefill": times.first_token_time - times.scheduled_time,
                "gen_ai.latency.time_in_model_decode": end - times.first_token_time,
                "gen_ai.latency.time_in_model_inference": end - times.scheduled_time,
            }
        return found
