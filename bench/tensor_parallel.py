"""One model on several GPUs of a machine: the workloads of `gpu.py` by the number of ranks, and what the sums cost.

    python bench/tensor_parallel.py --models llama-3.1-8b --ranks 1,2 --json out.json

One process a model and number of ranks; dummy weights, which do not depend on the number, greedy, every output token
counted, best of ``--repeats`` (`mixed` once). The floor is that of `gpu_work` over as many cards. ``same`` is the share
of output tokens before the first that differs from that of the first number of ranks, over all requests: in bfloat16,
with weights that mean nothing, near ties part ways. `--models tiny` (float32) is to be 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_work
from gpu_work import Card, Work, run

_8B = gpu_work.CONFIGS["llama-3.1-8b"]
CONFIGS: dict[str, dict[str, Any]] = {
    **gpu_work.CONFIGS,
    "llama-3.1-70b": {
        **_8B,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "tiny": {
        **_8B,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 4096,
        "dtype": "float32",
    },
}
SUMMED = [1, 8, 64, 256, 2048, 8192]  # of 4096 values in bfloat16, in the sums measured alone


def engine(model: str, ranks: int, device: str) -> Any:
    """An engine core with dummy weights."""
    from octavo.core.engine import EngineCore
    from octavo.runtime.worker import worker_for

    config = gpu_work.engine_config(
        CONFIGS[model],
        max_model_len=8192,
        gpu_memory_utilization=0.85,
        tensor_parallel_size=ranks,
        dtype=CONFIGS[model]["dtype"],
        device=device,
        distributed_timeout_seconds=60,
    )
    return EngineCore(config, worker_for(config))


def traced(core: Any, work: Work) -> dict[str, float]:
    """Microseconds of a decode step of rank 0, by kernel, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    short, long = ([(prompt, count) for prompt, _ in work] for count in (32, 96))
    totals: list[Counter[str]] = []
    for name, part in (("short", short), ("long", long)):
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            run(core, part, name)
            torch.cuda.synchronize()
        total: Counter[str] = Counter()
        for row in trace.key_averages():
            total[row.key[:60]] += row.self_device_time_total
        totals.append(total)
    totals[1].subtract(totals[0])
    return {name: round(us / 64, 1) for name, us in totals[1].most_common() if us >= 64}


def measure(model: str, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """All workloads of one engine."""
    from octavo import log

    log.configure()
    begin = time.perf_counter()
    core = engine(model, ranks, args.device)
    result: dict[str, Any] = {"model": model, "ranks": ranks, "ready_s": time.perf_counter() - begin, "workloads": {}}
    print(model, ranks, "ready", {name: round(seconds, 2) for name, seconds in core.info.phases.items()}, flush=True)
    run(core, [([5 + i] * (16 + i), 16) for i in range(32)], "warm")
    card = Card(args.bandwidth * ranks, args.flops * ranks)
    for name in args.workloads.split(","):
        work = gpu_work.workload(name, CONFIGS[model]["vocab_size"])
        if model == "tiny":
            work = [(prompt[:200], min(count, 64)) for prompt, count in work[:16]]
        runs = [run(core, work, f"{name}{i}") for i in range(1 if name == "mixed" else args.repeats)]
        seconds, tokens = min(runs, key=lambda one: one[0])
        count = sum(len(answer) for answer in tokens)
        least = gpu_work.floor(CONFIGS[model], work, card, gpu_work.ROWS)
        row = {"seconds": seconds, "all": [r[0] for r in runs], "tokens_per_s": count / seconds, "floor_s": least}
        result["workloads"][name] = {**row, "share": least / seconds, "tokens": tokens}
        print(model, ranks, name, row, flush=True)
    if args.trace:
        result["step_us"] = traced(core, gpu_work.workload("decode64", CONFIGS[model]["vocab_size"]))
        print(model, ranks, "a decode step of 64 rows, us:", result["step_us"], flush=True)
    begin = time.perf_counter()
    core.close()
    result["close_s"] = time.perf_counter() - begin
    print(model, ranks, "closed in", round(result["close_s"], 2), "s", flush=True)
    return result


def sums(rank: int, ranks: int, folder: str) -> None:
    """Microseconds of a sum of each size, alone and with addition and norm, and of a gather; 50 of them in a graph."""
    import torch

    from octavo.kernels import select
    from octavo.parallel.group import connect

    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    group: Any = connect(rank, ranks, device, Path(folder), 60)
    peers = group._peers
    if rank == 0:
        print("joined by", group.name, flush=True)
    ops = select.ops(device, torch.bfloat16)
    for rows in SUMMED:
        x, residual = torch.randn(
            2, rows, 4096, device=device, generator=torch.Generator(device).manual_seed(rank)
        ).bfloat16()
        weight = torch.ones(4096, dtype=torch.bfloat16, device=device)
        args = (residual, weight, 1e-5)
        cases: dict[str, Any] = {"nccl": lambda x=x: group._wait(lambda: group._backend.allreduce([x], group._sum))}
        cases["nccl, norm"] = lambda x=x, args=args, nccl=cases["nccl"]: (nccl(), ops.add_rms_norm(x, *args))
        if peers is not None and peers.takes(x):
            wanted = x.clone()
            group._wait(lambda wanted=wanted: group._backend.allreduce([wanted], group._sum))
            torch.testing.assert_close(peers.sum(x), wanted)
            torch.testing.assert_close(peers.gather(x), group.all_gather(x[None])[0])
            torch.testing.assert_close(peers.add_rms_norm(x, *args), ops.add_rms_norm(wanted, *args))
            cases["peers"] = lambda x=x: peers.sum(x)
            cases["peers, norm"] = lambda x=x, args=args: peers.add_rms_norm(x, *args)
            cases["peers, gather"] = lambda x=x: peers.gather(x)
        cases["nccl, gather"] = lambda x=x: group.all_gather(x[None])  # which peer memory does not take
        found = {name: _graph_time(work) for name, work in cases.items()}
        if rank == 0:
            print(
                f"{rows:5} rows, {x.nbytes >> 10:6} KiB", {name: round(us, 1) for name, us in found.items()}, flush=True
            )


def _graph_time(work: Any) -> float:
    import torch

    for _ in range(3):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(50):
            work()
    times: list[float] = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / 50)
    return min(times)


def same(first: list[list[int]], second: list[list[int]]) -> float:
    """The share of tokens before the first that differs, over all answers."""
    equal = sum(
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        for a, b in zip(first, second, strict=True)
    )
    return equal / sum(map(len, first))


def table(results: list[dict[str, Any]]) -> list[str]:
    """One line a model, workload and number of ranks."""
    lines = [f"{'model':14} {'workload':9} {'ranks':>5} {'seconds':>8} {'tokens/s':>9} {'floor':>7} share  x one  same"]
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        for name, row in result["workloads"].items():
            base = first.setdefault((result["model"], name), row)
            lines.append(
                f"{result['model']:14} {name:9} {result['ranks']:5} {row['seconds']:8.3f} {row['tokens_per_s']:9.0f} "
                f"{row['floor_s']:7.3f} {row['share']:5.0%}  {base['seconds'] / row['seconds']:5.2f}  "
                f"{same(base['tokens'], row['tokens']):.3f}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,llama-3.1-8b")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--workloads", default="single,decode64,prefill,mixed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--trace", action="store_true", help="what a decode step of 64 rows consists of")
    parser.add_argument("--sums", action="store_true", help="the sums and gathers alone, before all else")
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes a second that a card copies")
    parser.add_argument("--flops", type=float, default=7.7e14, help="operations a second of a card's products")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs = [(model, int(ranks)) for model in args.models.split(",") if model for ranks in args.ranks.split(",")]
    if args.sums:
        from torch.multiprocessing.spawn import spawn

        most = max(int(ranks) for ranks in args.ranks.split(","))
        spawn(sums, (most, tempfile.mkdtemp()), nprocs=most)
        options = [option for option in sys.argv[1:] if option != "--sums"]
    else:
        options = sys.argv[1:]
    results = [measure(*pairs[0], args)] if len(pairs) == 1 else [r for pair in pairs for r in _apart(*pair, options)]
    if args.json:
        args.json.write_text(json.dumps(results))
    print(*table(results), sep="\n")


def _apart(model: str, ranks: int, options: list[str]) -> list[dict[str, Any]]:
    """The result of a process of its own, with the options of this one; nothing if it failed."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        last = ["--models", model, "--ranks", str(ranks), "--json", file.name]  # later options win
        subprocess.run([sys.executable, __file__, *options, *last], check=False, timeout=300)
        print("MiB in use of each card afterwards:", _in_use(), flush=True)
        text = Path(file.name).read_text()
        found: list[dict[str, Any]] = json.loads(text) if text else []
        return found


def _in_use() -> list[int]:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError):
        return [int(line) for line in subprocess.run(query, capture_output=True, text=True).stdout.split()]
    return []


if __name__ == "__main__":
    main()
