"""Attention kernels on one GPU, alone: time, share of the card's bandwidth (decode) or TFLOP/s (prefill), by launch.

    python bench/kernels_gpu.py [--sweep]

Without --sweep the launches that the engine uses are timed; with it, others beside them, best first.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
import triton

from octavo.kernels import attn_triton
from octavo.kernels.attn_triton import Launch
from octavo.kernels.metadata import AttentionMetadata

SHAPES = ((32, 8, 64), (32, 8, 128), (16, 8, 128))
DECODES = ((1, 1024), (16, 1024), (64, 384), (256, 832))
PREFILLS = ((2, 4096), (1, 16000), (16, 512))
PAGE = 16


def batch(shape: tuple[int, int, int], items: int, length: int, count: int) -> tuple[torch.Tensor, ...]:
    """(query, cache, metadata) of ``items`` sequences of ``length`` tokens, the last ``count`` of them queries."""
    heads, kv_heads, dim = shape
    pages = -(-length // PAGE)
    ints = {"dtype": torch.int32, "device": "cuda"}
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
    return query, cache, meta


def seconds(arguments: tuple[torch.Tensor, ...]) -> float:
    """Of one call, replayed in a graph, the caches cleared between calls."""
    query, cache, meta = arguments
    call = lambda: attn_triton.attention(query, cache, meta, 0.1)  # noqa: E731
    return triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median") / 1e3


def report(label: str, launches: dict[int, Launch], pad: int, tried: list[Launch], measure) -> None:
    rows = []
    for launch in tried:
        old, launches[pad] = launches[pad], launch
        try:
            rows.append((*measure(), launch))
        except Exception as error:  # out of shared memory: such a launch cannot be used
            rows.append((float("inf"), type(error).__name__, launch))
        launches[pad] = old
    rows.sort(key=lambda row: row[0])
    for time, text, launch in rows[:4]:
        print(f"{label:34} {time * 1e6:9.1f} us  {text:>14}  {launch}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    sweep = parser.parse_args().sweep
    for shape in SHAPES:
        dim = shape[2]
        for items, length in DECODES:
            arguments = batch(shape, items, length, 1)
            tried = [Launch(t, w, s) for t, w, s in itertools.product((32, 64, 128), (2, 4), (2, 3, 4))]

            def decode(arguments=arguments, items=items, length=length, shape=shape) -> tuple[float, str]:
                time = seconds(arguments)
                return time, f"{items * length * shape[1] * shape[2] * 4 / time / 1e9:.0f} GB/s"

            label = f"decode {shape} {items} x {length}"
            report(label, attn_triton.DECODE, dim, tried if sweep else [attn_triton.DECODE[dim]], decode)
        for items, length in PREFILLS:
            arguments = batch(shape, items, length, length)
            tried = [Launch(t, w, s, r) for t, w, s, r in itertools.product((32, 64, 128), (4, 8), (2, 3), (64, 128))]

            def prefill(arguments=arguments, items=items, length=length, shape=shape) -> tuple[float, str]:
                time = seconds(arguments)
                return time, f"{2 * items * length**2 * shape[0] * shape[2] / time / 1e12:.0f} TFLOP/s"

            label = f"prefill {shape} {items} x {length}"
            report(label, attn_triton.PREFILL, dim, tried if sweep else [attn_triton.PREFILL[dim]], prefill)


if __name__ == "__main__":
    main()
