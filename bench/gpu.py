"""Offline figures on one GPU: well-known shapes with dummy weights, greedy, every output token counted.

    python bench/gpu.py --impls native,transformers --extra --sampling --trace --json out.json

One process a model and implementation; a warm-up first; the prefix cache is forgotten before each timed run; best of
``--repeats`` (`mixed` once). Tokens of three requests of each workload are judged against Transformers' own model (tie
rule: `gpu_reference`). The floor is bytes that must be read over the card's measured copy rate plus operations of
prompts over its matrix rate. The table ends with the ratio to the yardstick, which is of another card where the name
of this one differs: then compare shares of the floor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_work
from gpu_work import CONFIGS, ROWS, VLLM, YARDSTICK, Card, Work

WORKLOADS = "single,decode64,prefill,mixed"
EXTRA = "shared,long,small"
DRAWN = {"temperature": 0.8}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": DRAWN,
    "top_k": {**DRAWN, "top_k": 50},
    "top_p": {**DRAWN, "top_p": 0.9},
    "penalties": {**DRAWN, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "mask": {**DRAWN, "mask": True},
}


def rates() -> Card:
    """Of this card, measured now."""
    import torch

    def best(work: Any, repeats: int = 10) -> float:
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return min(times)

    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Card(2 * source.numel() / best(lambda: target.copy_(source)), 2 * 8192**3 / best(lambda: a @ b))


class Engine:
    """One model, and runs over it."""

    def __init__(self, model: str, impl: str, cache: str) -> None:
        import numpy as np

        from octavo.core.engine import EngineCore
        from octavo.runtime.base import TokenMask
        from octavo.runtime.worker import Worker

        vocab = CONFIGS[model]["vocab_size"]

        class MaskingWorker(Worker):
            """With ``masking``, each row of each step may sample one half of the tokens, picked at random."""

            masking = False
            bits = np.random.default_rng(0).integers(-(2**31), 2**31, (4, ROWS, -(-vocab // 32)), dtype=np.int32)
            turn = 0

            def step(self, plan: Any) -> None:
                super().step(plan)
                self.items = [item for item, samples in enumerate(plan.samples) if samples]

            def sample(self, mask: TokenMask | None = None) -> Any:
                if self.masking:
                    self.turn += 1
                    mask = TokenMask.of(self.items, self.bits[self.turn % 4, : len(self.items)])
                return super().sample(mask)

        config = gpu_work.engine_config(
            CONFIGS[model], model_impl=impl, max_model_len=20000, gpu_memory_utilization=0.5, kv_cache_dtype=cache
        )
        self.worker = MaskingWorker()
        self.core = EngineCore(config, self.worker)
        self._runs = 0

    def run(self, work: Work, mask: bool = False, **wishes: Any) -> tuple[float, list[list[int]]]:
        """See `gpu_work.run`."""
        self._runs += 1
        self.worker.masking = mask
        return gpu_work.run(self.core, work, str(self._runs), **wishes)


class Compiled:
    """Counts the kernels that Triton compiled, or took from its cache on disk, since it was made."""

    def __init__(self) -> None:
        import triton

        self.names: list[str] = []
        triton.knobs.runtime.jit_post_compile_hook = self._note

    def _note(self, **details: Any) -> None:
        self.names.append(str(details["repr"])[:200])


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Of the time between the first and the last of ``spans``, sorted, how much is in none."""
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def traced(engine: Engine, work: Work) -> list[str]:
    """What the card did in a run over ``work`` cut to 64 tokens each, in microseconds a step, the costliest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    shorter = [(prompt, min(count, 64)) for prompt, count in work]
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        seconds, _ = engine.run(shorter)
        torch.cuda.synchronize()
    steps = max(count for _, count in shorter)
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name) for e in trace.events() if e.device_type.name == "CUDA"
    )
    prompts = max((end for _, end, name in events if "_prefill_kernel" in name), default=0.0)
    decode = [(start, end) for start, end, _ in events if start > prompts]
    idle = f"idle {idle_share([e[:2] for e in events]):.1%}, after the prompts {idle_share(decode):.1%}"
    lines = [f"  {seconds:.3f} s with the tracer, {idle}; of each step:"]
    rows = sorted(trace.key_averages(), key=lambda row: -row.self_device_time_total)
    return lines + [
        f"  {r.self_device_time_total / steps:9.1f} us {r.count / steps:6.1f} x {r.key[:90]}" for r in rows[:18]
    ]


def measure(args: argparse.Namespace, model: str, impl: str) -> dict[str, Any]:
    """All that is asked for, on one engine."""
    begin = time.perf_counter()
    from octavo import log

    log.configure()
    engine = Engine(model, impl, args.kv_cache_dtype)
    ready = time.perf_counter() - begin
    phases = {name: round(seconds, 2) for name, seconds in engine.core.info.phases.items()}
    result: dict[str, Any] = {"model": model, "impl": impl, "ready_s": ready, "phases": phases, "workloads": {}}
    print(model, impl, f"ready after {ready:.2f} s", phases, flush=True)
    card, compiled = rates(), Compiled()
    result |= {"copy_GBps": card.bandwidth / 1e9, "matrix_TFLOPs": card.flops / 1e12}
    engine.run([([5 + i] * (16 + i), 16) for i in range(32)])
    names = args.workloads.split(",") + (EXTRA.split(",") if args.extra else [])
    answers = {}
    for name in names:
        work = gpu_work.workload(name, CONFIGS[model]["vocab_size"])
        runs = [engine.run(work) for _ in range(1 if name == "mixed" else args.repeats)]
        seconds, answers[name] = min(runs, key=lambda run: run[0])
        least = gpu_work.floor(CONFIGS[model], work, card, ROWS)
        result["workloads"][name] = {
            "seconds": seconds,
            "all": [run[0] for run in runs],
            "floor_s": least,
            "share": least / seconds,
            "compiled": len(compiled.names),
        }
        print(model, impl, name, result["workloads"][name], flush=True)
    if args.sampling:
        result["sampling"] = sampling_costs(engine, model, args.repeats)
    if args.trace:
        result["trace"] = traced(engine, gpu_work.workload("decode64", CONFIGS[model]["vocab_size"]))
        print(model, impl, "trace of decode64", *result["trace"], sep="\n", flush=True)
    for line in sorted(set(compiled.names)):
        print("compiled after the start:", line)
    judge(result, engine, answers)
    return result


def sampling_costs(engine: Engine, model: str, repeats: int) -> dict[str, float]:
    """`decode64` with wishes over the same greedy, as ratios; each round takes all in turn."""
    work = gpu_work.workload("decode64", CONFIGS[model]["vocab_size"])
    cases = {
        **SAMPLINGS,
        "all": {name: value for wishes in list(SAMPLINGS.values())[1:] for name, value in wishes.items()},
    }
    cases["all"] |= DRAWN
    times = {name: min(engine.run(work, **wishes)[0] for _ in range(repeats)) for name, wishes in cases.items()}
    ratios = {name: seconds / times["greedy"] for name, seconds in times.items()}
    print(model, "sampling over greedy", {name: f"{ratio:.3f}" for name, ratio in ratios.items()}, flush=True)
    return ratios


def judge(result: dict[str, Any], engine: Engine, answers: dict[str, list[list[int]]]) -> None:
    """Puts into each workload what the reference says of its first, middle and last request."""
    from gpu_reference import Reference, joined

    config = CONFIGS[result["model"]]
    reference = Reference(config, engine.worker.model, result["impl"])
    for name, found in answers.items():
        work = gpu_work.workload(name, config["vocab_size"])
        picked = sorted({0, len(work) // 2, len(work) - 1})
        verdict = joined([reference.judge(work[i][0], found[i]) for i in picked])
        result["workloads"][name] |= {"verdict": str(verdict), "passed": verdict.passed}
        print(result["model"], result["impl"], name, "against Transformers:", verdict, flush=True)


def table(results: list[dict[str, Any]]) -> list[str]:
    """One line a model and workload, the implementations side by side."""
    native = {r["model"]: r["workloads"] for r in results if r["impl"] == "native"}
    adopted = {r["model"]: r["workloads"] for r in results if r["impl"] == "transformers"}
    lines = [
        f"{'model':13} {'workload':9} {'seconds':>8} {'floor':>7} {'share':>6}   {YARDSTICK}: seconds, share, ratio"
    ]
    for model, workloads in (native or adopted).items():
        for name, row in workloads.items():
            line = f"{model:13} {name:9} {row['seconds']:8.3f} {row['floor_s']:7.3f} {row['share']:6.0%}   "
            if (model, name) in VLLM:
                seconds, share = VLLM[model, name]
                line += f"{seconds:7.3f} {share:5.0%} {seconds / row['seconds']:5.2f}x  "
            if native and name in adopted.get(model, {}):
                other = adopted[model][name]["seconds"]
                line += f"transformers {other:7.3f} s = {row['seconds'] / other:.1%} of native  "
            lines.append(line + row.get("verdict", ""))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CONFIGS))
    parser.add_argument("--impls", default="native", help="native, transformers or both")
    parser.add_argument("--workloads", default=WORKLOADS)
    parser.add_argument("--extra", action="store_true", help=f"these workloads too: {EXTRA}")
    parser.add_argument("--sampling", action="store_true", help="what wishes cost in decode64, against greedy")
    parser.add_argument("--trace", action="store_true", help="the costliest kernels of decode64, and how much is idle")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs = [(model, impl) for model in args.models.split(",") for impl in args.impls.split(",")]
    results = [measure(args, *pairs[0])] if len(pairs) == 1 else [result for pair in pairs for result in _apart(*pair)]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print(*table(results), sep="\n")
    return 0 if all(row.get("passed", True) for result in results for row in result["workloads"].values()) else 1


def _apart(model: str, impl: str) -> list[dict[str, Any]]:
    """The result of a process of its own, with the options of this one."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        last = ["--models", model, "--impls", impl, "--json", file.name]  # later options win
        subprocess.run([sys.executable, __file__, *sys.argv[1:], *last], check=False)
        text = Path(file.name).read_text()
        return json.loads(text) if text else []


if __name__ == "__main__":
    sys.exit(main())
