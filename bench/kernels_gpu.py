"""Kernels on one GPU, alone: time, share of the card's bandwidth or TFLOP/s, by launch.

    python bench/kernels_gpu.py [--sweep] [--only decode,prefill,linear]

Attention is timed with the launches that the engine uses; with --sweep others are timed beside them, best first.
Times are of replayed graphs, so that the host has no part in them. Products of few rows are timed beside cuBLAS.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
import torch.nn.functional as F

from octavo.kernels import attn_triton, linear_triton
from octavo.kernels.attn_triton import Launch
from octavo.kernels.metadata import AttentionMetadata

SHAPES = ((32, 8, 64), (32, 8, 128))
DECODES = ((1, 1024), (16, 1024), (64, 384), (256, 832))
PREFILLS = ((2, 4096), (16, 512))
LINEARS = {
    "1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)),
    "0.6b": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)),
    "8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "8b/2": ((3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168), (64128, 4096)),  # of each of two ranks
}
LINEAR_ROWS = (4, 16, 32, 64)
LINEAR_LAUNCHES = [
    linear_triton.Launch(outputs, tile, 1, warps, stages, prefetch)
    for (outputs, warps), tile, stages, prefetch in itertools.product(
        ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8)), (64, 128), (3, 5, 7), (0, linear_triton.ALL)
    )
]
SPLITS = (1, 2, 3, 4, 6, 8, 16)
PAGE = 16
DECODE_LAUNCHES = [Launch(t, w, s) for t, w, s in itertools.product((32, 64, 128), (2, 4), (2, 3, 4)) if t * s <= 256]
PREFILL_LAUNCHES = [
    Launch(tile, warps, stages, rows, registers)
    for tile, (warps, rows), stages, registers in itertools.product(
        (32, 64, 128), ((4, 64), (8, 128), (4, 128)), (2, 3), (None, 128, 168)
    )
    if tile * rows <= 8192
]
Work = Callable[[], object]


def batch(shape: tuple[int, int, int], items: int, length: int, count: int) -> Work:
    """Attention of ``items`` sequences of ``length`` tokens, the last ``count`` of them queries."""
    heads, kv_heads, dim = shape
    pages = -(-length // PAGE)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    cache = torch.randn(items * pages, 2, kv_heads, PAGE, dim, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(items * pages, device="cuda").int().view(items, pages)
    meta = AttentionMetadata(
        query_start=torch.arange(items + 1, **ints) * count,
        seq_lens=torch.full((items,), length, **ints),
        rows=torch.arange(items, **ints),
        block_table=table,
        slots=torch.zeros(items * count, **ints),
        num_decodes=items if count == 1 else 0,
        max_query=count,
        max_seq=length,
    )
    query = torch.randn(items * count, heads, dim, device="cuda", dtype=torch.bfloat16)
    return lambda: attn_triton.attention(query, cache, meta, 0.1)


def seconds(work: Work, repeats: int = 20, replays: int = 4) -> float:
    """Of one call in a graph of several."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            work()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / repeats)
    return min(times)


def attempt(launches: dict[int, Launch], pad: int, launch: Launch, measure: Callable[[], float]) -> float:
    old, launches[pad] = launches[pad], launch
    try:
        return measure()
    except Exception:  # out of shared memory: such a launch cannot be used
        return float("inf")
    finally:
        launches[pad] = old


def compile_linear(launch: linear_triton.Launch, row_counts: list[int]) -> None:
    """Puts the kernels of ``row_counts`` into the cache on disk."""
    weight = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16)
    for rows in row_counts:
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        for splits in (1, 2):
            with contextlib.suppress(Exception):  # out of shared memory
                linear_triton.split_linear(x, weight, None, replace(launch, splits=splits))


def compile_one(job: tuple[str, tuple[int, int, int], Launch]) -> None:
    """Puts one kernel into the cache on disk."""
    kind, shape, launch = job
    work = batch(shape, 300, 16, 1) if kind == "decode" else batch(shape, 1, 256, 256)
    attempt(attn_triton.DECODE if kind == "decode" else attn_triton.PREFILL, shape[2], launch, lambda: bool(work()))


def compile_all(kinds: list[str], row_counts: list[int]) -> None:
    jobs = [("decode", shape, launch) for shape in SHAPES for launch in DECODE_LAUNCHES if "decode" in kinds]
    jobs += [("prefill", shape, launch) for shape in SHAPES for launch in PREFILL_LAUNCHES if "prefill" in kinds]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs))
        if "linear" in kinds:
            list(pool.map(partial(compile_linear, row_counts=row_counts), LINEAR_LAUNCHES))


def attention(kind: str, sweep: bool) -> None:
    launches = attn_triton.DECODE if kind == "decode" else attn_triton.PREFILL
    for shape in SHAPES:
        heads, kv_heads, dim = shape
        used = launches[dim]
        tried = (DECODE_LAUNCHES if kind == "decode" else PREFILL_LAUNCHES) if sweep else []
        for items, length in DECODES if kind == "decode" else PREFILLS:
            work = batch(shape, items, length, 1 if kind == "decode" else length)
            repeats = 20 if kind == "decode" else 3
            rows = [
                (attempt(launches, dim, launch, lambda: seconds(work, repeats)), launch)  # noqa: B023
                for launch in [used, *(other for other in tried if other != used)]
            ]
            for time, launch in sorted(rows, key=lambda row: row[0])[:3]:
                rate = f"{items * length * kv_heads * dim * 4 / time / 1e9:6.0f} GB/s"
                if kind == "prefill":
                    rate = f"{2 * items * length**2 * heads * dim / time / 1e12:5.0f} TFLOP/s"
                mark = "*" if launch == used else " "
                print(f"{kind} {shape} {items:3} x {length:5} {time * 1e6:9.1f} us {rate} {mark}{launch}", flush=True)


def linears(models: list[str]) -> None:
    """Over copies of the weight that no cache holds."""
    for model, shapes in ((model, LINEARS[model]) for model in models):
        for out_size, size in shapes:
            copies = max(2, (256 << 20) // (out_size * size * 2))
            weights = [torch.randn(out_size, size, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            line = f"{model:5} {out_size:6} x {size:5}"
            for rows in (1, 2, 4):
                x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
                for call in (F.linear, linear_triton.linear):
                    time = seconds(lambda: [call(x, weight) for weight in weights], 1) / copies  # noqa: B023
                    rate = out_size * size * 2 / time / 1e9
                    line += f"   {'cublas' if call is F.linear else 'own'} {rows}: {time * 1e6:6.1f} us {rate:5.0f}"
            print(line, flush=True)


def linear_sweep(models: list[str], row_counts: list[int]) -> None:
    """cuBLAS, then the best launches of the tensor-core product, for all but the heads."""
    for model, shapes in ((model, LINEARS[model]) for model in models):
        for out_size, size in shapes[:-1]:
            copies = max(2, (160 << 20) // (out_size * size * 2))
            weights = [torch.randn(out_size, size, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            for rows in row_counts:
                x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
                own = []
                for launch, splits in itertools.product(LINEAR_LAUNCHES, SPLITS):
                    programs = -(-out_size // launch.outputs) * splits
                    if size // splits < 2 * launch.tile or (splits > 1 and programs > 700) or programs < 60:
                        continue
                    tried = replace(launch, splits=splits)
                    with contextlib.suppress(Exception):  # out of shared memory
                        call = partial(linear_triton.split_linear, bias=None, launch=tried)
                        own.append((seconds(lambda: [call(x, w) for w in weights], 1, 3) / copies, tried))  # noqa: B023
                theirs = seconds(lambda: [F.linear(x, w) for w in weights], 1) / copies  # noqa: B023
                gigabytes = out_size * size * 2 / 1e9
                print(f"{model:5} {out_size:6} x {size:5} {rows:3} rows:")
                print(f"    {theirs * 1e6:6.1f} us {gigabytes / theirs:5.0f} GB/s cublas")
                own.sort(key=lambda row: row[0])
                for time, tried in own[:4]:
                    print(f"    {time * 1e6:6.1f} us {gigabytes / time:5.0f} GB/s {tried}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", default="decode,prefill,linear")
    parser.add_argument("--models", default=",".join(LINEARS), help="whose products")
    parser.add_argument("--rows", default=",".join(map(str, LINEAR_ROWS)), help="of the products that are swept")
    args = parser.parse_args()
    kinds, models = args.only.split(","), args.models.split(",")
    row_counts = [int(rows) for rows in args.rows.split(",")]
    if args.sweep:
        compile_all(kinds, row_counts)
    for kind in ("decode", "prefill"):
        if kind in kinds:
            attention(kind, args.sweep)
    if "linear" in kinds:
        linears(models)
        if args.sweep:
            linear_sweep(models, row_counts)


if __name__ == "__main__":
    main()
