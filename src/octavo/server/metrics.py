"""Prometheus metrics, under vLLM's names where the meaning is the same, so that its dashboards work.

Gauges and counters are the engine's own statistics, read when asked for; histograms are filled when a request ends.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from octavo.frontend.client import EngineState
from octavo.sampling_params import SamplingParams
from octavo.types import EngineInfo, RequestOutput, Stats

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LONG = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client adds up the values of several processes
LABELS = ("model_name", "engine")
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class _Engine(Collector):
    """What is known of each engine as metrics; the label ``engine`` is its index, as vLLM counts them."""

    def __init__(self, model: str) -> None:
        self.engines: Sequence[EngineState] = ()
        self.info: EngineInfo | None = None
        self.bandwidth = 0.0  # bytes a second; 0: not known
        self._model = model

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("octavo:engine_running", "1 for an engine that runs, else 0.", labels=LABELS)
        for index, engine in enumerate(self.engines):
            running.add_metric([self._model, str(index)], engine.running)
        yield running
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", lambda s: s.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for room.", lambda s: s.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV pages held, 0 to 1.", lambda s: s.kv_cache_usage)
        yield self._counter("vllm:num_preemptions", "Preemptions.", lambda s: s.preemptions)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", lambda s: s.draft_tokens)
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Drafts that held.", lambda s: s.accepted_tokens)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens.", lambda s: s.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Generated tokens.", lambda s: s.generation_tokens)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prompt_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", lambda s: s.cached_tokens)
        yield self._counter("octavo:steps", "Steps of the engine.", lambda s: s.steps)
        yield self._counter("octavo:kv_slots_allocated", "KV slots held, over all steps.", lambda s: s.slots_allocated)
        yield self._counter("octavo:kv_slots_filled", "Those of them with a token.", lambda s: s.slots_filled)
        yield self._counter("octavo:busy_seconds", "Time that steps took.", lambda s: s.busy_seconds)
        info, bandwidth = self.info, self.bandwidth
        if info is not None and info.weight_bytes and bandwidth:
            text = "Bytes that steps had to read."
            yield self._counter("octavo:bytes_read", text, lambda s: _bytes_read(info, s))
            yield GaugeMetricFamily("octavo:memory_bandwidth", "Bytes a second of the memory.", bandwidth)
            text = "Least time for these bytes as a share of the time that steps took."
            yield self._gauge("octavo:floor_share", text, lambda s: _floor_share(info, s, bandwidth))

    def _gauge(self, name: str, text: str, value: Callable[[Stats], float]) -> Metric:
        return self._fill(GaugeMetricFamily(name, text, labels=LABELS), value)

    def _counter(self, name: str, text: str, value: Callable[[Stats], float]) -> Metric:
        return self._fill(CounterMetricFamily(name, text, labels=LABELS), value)

    def _fill(self, family: GaugeMetricFamily | CounterMetricFamily, value: Callable[[Stats], float]) -> Metric:
        for index, engine in enumerate(self.engines):
            if engine.running:
                family.add_metric([self._model, str(index)], value(engine.stats))
        return family


@functools.cache
def bandwidth_here() -> float:
    """Bytes a second of this machine's memory, measured once (0.2 s); low if the engine computes meanwhile."""
    from octavo.hub.machines import measure_bandwidth  # and numpy, which the start does without

    return measure_bandwidth()


def _bytes_read(info: EngineInfo, stats: Stats) -> int:
    """What all steps so far had to read: the weights, and the K and V of the tokens that sequences have.

    What prompts compute is not counted, so where they take most of the time little is read though the machine is busy.
    """
    return info.weight_bytes * stats.steps + info.kv_bytes * stats.slots_filled


def _floor_share(info: EngineInfo, stats: Stats, bandwidth: float) -> float:
    """The least time for these bytes as a share of the time that steps took; 0 before the first one."""
    return _bytes_read(info, stats) / bandwidth / stats.busy_seconds if stats.busy_seconds else 0.0


class Metrics:
    """All metrics of one server."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._registry = CollectorRegistry()
        self._engine = _Engine(model)
        self._registry.register(self._engine)
        self._ends = Counter(
            "vllm:request_success", "Requests that ended.", ["model_name", "finished_reason"], registry=self._registry
        )
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG)
        self._each = self._histogram("request_time_per_output_token_seconds", "Mean of a request.", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _LONG)
        self._prefill = self._histogram("request_prefill_time_seconds", "From then to the first token.", _LONG)
        self._decode = self._histogram("request_decode_time_seconds", "From then to the last token.", _LONG)
        self._inference = self._histogram("request_inference_time_seconds", "From the first step to the end.", _LONG)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", _TOKENS)
        self._n = self._histogram("request_params_n", "n of a request.", (1, 2, 5, 10, 20, 50, 100, 128))
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._output = self._histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)

    def finished(self, result: RequestOutput, params: SamplingParams, otherwise: str) -> None:
        """Counts a request that has ended; ``otherwise`` is the reason of outputs that have none of their own."""
        times = result.metrics
        lengths = [len(output.token_ids) for output in result.outputs]
        self._prompt.observe(len(result.prompt_token_ids))
        self._n.observe(len(result.outputs))
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)
        for output, length in zip(result.outputs, lengths, strict=True):
            self._ends.labels(self._model, output.finish_reason or otherwise).inc()
            self._output.observe(length)
        if times.first_token_time is None or times.finished_time is None:
            return
        self._first.observe(times.first_token_time - times.arrival_time)
        self._whole.observe(times.finished_time - times.arrival_time)
        scheduled = times.arrival_time if times.scheduled_time is None else times.scheduled_time
        self._queue.observe(scheduled - times.arrival_time)
        self._prefill.observe(times.first_token_time - scheduled)
        self._decode.observe(times.finished_time - times.first_token_time)
        self._inference.observe(times.finished_time - scheduled)
        if max(lengths) > 1:
            self._each.observe((times.finished_time - times.first_token_time) / (max(lengths) - 1))

    def text(self, engines: Sequence[EngineState], info: EngineInfo, bandwidth: float) -> bytes:
        """The exposition format, with the state of ``engines``; of several API processes it is the sum.

        ``bandwidth`` of the device's memory is in bytes a second, 0 if it is not known.
        """
        self._engine.engines, self._engine.info, self._engine.bandwidth = engines, info, bandwidth
        if SHARED_FOLDER not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        registry.register(self._engine)
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return made.labels(self._model)
