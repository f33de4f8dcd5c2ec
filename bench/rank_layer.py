"""The products and sums of a decoder layer of Llama-3.1-8B on one of two ranks, one after the other: which launches.

    python bench/rank_layer.py [--rows 64]

A sum over peer memory waits for the other card while this card's memory is idle: a product that follows may ask for its
weight meanwhile, and the time alone (`kernels_gpu.py --sweep`) does not show that. Here 8 layers are replayed, with
their own weights: sum and norm, qkv, o, sum and norm, gate and up with activation, down (attention is left out). Each
product is tried in some launches while the others are as `linear_triton.choose` says, then the best of all together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
import torch.nn.functional as F
from kernels_gpu import seconds

from octavo.kernels import linear_triton, select
from octavo.kernels.linear_triton import ALL, Launch

RANKS, LAYERS, SIZE = 2, 8, 4096
SHAPES = {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (14336, 4096), "down": (4096, 7168)}
_NARROW = [Launch(64, 128, 2, 4, 5), Launch(64, 128, 2, 8, 5), Launch(64, 128, 4, 8, 3), Launch(32, 128, 1, 4, 5)]
_WIDE = [Launch(64, 128, 1, 4, 5), Launch(64, 128, 1, 8, 3), Launch(128, 64, 1, 8, 5), Launch(128, 64, 1, 4, 5)]


def _with_prefetch(launches: list[Launch], columns: tuple[int, ...]) -> list[Launch]:
    return [Launch(p.outputs, p.tile, p.splits, p.warps, p.stages, c) for p in launches for c in columns]


Choice = Launch | None
"""None: as torch does."""
TRIED: dict[str, list[Choice]] = {
    "qkv": [None, *_with_prefetch(_NARROW, (0, ALL))],
    "o": [None, *_with_prefetch([Launch(64, 128, 1, 4, 7), Launch(64, 128, 2, 8, 5)], (0, ALL))],
    "gate_up": [None, *_with_prefetch(_WIDE, (0, 1024, 2048))],
    "down": [None, *_with_prefetch([Launch(64, 128, 2, 8, 5), Launch(64, 64, 2, 4, 7)], (0, ALL))],
}


class Chain:
    """`LAYERS` layers of this rank."""

    def __init__(self, rows: int, group: Any, device: torch.device) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02

        self.group, self.ops = group, select.ops(device, torch.bfloat16)
        self.weights = [{name: random(*shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)]
        self.x, self.heads, self.norm = random(rows, SIZE), random(rows, SHAPES["o"][1]), random(SIZE)

    def default(self, name: str) -> Choice:
        x = {"o": self.heads, "down": self.x.new_empty(len(self.x), SHAPES["down"][1])}.get(name, self.x)
        return linear_triton.choose(x, self.weights[0][name], gated=name == "gate_up")

    def run(self, choices: dict[str, Choice]) -> torch.Tensor:
        x = residual = self.x
        for weights in self.weights:

            def product(x: torch.Tensor, name: str, gate: str | None = None) -> torch.Tensor:
                launch, weight = choices[name], weights[name]  # noqa: B023
                if launch is not None:
                    return linear_triton.split_linear(x, weight, None, launch, gate)
                out = F.linear(x, weight)
                return out if gate is None else self.ops.silu_and_mul(out)

            x, residual = self.group.add_rms_norm(x, residual, self.norm, 1e-5, self.ops)
            product(x, "qkv")
            x, residual = self.group.add_rms_norm(product(self.heads, "o"), residual, self.norm, 1e-5, self.ops)
            x = product(product(x, "gate_up", "silu"), "down")
        return x


def rank_of(rank: int, folder: str, rows: int) -> None:
    from octavo.parallel.group import connect

    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    group = connect(rank, RANKS, device, Path(folder), 60)
    chain = Chain(rows, group, device)
    default = {name: chain.default(name) for name in SHAPES}
    jobs = [(name, choice) for name, choices in TRIED.items() for choice in choices]

    def all_of_them() -> None:
        for name, choice in jobs:
            chain.run({**default, name: choice})

    chain.ops.rehearse(all_of_them)

    def measured(work: Callable[[], object]) -> float:
        """Microseconds a layer, the mean of the ranks."""
        group.least(0)
        found = torch.tensor([seconds(work, 4) / LAYERS * 1e6], device=device)
        return float(group.all_reduce(found)) / RANKS

    def tell(*words: object) -> None:
        if rank == 0:
            print(*words, flush=True)

    tell("as chosen", round(measured(partial(chain.run, default)), 1), "us a layer", default)
    best = dict(default)
    for name, choices in TRIED.items():
        times = [(measured(partial(chain.run, {**default, name: choice})), i) for i, choice in enumerate(choices)]
        for time, i in sorted(times)[:5]:
            tell(f"{name:8} {time:6.1f}", choices[i])
        best[name] = choices[min(times)[1]]
    tell("together", round(measured(partial(chain.run, best)), 1), best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    args = parser.parse_args()
    from torch.multiprocessing.spawn import spawn

    spawn(rank_of, (tempfile.mkdtemp(), args.rows), nprocs=RANKS)


if __name__ == "__main__":
    main()
