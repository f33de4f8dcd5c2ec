"""What a benchmark asks: token ids, either from a workload file (`bench/make_workload.py` writes one) or made up."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import msgspec

from octavo.errors import ConfigError

FIRST_ID = 100  # lower ids are often special tokens
MOST_ROUNDS = 1000


class Round(msgspec.Struct):
    """One round of a workload file; a prompt is ``prefix`` followed by one of ``prompts``."""

    prompts: list[list[int]]
    prefix: list[int] = []


class _FileCase(msgspec.Struct):
    max_tokens: int
    rounds: list[Round]


@dataclass(frozen=True)
class Case:
    """``rounds[r]`` holds the prompts of round r; round 0 is the warm-up. Each gets ``max_tokens`` new tokens."""

    name: str
    max_tokens: int
    rounds: list[list[list[int]]]


def add_arguments(
    parser: argparse.ArgumentParser, *, input_len: int, output_len: int, num_prompts: int, rounds: int | None = None
) -> None:
    """Options that say what to ask, and ``--rounds`` where rounds are repeated."""
    group = parser.add_argument_group("workload")
    group.add_argument("--workload", type=Path, metavar="FILE", help="workload file; default: random prompts")
    group.add_argument("--cases", metavar="A,B", help="cases of the file to run (default: all)")
    sizes = {
        "input-len": (input_len, "tokens in a random prompt"),
        "output-len": (output_len, "new tokens for each"),
        "num-prompts": (num_prompts, "random prompts"),
    }
    for name, (default, text) in sizes.items():
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    if rounds is not None:
        text = f"timed rounds after the warm-up (default: {rounds})"
        group.add_argument("--rounds", type=int, default=rounds, metavar="N", help=text)


def cases(args: argparse.Namespace, vocab_size: int, rounds: int) -> list[Case]:
    """The cases that ``args`` name, with ``rounds`` rounds and the warm-up; raises `ConfigError`.

    Random prompts depend on ``args.seed``, which the options of an engine have only if it was given (else 0).
    """
    if not 1 <= rounds <= MOST_ROUNDS:
        raise ConfigError(f"--rounds is {rounds}, outside [1, {MOST_ROUNDS}].", "Give a number in that range.")
    if args.workload is not None:
        return read(args.workload, args.cases.split(",") if args.cases else None, rounds)
    if args.cases:
        raise ConfigError("--cases names cases of a workload file, but there is none.", "Add --workload FILE.")
    return [synthetic(args.input_len, args.output_len, args.num_prompts, vocab_size, rounds, getattr(args, "seed", 0))]


def read(path: Path, names: list[str] | None, rounds: int) -> list[Case]:
    """Cases ``names`` (None: all) of the file at ``path``; raises `ConfigError`."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, _FileCase])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"cannot read the workload {path}: {error}.", "Make one with bench/make_workload.py."
        ) from None
    missing = [name for name in names or () if name not in found]
    if missing:
        raise ConfigError(f"{path} has no case {', '.join(missing)}.", f"It has {', '.join(found)}.")
    picked = {name: found[name] for name in names or found}
    for name, case in picked.items():
        if len(case.rounds) <= rounds:
            raise ConfigError(
                f"case {name} has {len(case.rounds)} rounds, one of which is the warm-up; --rounds is {rounds}.",
                f"Give at most {len(case.rounds) - 1}.",
            )
    return [
        Case(name, case.max_tokens, [[r.prefix + prompt for prompt in r.prompts] for r in case.rounds[: rounds + 1]])
        for name, case in picked.items()
    ]


def synthetic(input_len: int, output_len: int, num_prompts: int, vocab_size: int, rounds: int, seed: int = 0) -> Case:
    """Random prompts of one length, other ones in every round and for every ``seed``; the same on every machine."""
    for name, value in (("input-len", input_len), ("output-len", output_len), ("num-prompts", num_prompts)):
        if value < 1:
            raise ConfigError(f"--{name} is {value}.", "Give 1 or more.")
    rng = random.Random(seed)
    lowest = min(FIRST_ID, vocab_size - 1)
    made = [
        [[rng.randrange(lowest, vocab_size) for _ in range(input_len)] for _ in range(num_prompts)]
        for _ in range(rounds + 1)
    ]
    return Case(f"{num_prompts} x ({input_len} -> {output_len})", output_len, made)
