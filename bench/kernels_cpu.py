"""Times the C++ kernels against torch and oneDNN, in turn, and prints the ratios.

    OMP_NUM_THREADS=2 python bench/kernels_cpu.py [linear] [experts] [attention] [small] [--threads 2] [--seconds 1]

A figure is the least time of all calls; programs take short turns, so that a busy neighbour meets them all.
Weights rotate over 160 MB, so that they come from memory as in a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from octavo import _cpu
from octavo.kernels import cpu, cpu_experts, reference
from octavo.kernels.metadata import AttentionMetadata

Program = Callable[[int], object]  # the argument counts calls: which copy of the weights to use


def least(programs: dict[str, Program], seconds: float, burst: float = 0.03) -> dict[str, float]:
    """Seconds a call, the least of all calls; programs take turns of ``burst`` seconds for about ``seconds``.

    Not call by call: the threads of torch's OpenMP spin for milliseconds after each of its calls, on the cores that
    the next program wants.
    """
    best, call = dict.fromkeys(programs, float("inf")), 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, program in programs.items():
            until = time.perf_counter() + burst
            while (start := time.perf_counter()) < until:
                program(call)
                best[name] = min(best[name], time.perf_counter() - start)
                call += 1
    return best


def show(title: str, times: dict[str, float], amount: float, unit: str) -> None:
    """One line: each program's time and rate, and how many times faster than it ours is."""
    ours = times["octavo"]
    parts = [f"{name} {t * 1e3:8.3f} ms {amount / t / 1e9:6.1f} {unit} x{t / ours:.2f}" for name, t in times.items()]
    print(f"{title:32}" + " | ".join(parts), flush=True)


def linear(seconds: float) -> None:
    """Products of a 135M and a 1B Llama's layers and heads."""
    shapes = [(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152), (2048, 8192), (8192, 2048)]
    for size, out in shapes:
        copies = max(1, 160_000_000 // (size * out * 2))
        weights = [torch.randn(out, size).to(torch.bfloat16) for _ in range(copies)]
        own = [cpu.pack_linear(weight) for weight in weights]
        onednn = [torch.ops.mkldnn._reorder_linear_weight(weight, 1) for weight in weights]
        for rows in (1, 2, 4, 8, 16, 32, 64, 256, 2048 if size * out < 4e6 else 512):
            x = torch.randn(rows, size).to(torch.bfloat16)
            programs: dict[str, Program] = {
                "octavo": lambda i, own=own, x=x: own[i % len(own)](x),
                "onednn": lambda i, w=onednn, x=x: torch.ops.mkldnn._linear_pointwise(
                    x, w[i % len(w)], None, "none", [], ""
                ),
                "torch": lambda i, w=weights, x=x: F.linear(x, w[i % len(w)]),
            }
            times = least(programs, seconds)
            memory_bound = rows <= 4
            amount = size * out * 2.0 if memory_bound else 2.0 * rows * size * out
            show(f"linear {size}x{out} M={rows}", times, amount, "GB/s" if memory_bound else "GFLOP/s")


def expert_programs(weight: torch.Tensor, x: torch.Tensor, ids: list[torch.Tensor]) -> dict[str, Program]:
    """Products of ``x[T, in]`` with the experts ``ids[T, K]``, in turn, of ``weight[E, out, in]``."""
    packed, count, each = cpu_experts.pack_experts(weight, None), len(weight), ids[0].shape[1]

    def grouped_mm(i: int) -> torch.Tensor:  # as Transformers does
        by_expert, order = ids[i % len(ids)].flatten().sort()
        ends = torch.histc(by_expert.float(), count, 0, count - 1).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x[order // each], weight.mT, offs=ends)

    return {
        "octavo": lambda i: packed(x, cpu_experts.group(ids[i % len(ids)], count), by_token=True),
        "grouped_mm": grouped_mm,
    }


def experts(seconds: float) -> None:
    """Products of the experts that a router chose: GB/s of the weights that have to be read, or GFLOP/s."""
    for count, each, size, out in ((32, 4, 1024, 1024), (8, 2, 2048, 8192)):
        weight = torch.randn(count, out, size).to(torch.bfloat16)
        for tokens in (1, 4, 16, 64, 256, 1024):
            x = torch.randn(tokens, size).to(torch.bfloat16)
            ids = [torch.rand(tokens, count).topk(each).indices for _ in range(16)]
            hit = sum(len(chosen.unique()) for chosen in ids) / len(ids)
            memory_bound = tokens * each <= 2 * count
            amount = hit * size * out * 2.0 if memory_bound else 2.0 * tokens * each * size * out
            name = f"experts {each}/{count} {size}x{out} M={tokens}"
            times = least(expert_programs(weight, x, ids), seconds)
            show(name, times, amount, "GB/s" if memory_bound else "GFLOP/s")


def metadata(items: Sequence[tuple[int, int]], page_size: int) -> tuple[AttentionMetadata, int]:
    """Sequences of (cached, new) tokens over consecutive pages, and the number of pages."""
    lengths = [cached + new for cached, new in items]
    needed = [-(-length // page_size) for length in lengths]
    table = torch.zeros(len(items), max(needed), dtype=torch.int32)
    first = 0
    for row, count in enumerate(needed):
        table[row, :count] = torch.arange(first, first + count)
        first += count
    starts = torch.tensor([0, *(new for _, new in items)]).cumsum(0).to(torch.int32)
    meta = AttentionMetadata(
        query_start=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        rows=torch.arange(len(items), dtype=torch.int32),
        block_table=table,
        slots=torch.zeros(int(starts[-1]), dtype=torch.int32),
        num_decodes=sum(new == 1 for _, new in items),
        max_query=max(new for _, new in items),
        max_seq=max(lengths),
    )
    return meta, first


def attention(seconds: float) -> None:
    """Decode in GB/s of keys and values read once, prefill in GFLOP/s of the causal half."""
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 64), (32, 8, 128)):
        for items in ([(255, 1)], [(1023, 1)], [(4095, 1)], [(255, 1)] * 64, [(1023, 1)] * 8, [(0, 128)], [(0, 2048)]):
            meta, pages = metadata(items, 16)
            layers = max(1, 160_000_000 // (pages * 2 * kv_heads * 16 * dim * 2))
            cache = torch.randn(layers, pages, 2, kv_heads, 16, dim).to(torch.bfloat16)
            query = torch.randn(sum(new for _, new in items), heads, dim).to(torch.bfloat16)
            scale = dim**-0.5
            programs: dict[str, Program] = {
                "octavo": lambda i, q=query, c=cache, m=meta, s=scale: cpu.attention(q, c[i % len(c)], m, s),
                "reference": lambda i, q=query, c=cache, m=meta, s=scale: reference.attention(q, c[i % len(c)], m, s),
            }
            if len(items) == 1:
                new, length = items[0][1], sum(items[0])
                k, v = torch.randn(2, 1, heads, length, dim).to(torch.bfloat16)
                q = query.transpose(0, 1).unsqueeze(0).contiguous()
                programs["sdpa"] = lambda i, q=q, k=k, v=v, n=new: F.scaled_dot_product_attention(
                    q, k, v, is_causal=n > 1
                )
            prefill = items[0][1] > 1
            bytes_read = sum(a + b for a, b in items) * kv_heads * dim * 4.0
            flops = sum(4.0 * heads * dim * (n * c + n * (n + 1) / 2) for c, n in items)
            name = f"attention {heads}/{kv_heads}x{dim} {len(items)}x{items[0]}"
            show(name, least(programs, seconds), flops if prefill else bytes_read, "GFLOP/s" if prefill else "GB/s")


def small(seconds: float) -> None:
    """Small operators of a 135M Llama; GB/s of what is read and written."""
    for rows in (1, 64, 2048):
        x, residual, weight = torch.randn(rows, 576), torch.randn(rows, 576), torch.randn(576)
        x, residual, weight = x.bfloat16(), residual.bfloat16(), weight.bfloat16()
        wide, heads = torch.randn(rows, 3072).bfloat16(), torch.randn(rows, 9, 64).bfloat16()
        cos_sin, positions = torch.randn(4096, 64), torch.arange(rows, dtype=torch.int32)
        key = torch.randn(rows, 3, 64).bfloat16()
        cache = torch.zeros(rows // 16 + 1, 2, 3, 16, 64, dtype=torch.bfloat16)
        calls: dict[str, tuple[tuple[object, ...], float]] = {
            "rms_norm": ((x, weight, 1e-5), 2.0 * 576),
            "add_rms_norm": ((x, residual, weight, 1e-5), 4.0 * 576),
            "silu_and_mul": ((wide,), 1.5 * 3072),
            "gelu_tanh_and_mul": ((wide,), 1.5 * 3072),
            "rotary": ((heads, cos_sin, positions), 2.0 * 576),
            "store_kv_": ((cache, key, key, positions), 4.0 * 192),
        }
        for name, (arguments, elements) in calls.items():
            programs: dict[str, Program] = {
                "octavo": lambda i, f=getattr(cpu, name), a=arguments: f(*a),
                "reference": lambda i, f=getattr(reference, name), a=arguments: f(*a),
            }
            show(f"{name} rows={rows}", least(programs, seconds), rows * elements * 2, "GB/s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["linear", "experts", "attention", "small"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _cpu.set_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {cpu.describe()}")
    for part in arguments.parts:
        {"linear": linear, "experts": experts, "attention": attention, "small": small}[part](arguments.seconds)


if __name__ == "__main__":
    main()
