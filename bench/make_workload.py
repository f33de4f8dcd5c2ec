"""Writes the workloads of `octavo bench throughput --workload` as token ids, the same on every machine.

The file maps a case to ``{"model", "max_tokens", "rounds": [{"prompts"}]}``. Round 0 is the warm-up;
every round has the same lengths and other tokens, so that a prefix cache gains nothing from an earlier one.

Ids come from `random.Random` with a string seed, whose sequence Python keeps stable over versions.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUNDS = 6
LOWEST, HIGHEST = 100, 49_000  # inside every vocabulary used here, above the special tokens


@dataclass(frozen=True)
class Case:
    """``requests`` prompts of ``shortest`` to ``longest`` tokens each, ``max_tokens`` new ones for each."""

    seed: int
    model: str
    requests: int
    shortest: int
    longest: int
    max_tokens: int

    def lengths(self) -> list[int]:
        """Prompt lengths, the same in every round."""
        if self.shortest == self.longest:
            return [self.shortest] * self.requests
        rng = random.Random(self.seed)
        return [rng.randint(self.shortest, self.longest) for _ in range(self.requests)]

    def rounds(self) -> list[dict[str, Any]]:
        """The token ids of every round."""
        lengths, rounds = self.lengths(), []
        for number in range(ROUNDS):
            rng = random.Random(f"{self.seed}/{number}")
            prompts = [[rng.randrange(LOWEST, HIGHEST) for _ in range(length)] for length in lengths]
            rounds.append({"prompts": prompts})
        return rounds


CASES = {
    "A": Case(1, "smollm2-135m", 64, 32, 256, 128),  # throughput of many short requests
    "B": Case(2, "smollm2-135m", 1, 128, 128, 128),  # one stream: decode speed and time to first token
    "C": Case(3, "smollm2-135m", 1, 2048, 2048, 1),  # one long prompt
    "EA": Case(5, "llama-1b-random", 16, 32, 256, 64),  # as A, with weights far beyond the caches
    "EB": Case(6, "llama-1b-random", 1, 128, 128, 64),  # as B
}


def workload() -> dict[str, Any]:
    """What the file holds."""
    return {
        name: {"model": case.model, "max_tokens": case.max_tokens, "rounds": case.rounds()}
        for name, case in CASES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("workload.json"))
    out = parser.parse_args().out
    out.write_text(json.dumps(workload(), separators=(",", ":")), encoding="utf-8")
    for name, case in CASES.items():
        prompts = f"{case.requests} x {case.shortest}..{case.longest} tokens, {sum(case.lengths())} in all"
        print(f"{name}: {prompts}, {case.max_tokens} new ones each")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
