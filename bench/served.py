"""Servers in turn under the same load on one machine: output rate, time to the first token, start, memory.

    python bench/served.py [--server NAME=COMMAND ...] [--rounds 3] [--concurrency 8]

octavo is always measured, on SmolLM2-135M-Instruct in bfloat16. A COMMAND starts another server, which answers
``/v1/completions`` at the port that ``{port}`` stands for, of the folder ``{model}`` or the file ``{gguf}``, as in

    --server "vllm=vllm serve {model} --served-model-name m --dtype bfloat16 --max-model-len 4096 --port {port}"
    --server "llama.cpp=llama-server -m {gguf} --alias m -t 2 -np 8 -c 16384 --port {port}"

``octavo bench serve`` is the client: random prompts of 128 tokens, 64 new ones each, 32 requests, greedy, past any eos.
The first round warms up. Servers run one after the other, ``--repeats`` times, so that a busy neighbour meets them all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import models_cpu
import psutil

SRC = str(Path(__file__).resolve().parent.parent / "src")
OCTAVO = f"{sys.executable} -m octavo serve {{model}} --served-model-name m --dtype bfloat16 --max-model-len 4096"
PATIENCE = 300.0  # seconds for a start

Row = dict[str, Any]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait_for_answer(url: str, process: subprocess.Popen[bytes]) -> float:
    """Seconds until a completion is answered."""
    began, body = time.perf_counter(), json.dumps({"model": "m", "prompt": [1, 2, 3], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    while time.perf_counter() - began < PATIENCE and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE):
                return time.perf_counter() - began
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)
    raise RuntimeError("it does not answer")


def memory_mib(pid: int) -> int:
    """Resident memory of a process and all below it; pages that several share count for each."""
    leader = psutil.Process(pid)
    return int(sum(process.memory_info().rss for process in (leader, *leader.children(recursive=True)))) >> 20


def load(url: str, args: argparse.Namespace, seed: int, out: Path) -> Row:
    """One round of the client, with prompts that no round had before: its rate, and times to the first token in ms."""
    command = [sys.executable, "-m", "octavo", "bench", "serve", "--base-url", url, "--model", "m"]
    command += ["--concurrency", str(args.concurrency), "--num-prompts", str(args.requests)]
    command += ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    command += ["--seed", str(seed), "--json", str(out)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": SRC}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-400:] + done.stderr[-400:])
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    (totals,) = (row for row in rows if "output_tok_s" in row)
    first = next(row for row in rows if row.get("what") == "TTFT")
    return {"output_tok_s": totals["output_tok_s"], "ttft_ms": first["ms"]["p50"], "mean_ttft_ms": first["ms"]["mean"]}


def measure(command: str, args: argparse.Namespace) -> Row:
    """Starts a server, loads it and stops it."""
    port = free_port()
    names = {program: models_cpu.path("A", program, args.models) for program in ("octavo", "llama.cpp")}
    line = shlex.split(command.format(model=names["octavo"], gguf=names["llama.cpp"], port=port))
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": SRC if line[0] == sys.executable else ""}
            process = subprocess.Popen(line, env=env, stdout=file, stderr=file, start_new_session=True)
            try:
                start = wait_for_answer(url, process)
                rounds = [load(url, args, seed, Path(folder) / "rows.json") for seed in range(args.rounds + 1)][1:]
                memory = memory_mib(process.pid)
            except RuntimeError as error:
                raise RuntimeError(f"{error}\n{log.read_text(errors='replace')[-600:]}") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)
    return {"start_s": start, "rss_mib": memory, "rounds": rounds}


def median(rows: list[Row], name: str) -> float:
    return float(statistics.median(found[name] for row in rows for found in row["rounds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--models", type=Path, default=Path("build/bench-models"), help="where models are written")
    parser.add_argument("--repeats", type=int, default=1, help="starts of each server")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each start")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    args = parser.parse_args()
    servers = {"octavo": OCTAVO + " --port {port}"} | dict(item.split("=", 1) for item in args.server)
    found: dict[str, list[Row]] = {name: [] for name in servers}
    for _ in range(args.repeats):
        for name, command in servers.items():
            try:
                found[name].append(measure(command, args))
            except RuntimeError as error:
                print(f"{name}: {error}", file=sys.stderr)
    print(f"{'server':12} {'tok/s':>7} {'x':>5} {'TTFT ms':>8} {'mean':>6} {'start s':>8} {'MiB':>6}")
    for name, rows in found.items():
        if rows:
            rate, ours = median(rows, "output_tok_s"), median(found["octavo"], "output_tok_s")
            start, memory = min(row["start_s"] for row in rows), max(row["rss_mib"] for row in rows)
            times = f"{median(rows, 'ttft_ms'):8.0f} {median(rows, 'mean_ttft_ms'):6.0f}"
            print(f"{name:12} {rate:7.1f} {ours / rate:5.2f} {times} {start:8.2f} {memory:6}")


if __name__ == "__main__":
    main()
