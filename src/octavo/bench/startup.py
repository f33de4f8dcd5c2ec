"""``octavo bench startup``: the way from the start of this process to a first token, by phase.

The process is fresh, so this is a cold start of Python; the files are as warm as the system's cache has them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from pathlib import Path

from octavo.bench import offline, report
from octavo.options import add_engine_options, engine_config

COLUMNS = {"phase": "phase", "seconds": "seconds"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_engine_options(parser)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows there too")


def run(args: argparse.Namespace) -> int:
    """Starts the engine once and prints what took how long."""
    config = engine_config(args)
    phases = {"python": _since_process_start()}
    start = time.perf_counter()
    for module in ("octavo.core.engine", "octavo.runtime.worker"):
        importlib.import_module(module)
    phases["import"] = time.perf_counter() - start
    core = offline.make_core(config)
    phases |= core.phases
    prompt = list(range(1, min(9, core.info.vocab_size)))
    phases["first token"] = offline.run(core, [prompt], 1).seconds
    core.close()
    phases["all"] = sum(phases.values())
    report.show([{"phase": name, "seconds": seconds} for name, seconds in phases.items()], COLUMNS, args.json)
    return 0


def _since_process_start() -> float:
    """Seconds since the system started this process (resolution: 10 ms); 0 where the system does not tell."""
    try:
        text = Path("/proc/self/stat").read_text(encoding="ascii")
        ticks = int(text.rpartition(")")[2].split()[19])  # field 22 of proc(5): starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return 0.0
