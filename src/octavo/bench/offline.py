"""Drives an `EngineCore` in this process, so that every step and every first token can be timed."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.config import EngineConfig
from octavo.errors import ConfigError, OctavoError
from octavo.frontend.inputs import request_of
from octavo.types import EngineInfo, Request, Sampling

if TYPE_CHECKING:
    from octavo.core.engine import EngineCore

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Round:
    """One timed round. Times are in seconds; those of requests count from the start of the round."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    first_token: list[float]
    finished: list[float]
    steps: list[float]
    kv_waste: float  # share of the allocated KV slots that held no token, averaged over steps
    others_cpu: float | None  # share of the machine's CPU time that other processes took

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first one, for a round of one request."""
        if len(self.finished) != 1 or self.output_tokens < 2:
            return None
        return (self.output_tokens - 1) / (self.finished[0] - self.first_token[0])


def make_core(config: EngineConfig) -> EngineCore:
    """The engine core with the real worker; loads the model. Raises `ConfigError` for several engines."""
    from octavo.core.engine import EngineCore
    from octavo.runtime.worker import worker_for

    check_single(config)
    return EngineCore(config, worker_for(config))


def check_single(config: EngineConfig) -> None:
    """Raises `ConfigError` for several engines."""
    parallel = config.parallel
    if parallel.data_parallel_size > 1 or parallel.distributed_executor_backend != "mp":
        raise ConfigError(
            f"data_parallel_size is {parallel.data_parallel_size} and distributed_executor_backend "
            f"{parallel.distributed_executor_backend}; this measures one engine of this machine.",
            "Leave them out, or measure a server with octavo bench serve.",
        )


def warm_up(core: EngineCore, prompts: list[list[int]], max_tokens: int) -> None:
    """Runs ``prompts`` with few new tokens, untimed."""
    run(core, prompts, min(max_tokens, WARM_UP_TOKENS))


def run(core: EngineCore, prompts: list[list[int]], max_tokens: int) -> Round:
    """Submits all ``prompts`` at once and steps until each has ``max_tokens`` new tokens, greedily, past any eos.

    Raises `OctavoError` if a request is refused or ends early.
    """
    requests = [make_request(core.info, str(i), prompt, max_tokens) for i, prompt in enumerate(prompts)]
    first, finished, counts, steps = ({}, {}, dict.fromkeys((r.id for r in requests), 0), [])  # type: ignore[var-annotated]
    stats, cpu, start = core.stats(), _cpu_seconds(), time.perf_counter()
    for request in requests:
        refusal = core.add(request)
        if refusal is not None:
            raise OctavoError(f"a request of the benchmark was refused: {refusal.error}", "Choose a smaller workload.")
    while core.has_work():
        began = time.perf_counter()
        outputs = core.step()
        now = time.perf_counter()
        steps.append(now - began)
        for output in outputs:
            counts[output.id] += len(output.token_ids)
            first.setdefault(output.id, now - start)
            if output.finish_reason is not None:
                finished[output.id] = now - start
            if output.error:
                raise OctavoError(f"a request of the benchmark failed: {output.error}")
    seconds = time.perf_counter() - start
    if set(counts.values()) != {max_tokens}:
        raise OctavoError(f"answers have {sorted(set(counts.values()))} tokens instead of {max_tokens}.")
    after = core.stats()
    allocated, filled = after.slots_allocated - stats.slots_allocated, after.slots_filled - stats.slots_filled
    return Round(
        seconds=seconds,
        prompt_tokens=sum(map(len, prompts)),
        output_tokens=sum(counts.values()),
        first_token=list(first.values()),
        finished=list(finished.values()),
        steps=steps,
        kv_waste=1 - filled / allocated if allocated else 0.0,
        others_cpu=_others(cpu, _cpu_seconds(), seconds),
    )


def peak_rss_mib() -> int:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def make_request(info: EngineInfo, id: str, prompt: list[int], max_tokens: int) -> Request:
    """A greedy request for ``max_tokens`` tokens after ``prompt``."""
    return request_of(info, id, prompt, Sampling(max_tokens=max_tokens, temperature=0.0))


def _cpu_seconds() -> tuple[float, float] | None:
    """(CPU seconds of the whole machine, of this process), where the system tells."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
    except (OSError, ValueError):
        return None
    idle = sum(ticks[3:5])
    own = os.times()
    return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def _others(before: tuple[float, float] | None, after: tuple[float, float] | None, seconds: float) -> float | None:
    if before is None or after is None:
        return None
    busy = (after[0] - before[0]) - (after[1] - before[1])
    return min(1.0, max(0.0, busy / (seconds * (os.cpu_count() or 1))))
