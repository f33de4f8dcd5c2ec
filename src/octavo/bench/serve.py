"""``octavo bench serve``: load on a running server through its completions endpoint, streaming."""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from tqdm import tqdm

from octavo.bench import plot, report, workload
from octavo.errors import ConfigError, OctavoError

if TYPE_CHECKING:
    import httpx

COLUMNS = {"ms of": "what", "samples": "samples"} | {p: f"ms.{p}" for p in ("mean", "p50", "p90", "p95", "p99", "max")}
TOTALS = {
    "case": "case",
    "requests": "requests",
    "failed": "failed",
    "wall s": "wall_s",
    "requests/s": "requests_s",
    "goodput/s": "goodput_s",
    "output tok/s": "output_tok_s",
    "total tok/s": "total_tok_s",
}
GOALS = ("ttft", "tpot", "itl", "e2e")
DEADLINE = 3600.0  # seconds for one request


@dataclass
class Answer:
    """What one request experienced. ``times`` are those of its pieces of text, in seconds since it was sent."""

    prompt_tokens: int
    output_tokens: int = 0
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    @property
    def per_token(self) -> float | None:
        """Seconds for each token after the first."""
        if not self.times or self.output_tokens < 2:
            return None
        return (self.seconds - self.times[0]) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Load:
    """Prompts that arrive at ``rate`` a second (0: at once), with gaps from a gamma distribution of shape
    ``burstiness``; at most ``concurrency`` are under way (0: no limit)."""

    prompts: list[list[int]]
    max_tokens: int
    rate: float
    burstiness: float
    concurrency: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="the server (default: %(default)s)"
    )
    parser.add_argument("--model", metavar="NAME", help="model to ask for (default: the first that the server lists)")
    parser.add_argument("--api-key", metavar="KEY", help="key of the server")
    parser.add_argument(
        "--concurrency", type=int, metavar="N", help="most requests at a time (default: 16, or no limit with a rate)"
    )
    parser.add_argument(
        "--request-rate",
        type=_rates,
        default=[0.0],
        metavar="R,R",
        help="new ones a second, a run each (0: no limit)",
    )
    parser.add_argument(
        "--burstiness", type=float, default=1.0, metavar="B", help="1: Poisson arrivals; below: in bursts (default: 1)"
    )
    parser.add_argument(
        "--goodput",
        nargs="+",
        type=_goal,
        default=[],
        metavar="T:MS",
        help="count those within ttft:, tpot:, itl:, e2e:",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="random ids lie below (default: 32000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random prompts (default: 0)")
    workload.add_arguments(parser, input_len=128, output_len=128, num_prompts=64)
    report.add_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the distributions of the times there")


def run(args: argparse.Namespace) -> int:
    """Runs every case at every rate, each with prompts of its own, and prints percentiles; 1 if a request failed."""
    if (args.concurrency or 1) < 1 or args.burstiness <= 0:
        raise ConfigError("--concurrency is below 1 or --burstiness not above 0.", "Give positive numbers.")
    rows: list[report.Row] = []
    panels: dict[str, dict[str, list[float]]] = {}
    for case in workload.cases(args, args.vocab_size, rounds=len(args.request_rate)):
        for rate, prompts in zip(args.request_rate, case.rounds[1:], strict=True):
            name = f"{case.name} at {rate:g}/s" if rate else case.name
            load = Load(prompts, case.max_tokens, rate, args.burstiness, args.concurrency or (0 if rate else 16))
            start = time.perf_counter()
            answers = asyncio.run(_send(args, load))
            rows += summary(name, answers, time.perf_counter() - start, dict(args.goodput))
            for kind, times in samples([a for a in answers if not a.error]).items():
                panels.setdefault(kind, {})[name] = times
    print(report.table([row for row in rows if "wall_s" in row], TOTALS), end="\n\n")
    print(report.table([row for row in rows if "ms" in row], {"case": "case", **COLUMNS}))
    if args.json is not None:
        report.write(rows, args.json)
    if args.plot is not None:
        args.plot.write_text(plot.distributions(panels), encoding="utf-8")
        print(f"wrote {args.plot}", file=sys.stderr)
    return 1 if any(row.get("failed") for row in rows) else 0


def summary(
    name: str, answers: list[Answer], seconds: float, goals: Mapping[str, float] | None = None
) -> list[report.Row]:
    """A row of totals, then one for each kind of time; raises `OctavoError` if no request succeeded.

    ``goals`` are times in milliseconds; requests that keep all of them are counted as goodput.
    """
    good = [a for a in answers if not a.error]
    if not good:
        raise OctavoError(f"all {len(answers)} requests failed; the first: {answers[0].error}", "Is the server ready?")
    prompt, output = sum(a.prompt_tokens for a in good), sum(a.output_tokens for a in good)
    totals: report.Row = {
        "case": name,
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "wall_s": seconds,
        "requests_s": len(good) / seconds,
        "output_tok_s": output / seconds,
        "total_tok_s": (prompt + output) / seconds,
    }
    if goals:
        totals["goodput_s"] = sum(_keeps(a, goals) for a in good) / seconds
    return [
        totals,
        *(
            {"case": name, "what": what, "samples": len(times), "ms": report.percentiles(times)}
            for what, times in samples(good).items()
            if times
        ),
    ]


def samples(answers: list[Answer]) -> dict[str, list[float]]:
    """Milliseconds: to the first token, for each further one (mean of a request), between two pieces, of the whole."""
    return {
        "TTFT": [1000 * a.times[0] for a in answers if a.times],
        "TPOT": [1000 * a.per_token for a in answers if a.per_token is not None],
        "ITL": [1000 * (b - a) for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)],
        "E2E": [1000 * a.seconds for a in answers],
    }


def _keeps(answer: Answer, goals: Mapping[str, float]) -> bool:
    own = {kind.lower(): times for kind, times in samples([answer]).items()}
    return all(max(own[kind], default=0.0) <= limit for kind, limit in goals.items())


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if any(not 0 <= rate < math.inf for rate in rates):
        raise ValueError(text)
    return rates


def _goal(text: str) -> tuple[str, float]:
    kind, _, limit = text.partition(":")
    if kind not in GOALS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(f'{one}:MS' for one in GOALS)}")
    return kind, float(limit)


async def _send(args: argparse.Namespace, load: Load) -> list[Answer]:
    try:
        import httpx
    except ImportError:
        raise ConfigError("the load generator needs the package httpx.", "Install it: pip install httpx") from None
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=load.concurrency or None)
    async with httpx.AsyncClient(base_url=args.base_url, headers=headers, timeout=DEADLINE, limits=limits) as client:
        model = args.model or await _first_model(client)
        slots = asyncio.Semaphore(load.concurrency or len(load.prompts))
        with tqdm(total=len(load.prompts), unit="request", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            tasks = [
                asyncio.create_task(_ask(client, slots, model, prompt, load.max_tokens))
                async for prompt in _paced(load)
            ]
            for task in tasks:
                task.add_done_callback(lambda _: bar.update())
            return await asyncio.gather(*tasks)


async def _paced(load: Load) -> AsyncIterator[list[int]]:
    """Prompts at the times of their arrival, which do not depend on how long the way to here took."""
    rng, loop = random.Random(0), asyncio.get_running_loop()
    due = loop.time()
    for prompt in load.prompts:
        yield prompt
        if load.rate:
            due += rng.gammavariate(load.burstiness, 1 / (load.rate * load.burstiness))
            await asyncio.sleep(max(0.0, due - loop.time()))


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
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            answer.error = repr(error)
        answer.seconds = time.perf_counter() - start
    if not answer.error and not answer.output_tokens:
        answer.error = "the stream ended without usage"
    return answer


class _Choice(msgspec.Struct):
    text: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


def _read(line: str, answer: Answer, now: float) -> None:
    """Takes one line of an event stream into ``answer``; raises ``msgspec.DecodeError`` for an event that is none."""
    if not line.startswith("data:") or line.endswith("[DONE]"):
        return
    event = msgspec.json.decode(line[5:], type=_Event)
    if event.error:
        answer.error = str(event.error)
    if event.usage is not None:
        answer.output_tokens = event.usage.completion_tokens
    if any(choice.text for choice in event.choices or ()):
        answer.times.append(now)
