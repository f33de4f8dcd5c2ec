"""Serves a tiny model under mixed traffic and watches memory: ``python tools/soak.py [--minutes 10] [--clients 8]``.

First the stores that have a limit are filled up to it. Then clients ask every endpoint, with schemas that never come
twice, good and bad bodies, streams and whole answers; some hang up in the middle. A line every 30 seconds has the
memory of each process. At the end comes the slope of each, in MB a minute (least squares over what follows the first
fifth). The exit status is 1 if a slope is above ``--bound``, a request got a 5xx or no answer, pages are still held, or
the server does not end with 0. Needs httpx and psutil.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import tiny

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "16M")
SAMPLE_SECONDS = 2.0
LINE_SECONDS = 30.0
START_SECONDS = 60.0
FILL_SCHEMAS, FILL_RESPONSES = 1500, 1100  # 128 MiB of compiled grammars, 1,000 responses
SETTLING = 5  # the slope leaves out this part of the time
MB = 2**20
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
GETS = ("/health", "/ready", "/load", "/metrics", "/v1/models", "/version", "/dashboard/data", "/openapi.json", "/docs")


class Traffic:
    """What the clients do. ``outcomes`` counts (what, status); status 0 is no answer at all."""

    def __init__(self, http: httpx.AsyncClient, seed: int) -> None:
        self._http = http
        self._random = random.Random(seed)
        self._serial = 0
        self.outcomes: collections.Counter[tuple[str, int]] = collections.Counter()

    async def client(self, end: float) -> None:
        """One client: a request after the other until ``end``, on the monotonic clock."""
        acts: list[tuple[Callable[[], Awaitable[int]], int]] = [
            (self.generate, 12),
            (self.stream, 8),
            (self.vanish, 4),
            (self.constrained, 2),
            (self.wrong, 3),
            (self.tokens, 3),
            (self.look, 3),
            (self.batch, 1),
        ]
        choices, weights = [act for act, _ in acts], [weight for _, weight in acts]
        while time.monotonic() < end:
            (act,) = self._random.choices(choices, weights)
            try:
                status = await act()
            except httpx.HTTPError:
                status = 0
            self.outcomes[act.__name__, status] += 1

    async def fill(self, clients: int) -> None:
        """As many schemas and responses as the server keeps."""

        async def some(act: Callable[[], Awaitable[int]], count: int) -> None:
            for _ in range(count):
                self.outcomes["fill", await act()] += 1

        shares = ((self.constrained, FILL_SCHEMAS // clients), (self.respond, FILL_RESPONSES // clients))
        await asyncio.gather(*(some(act, count) for act, count in shares for _ in range(clients)))

    async def respond(self) -> int:
        return (await self._http.post(PATHS[2], json=self._body(PATHS[2]))).status_code

    async def generate(self) -> int:
        path = self._random.choice(PATHS)
        return (await self._http.post(path, json=self._body(path))).status_code

    async def stream(self) -> int:
        path = self._random.choice(PATHS)
        async with self._http.stream("POST", path, json=self._body(path) | {"stream": True}) as response:
            async for _ in response.aiter_raw():
                pass
            return response.status_code

    async def vanish(self) -> int:
        """Reads no more than the first piece, or not even that."""
        path = self._random.choice(PATHS)
        body = self._body(path, tokens=200) | {"stream": self._random.random() < 0.7}
        with contextlib.suppress(httpx.ReadTimeout):
            async with self._http.stream("POST", path, json=body, timeout=httpx.Timeout(60, read=0.05)) as response:
                async for _ in response.aiter_raw():
                    break
        return 499

    async def constrained(self) -> int:
        """A schema that was never seen before."""
        path, self._serial = self._random.choice(PATHS[:2]), self._serial + 1
        schema = {"type": "object", "properties": {f"p{self._serial}": {"type": "integer"}}, "required": []}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        return (await self._http.post(path, json=self._body(path) | {"response_format": form})).status_code

    async def wrong(self) -> int:
        """A body that must be refused."""
        path = self._random.choice(PATHS)
        bad: Any = self._random.choice([{"temperature": -1}, {"nonsense": 1}, {"seed": "x"}, {"logit_bias": {"x": 1}}])
        status = (await self._http.post(path, json=self._body(path) | bad)).status_code
        return 500 if status < 400 else status

    async def tokens(self) -> int:
        text = self._text()
        ids = (await self._http.post("/tokenize", json={"prompt": text})).json()["tokens"]
        await self._http.post("/render", json={"endpoint": PATHS[1], "body": self._body(PATHS[1])})
        await self._http.post("/v1/messages/count_tokens", json={"messages": [{"role": "user", "content": text}]})
        return (await self._http.post("/detokenize", json={"tokens": ids})).status_code

    async def look(self) -> int:
        if self._random.random() < 0.1:
            return (await self._http.post("/reset_prefix_cache")).status_code
        return (await self._http.get(self._random.choice(GETS))).status_code

    async def batch(self) -> int:
        """Uploads a file, has it worked on, and deletes what came of it."""
        line = {"custom_id": "a", "method": "POST", "url": PATHS[0], "body": self._body(PATHS[0])}
        form: dict[str, Any] = {
            "files": {"file": ("in.jsonl", json.dumps(line).encode())},
            "data": {"purpose": "batch"},
        }
        file = (await self._http.post("/v1/files", **form)).json()["id"]
        ask = {"input_file_id": file, "endpoint": PATHS[0], "completion_window": "24h"}
        made = await self._http.post("/v1/batches", json=ask)
        if made.status_code != 200:
            await self._http.delete(f"/v1/files/{file}")
            return made.status_code if made.status_code != 429 else 200
        batch = made.json()
        while batch["status"] not in ("completed", "failed", "cancelled", "expired"):
            await asyncio.sleep(0.1)
            batch = (await self._http.get(f"/v1/batches/{batch['id']}")).json()
        for id in filter(None, (file, batch.get("output_file_id"), batch.get("error_file_id"))):
            await self._http.delete(f"/v1/files/{id}")
        return 200 if batch["status"] == "completed" else 500

    def _text(self) -> str:
        return "".join(self._random.choices("abcdefgh, ", k=self._random.randint(4, 200)))

    def _body(self, path: str, tokens: int | None = None) -> dict[str, Any]:
        limit = tokens or self._random.randint(1, 40)
        sampling = {"temperature": self._random.choice([0, 1]), "seed": self._random.randint(0, 9)}
        turn = [{"role": "user", "content": self._text()}]
        return {
            PATHS[0]: {"prompt": self._text(), "max_tokens": limit, "n": self._random.randint(1, 3)},
            PATHS[1]: {"messages": turn, "max_tokens": limit, "logprobs": True, "top_logprobs": 3},
            PATHS[2]: {"input": self._text(), "max_output_tokens": limit},
            PATHS[3]: {"messages": turn, "max_tokens": limit},
        }[path] | sampling


class Memory:
    """Resident memory of a server's processes over time, in MB."""

    def __init__(self, parent: psutil.Process) -> None:
        self._parent = parent
        self._began = time.monotonic()
        self._lines: dict[str, list[tuple[float, float]]] = {}

    def sample(self) -> str:
        """Notes the memory of each process; returns a line that tells it."""
        minutes = (time.monotonic() - self._began) / 60
        now = {}
        for process in (self._parent, *self._parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                name = _role(process)
                now[name] = process.memory_info().rss / MB
                self._lines.setdefault(name, []).append((minutes, now[name]))
        return f"{minutes:5.1f} min  " + "  ".join(f"{name} {size:.1f} MB" for name, size in now.items())

    def slopes(self) -> dict[str, float]:
        """MB a minute of each process that was there all the time, the first part left out."""
        end = (time.monotonic() - self._began) / 60
        found = {}
        for name, line in self._lines.items():
            times, sizes = np.array([point for point in line if point[0] >= end / SETTLING]).reshape(-1, 2).T
            if len(times) > 2 and line[-1][0] > end - 0.2:
                found[name] = float(np.polyfit(times, sizes, 1)[0])
        return found


def _role(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    for word, name in (("octavo.core.process", "engine"), ("octavo.core.trial", "grammars"), (" serve ", "api")):
        if word in command:
            return name if name == "api" else f"{name} {process.pid}"
    return f"other {process.pid}"


async def _watch(memory: Memory, traffic: Traffic, end: float) -> None:
    told = time.monotonic()
    while time.monotonic() < end:
        await asyncio.sleep(SAMPLE_SECONDS)
        line = memory.sample()
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            print(f"{line}  {sum(traffic.outcomes.values())} requests", flush=True)


async def _soak(url: str, process: psutil.Process, minutes: float, clients: int, seed: int) -> tuple[Traffic, Memory]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        traffic = Traffic(http, seed)
        began = time.monotonic()
        await traffic.fill(clients)
        print(f"the stores are full after {time.monotonic() - began:.0f} s", flush=True)
        memory = Memory(process)
        end = time.monotonic() + 60 * minutes
        await asyncio.gather(_watch(memory, traffic, end), *(traffic.client(end) for _ in range(clients)))
        await _idle(http)
    return traffic, memory


async def _idle(http: httpx.AsyncClient) -> None:
    """Waits until the engine has nothing left; raises `TimeoutError` if pages are still held."""
    async with asyncio.timeout(10):
        load: dict[str, Any] = {"running": 1}
        while load["running"] or load["waiting"] or load["kv_cache_usage"] or load["server_load"]:
            await asyncio.sleep(0.1)
            load = (await http.get("/load")).json()


def _url(log: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"at (http://\S+)/v1", log.read_text(errors="replace"))
        if found:
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')}")


def _verdict(traffic: Traffic, memory: Memory, bound: float, code: int) -> list[str]:
    """What is wrong."""
    bad = {what: count for what, count in traffic.outcomes.items() if what[1] >= 500 or what[1] == 0}
    wrong = [f"{what} was answered {status or 'not at all'}, {count} times" for (what, status), count in bad.items()]
    slopes = memory.slopes()
    for name, slope in slopes.items():
        print(f"{name}: {slope:+.3f} MB/min")
        if slope > bound:
            wrong.append(f"{name} grows by {slope:.3f} MB/min, above {bound}")
    wrong += [] if {"api", "engine"} <= {name.split()[0] for name in slopes} else ["a process was lost"]
    return wrong + ([f"the server ended with {code}"] if code else [])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--bound", type=float, default=1.0, help="MB a minute that a process may grow")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny.make(folder / "tiny", max_position_embeddings=1024)
        log = folder / "log"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))}
        command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", "0", *OPTIONS]
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, env=env)
        try:
            url = _url(log, process)
            traffic, memory = asyncio.run(
                _soak(url, psutil.Process(process.pid), args.minutes, args.clients, args.seed)
            )
            process.terminate()
            code = process.wait(20)
        finally:
            process.kill()
        for (what, status), count in sorted(traffic.outcomes.items()):
            print(f"{what} {status}: {count}")
        wrong = _verdict(traffic, memory, args.bound, code)
        if "Traceback" in log.read_text(errors="replace"):
            wrong.append(f"the server's log has a traceback:\n{log.read_text(errors='replace')[-4000:]}")
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
