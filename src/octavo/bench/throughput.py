"""``octavo bench throughput``: how many tokens a second the engine makes, without a server."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from octavo.bench import floor, offline, report, workload
from octavo.options import add_engine_options, engine_config

if TYPE_CHECKING:
    from octavo.core.engine import EngineCore

COLUMNS = {
    "case": "case",
    "requests": "requests",
    "output tok/s": "output_tok_s.median",
    "min": "output_tok_s.min",
    "max": "output_tok_s.max",
    "total tok/s": "total_tok_s.median",
    "wall s": "wall_s.median",
    "TTFT ms": "ttft_ms.median",
    "decode tok/s": "decode_tok_s.median",
    "of the floor %": "floor_percent",
    "KV waste %": "kv_waste_percent.median",
    "RSS MiB": "peak_rss_mib",
    "others' CPU %": "others_cpu_percent.max",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_engine_options(parser)
    workload.add_arguments(parser, input_len=128, output_len=128, num_prompts=64, rounds=3)
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measures every case and prints a row for each."""
    config = engine_config(args)
    least = floor.measure(config)
    if least is not None:
        print(f"floor: {least}", file=sys.stderr)
    with closing(offline.make_core(config)) as core:
        cases = workload.cases(args, core.info.vocab_size, args.rounds)
        report.show([measure(core, case, least) for case in cases], COLUMNS, args.json)
    return 0


def measure(core: EngineCore, case: workload.Case, least: floor.Floor | None = None) -> report.Row:
    """The row of one case: a warm-up, then every other round timed."""
    offline.warm_up(core, case.rounds[0], case.max_tokens)
    rounds = [offline.run(core, prompts, case.max_tokens) for prompts in case.rounds[1:]]
    row: report.Row = {
        "case": case.name,
        "requests": len(case.rounds[0]),
        "rounds": len(rounds),
        "output_tok_s": report.spread([r.output_tokens / r.seconds for r in rounds]),
        "total_tok_s": report.spread([(r.prompt_tokens + r.output_tokens) / r.seconds for r in rounds]),
        "wall_s": report.spread([r.seconds for r in rounds]),
        "kv_waste_percent": report.spread([100 * r.kv_waste for r in rounds]),
        "peak_rss_mib": offline.peak_rss_mib(),
    }
    if least is not None:
        lengths = [len(prompt) for prompt in case.rounds[0]]
        row["floor_percent"] = 100 * least.seconds(lengths, case.max_tokens) / row["wall_s"]["median"]
    if len(case.rounds[0]) == 1:
        row["ttft_ms"] = report.spread([1000 * r.first_token[0] for r in rounds])
    rates = [r.decode_rate for r in rounds if r.decode_rate is not None]
    if rates:
        row["decode_tok_s"] = report.spread(rates)
    others = [100 * r.others_cpu for r in rounds if r.others_cpu is not None]
    if others:
        row["others_cpu_percent"] = report.spread(others)
    return row
