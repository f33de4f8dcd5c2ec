"""Offline figures on one GPU: well-known shapes with dummy weights, four workloads, greedy, every output token counted.

    python bench/gpu.py --models llama-3.2-1b,qwen3-0.6b --workloads mixed,single,decode64,prefill --json out.json

One process a model; a warm-up first; the prefix cache is forgotten before each timed run; best of ``--repeats``. The
floor is bytes that must be read over the card's measured copy rate plus prompt operations over its matrix rate.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "rope_scaling": {**LLAMA3, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
}
Work = list[tuple[list[int], int]]


def workload(name: str, vocab: int) -> Work:
    """(prompt, output tokens) of each request; seeds are fixed."""
    seeds = {"mixed": 0, "single": 1, "decode64": 2, "prefill": 3}
    rng = random.Random(seeds[name])

    def ids(count: int) -> list[int]:
        return [rng.randrange(100, vocab - 100) for _ in range(count)]

    if name == "mixed":
        return [(ids(rng.randint(100, 1024)), rng.randint(100, 1024)) for _ in range(256)]
    if name == "single":
        return [(ids(128), 256)]
    if name == "decode64":
        return [(ids(128), 512) for _ in range(64)]
    return [(ids(4096), 1) for _ in range(32)]


def rates() -> tuple[float, float]:
    """(bytes a second of a copy, read and write; operations a second of a bf16 product) of this card."""
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
    return 2 * source.numel() / best(lambda: target.copy_(source)), 2 * 8192**3 / best(lambda: a @ b)


def floor(config: dict[str, Any], work: Work, bandwidth: float, flops: float) -> float:
    """Seconds that the card needs at the least: weights and K/V read once a decode step, prompts at the matrix rate."""
    hidden, layers, kv = config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]
    dim, heads = config["head_dim"], config["num_attention_heads"]
    layer = hidden * dim * (heads + 2 * kv) + heads * dim * hidden + 3 * hidden * config["intermediate_size"]
    body, head = layers * layer, config["vocab_size"] * hidden
    per_token = 2 * layers * 2 * kv * dim  # bytes of K and V
    steps = max(count for _, count in work) - 1
    read = steps * 2 * (body + head)
    read += sum(per_token * (len(p) + i) for p, count in work for i in range(1, count))
    prompt = sum(2 * body * len(p) + 2 * layers * heads * dim * len(p) ** 2 for p, _ in work)
    return read / bandwidth + prompt / flops


def run(core: Any, work: Work, tag: str) -> tuple[float, list[list[int]]]:
    """(seconds, tokens of each request)."""
    from octavo.types import Request, Sampling

    requests = [
        Request(
            id=f"{tag}{i}",
            token_ids=array("i", prompt).tobytes(),
            page_hashes=b"",
            sampling=Sampling(max_tokens=count, temperature=0.0),
        )
        for i, (prompt, count) in enumerate(work)
    ]
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    start = time.perf_counter()
    for request in requests:
        core.add(request)
    while core.has_work():
        for output in core.step():
            answers[output.id] += output.token_ids
    seconds = time.perf_counter() - start
    for request, (_, count) in zip(requests, work, strict=True):
        assert len(answers[request.id]) == count, f"{request.id}: {len(answers[request.id])} tokens, not {count}"
    return seconds, [answers[request.id] for request in requests]


class Compiled:
    """Counts the kernels that Triton compiled, or took from its cache on disk, since it was made."""

    def __init__(self) -> None:
        import triton

        self.names: list[str] = []
        triton.knobs.runtime.jit_post_compile_hook = self._note

    def _note(self, **details: Any) -> None:
        self.names.append(str(details["repr"])[:200])


def idle_share(trace: Any) -> float:
    """Of the time between the first and the last kernel, how much the card did nothing."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type.name == "CUDA")
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def kernels(core: Any, work: Work, tag: str) -> list[str]:
    """What the card did in a run over ``work`` of at most 64 tokens each, the costliest kernels first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    shorter = [(prompt, min(count, 64)) for prompt, count in work]
    core.reset_prefix_cache()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        seconds, _ = run(core, shorter, tag)
        torch.cuda.synchronize()
    rows = sorted(trace.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1e6
    lines = [f"  {seconds:.3f} s, kernels {busy:.3f} s, idle {idle_share(trace):.1%}"]
    return lines + [f"  {r.self_device_time_total / 1e3:9.2f} ms {r.count:6} x {r.key[:90]}" for r in rows[:14]]


def measure(model: str, names: list[str], repeats: int, profile: bool) -> dict[str, Any]:
    """All workloads on one engine."""
    begin = time.perf_counter()
    from octavo import log
    from octavo.config import EngineConfig
    from octavo.core.engine import EngineCore
    from octavo.runtime.worker import Worker

    log.configure()
    folder = Path(tempfile.mkdtemp()) / model
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[model]))
    config = EngineConfig.of(
        model=str(folder),
        load_format="dummy",
        max_model_len=20000,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.5,
    )
    imported = time.perf_counter() - begin
    core = EngineCore(config, Worker())
    ready = time.perf_counter() - begin
    result: dict[str, Any] = {"model": model, "ready_s": ready, "phases": {"imports": imported, **core.phases}}
    print(model, "ready", {name: round(seconds, 2) for name, seconds in result["phases"].items()}, flush=True)
    compiled = Compiled()
    bandwidth, flops = rates()
    result |= {"copy_GBps": bandwidth / 1e9, "matrix_TFLOPs": flops / 1e12, "workloads": {}}
    vocab = CONFIGS[model]["vocab_size"]
    run(core, [([5 + i] * (16 + i), 16) for i in range(32)], "warm")
    for name in names:
        work = workload(name, vocab)
        times = []
        for repeat in range(1 if name == "mixed" else repeats):
            core.reset_prefix_cache()
            seconds, answers = run(core, work, f"{name}{repeat}-")
            times.append(seconds)
        least = floor(CONFIGS[model], work, bandwidth, flops)
        if profile:
            result.setdefault("profile", {})[name] = kernels(core, work, f"{name}p-")
            print(model, name, *result["profile"][name], sep="\n", flush=True)
        result["workloads"][name] = {
            "seconds": min(times),
            "all": times,
            "floor_s": least,
            "share": least / min(times),
            "compiled": len(compiled.names),
            "distinct": len({token for answer in answers for token in answer}),
        }
        print(model, name, result["workloads"][name], flush=True)
    for line in sorted(set(compiled.names)):
        print("compiled after the start:", line)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CONFIGS))
    parser.add_argument("--workloads", default="single,decode64,prefill,mixed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="list the costliest kernels of each workload")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = args.models.split(",")
    if len(models) == 1:
        results = [measure(models[0], args.workloads.split(","), args.repeats, args.profile)]
    else:
        results = []
        for model in models:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                options = ["--models", model, "--workloads", args.workloads, "--repeats", str(args.repeats)]
                subprocess.run([sys.executable, __file__, *options, "--json", file.name], check=True)
                results += json.loads(Path(file.name).read_text())
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    for result in results:
        for name, row in result["workloads"].items():
            times = f"{row['seconds']:8.3f} s   floor {row['floor_s']:7.3f} s   {row['share']:.0%}"
            print(f"{result['model']:14} {name:9} {times}")


if __name__ == "__main__":
    main()
