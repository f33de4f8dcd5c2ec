"""``octavo bench serve``: load on a running server through its completions endpoint, streaming."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from octavo.bench import report, workload
from octavo.errors import ConfigError, OctavoError

if TYPE_CHECKING:
    import httpx

COLUMNS = {"ms of": "what", "samples": "samples"} | {p: f"ms.{p}" for p in ("mean", "p50", "p90", "p99", "max")}
TOTALS = {
    "case": "case",
    "requests": "requests",
    "failed": "failed",
    "wall s": "wall_s",
    "requests/s": "requests_s",
    "output tok/s": "output_tok_s",
    "total tok/s": "total_tok_s",
}
DEADLINE = 3600.0  # seconds for one request


@dataclass
class Answer:
    """What one request experienced. ``times`` are those of its pieces of text, in seconds since it was sent."""

    prompt_tokens: int
    output_tokens: int = 0
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="the server (default: %(default)s)"
    )
    parser.add_argument("--model", metavar="NAME", help="model to ask for (default: the first that the server lists)")
    parser.add_argument("--api-key", metavar="KEY", help="key of the server")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="requests at a time (default: 16)")
    parser.add_argument("--request-rate", type=float, default=0.0, metavar="R", help="new ones a second (0: no limit)")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="random ids lie below (default: 32000)"
    )
    workload.add_arguments(parser, input_len=128, output_len=128, num_prompts=64)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows there too")


def run(args: argparse.Namespace) -> int:
    """Sends every case's first timed round and prints its percentiles; 1 if a request failed."""
    if args.concurrency < 1 or args.request_rate < 0:
        raise ConfigError("--concurrency is below 1 or --request-rate below 0.", "Give positive numbers.")
    rows: list[report.Row] = []
    for case in workload.cases(args, args.vocab_size, rounds=1):
        start = time.perf_counter()
        answers = asyncio.run(_load(args, case))
        rows += summary(case.name, answers, time.perf_counter() - start)
    print(report.table([row for row in rows if "wall_s" in row], TOTALS), end="\n\n")
    print(report.table([row for row in rows if "ms" in row], {"case": "case", **COLUMNS}))
    if args.json is not None:
        report.write(rows, args.json)
    return 1 if any(row.get("failed") for row in rows) else 0


def summary(name: str, answers: list[Answer], seconds: float) -> list[report.Row]:
    """A row of totals, then one for each kind of time; raises `OctavoError` if no request succeeded."""
    good = [a for a in answers if not a.error]
    if not good:
        raise OctavoError(f"all {len(answers)} requests failed; the first: {answers[0].error}", "Is the server ready?")
    prompt, output = sum(a.prompt_tokens for a in good), sum(a.output_tokens for a in good)
    rows: list[report.Row] = [
        {
            "case": name,
            "requests": len(answers),
            "failed": len(answers) - len(good),
            "wall_s": seconds,
            "requests_s": len(good) / seconds,
            "output_tok_s": output / seconds,
            "total_tok_s": (prompt + output) / seconds,
        }
    ]
    samples = {
        "TTFT": [a.times[0] for a in good if a.times],
        "TPOT": [(a.seconds - a.times[0]) / (a.output_tokens - 1) for a in good if a.times and a.output_tokens > 1],
        "ITL": [after - before for a in good for before, after in zip(a.times, a.times[1:], strict=False)],
        "E2E": [a.seconds for a in good],
    }
    rows += [
        {"case": name, "what": what, "samples": len(times), "ms": report.percentiles([1000 * t for t in times])}
        for what, times in samples.items()
        if times
    ]
    return rows


async def _load(args: argparse.Namespace, case: workload.Case) -> list[Answer]:
    try:
        import httpx
    except ImportError:
        raise ConfigError("the load generator needs the package httpx.", "Install it: pip install httpx") from None
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=args.concurrency)
    async with httpx.AsyncClient(base_url=args.base_url, headers=headers, timeout=DEADLINE, limits=limits) as client:
        model = args.model or await _first_model(client)
        slots = asyncio.Semaphore(args.concurrency)
        tasks = [
            asyncio.create_task(_ask(client, slots, model, prompt, case.max_tokens))
            async for prompt in _paced(case.rounds[1], args.request_rate)
        ]
        return await asyncio.gather(*tasks)


async def _paced(prompts: list[list[int]], rate: float) -> AsyncIterator[list[int]]:
    """Prompts as a Poisson process of ``rate`` a second; 0: all at once."""
    rng = random.Random(0)
    for prompt in prompts:
        yield prompt
        if rate:
            await asyncio.sleep(rng.expovariate(rate))


async def _first_model(client: httpx.AsyncClient) -> str:
    import httpx

    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"no model is listed at {str(client.base_url).rstrip('/')}/v1/models: {error!r}.", "Is the server up?"
        ) from None


async def _ask(
    client: httpx.AsyncClient, slots: asyncio.Semaphore, model: str, prompt: list[int], max_tokens: int
) -> Answer:
    import httpx

    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answer(prompt_tokens=len(prompt))
    async with slots:
        start = time.perf_counter()
        try:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    answer.error = f"HTTP {response.status_code}: {(await response.aread())[:300]!r}"
                    return answer
                async for line in response.aiter_lines():
                    _read(line, answer, time.perf_counter() - start)
        except httpx.HTTPError as error:
            answer.error = repr(error)
        answer.seconds = time.perf_counter() - start
    if not answer.error and not answer.output_tokens:
        answer.error = "the stream ended without usage"
    return answer


def _read(line: str, answer: Answer, now: float) -> None:
    """Takes one line of an event stream into ``answer``."""
    if not line.startswith("data:") or line.endswith("[DONE]"):
        return
    event: dict[str, Any] = msgspec.json.decode(line[5:])
    if event.get("error"):
        answer.error = str(event["error"])
    if event.get("usage"):
        answer.output_tokens = event["usage"]["completion_tokens"]
    if any(choice.get("text") for choice in event.get("choices") or ()):
        answer.times.append(now)
