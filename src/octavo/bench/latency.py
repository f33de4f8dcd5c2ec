"""``octavo bench latency``: how long a step and a request take, as percentiles over all rounds."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import TYPE_CHECKING

from octavo.bench import offline, report, workload
from octavo.options import add_engine_options, engine_config

if TYPE_CHECKING:
    from octavo.core.engine import EngineCore

COLUMNS = {
    "case": "case",
    "ms of": "what",
    "samples": "samples",
    **{name: f"ms.{name}" for name in ("mean", "p50", "p90", "p99", "max")},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_engine_options(parser)
    workload.add_arguments(parser, input_len=32, output_len=128, num_prompts=8, rounds=5)
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measures every case; prints rows for a step, the first token and the whole request."""
    with closing(offline.make_core(engine_config(args))) as core:
        cases = workload.cases(args, core.info.vocab_size, args.rounds)
        report.show([row for case in cases for row in measure(core, case)], COLUMNS, args.json)
    return 0


def measure(core: EngineCore, case: workload.Case) -> list[report.Row]:
    """The rows of one case."""
    offline.warm_up(core, case.rounds[0], case.max_tokens)
    rounds = [offline.run(core, prompts, case.max_tokens) for prompts in case.rounds[1:]]
    samples = {
        "step": [s for r in rounds for s in r.steps],
        "first token": [s for r in rounds for s in r.first_token],
        "request": [s for r in rounds for s in r.finished],
    }
    return [
        {
            "case": case.name,
            "what": what,
            "samples": len(seconds),
            "ms": report.percentiles([1000 * s for s in seconds]),
        }
        for what, seconds in samples.items()
    ]
