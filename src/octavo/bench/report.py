"""Figures of several rounds or requests in a few numbers, as a table for people and as JSON for scripts."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import octavo

Row = dict[str, Any]
Columns = dict[str, str]  # title -> "name" of a plain value, or "name.part" of a spread


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of a few rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and nearest-rank percentiles of many samples."""
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, math.ceil(len(ordered) * p / 100) - 1)] for p in (50, 90, 95, 99)}
    return {"mean": statistics.fmean(ordered), **ranks, "max": ordered[-1]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows there too")


def show(rows: list[Row], columns: Columns, out: Path | None) -> None:
    """Prints ``rows`` as a table; with ``out`` also `write`s them."""
    print(table(rows, columns))
    if out is not None:
        write(rows, out)


def write(rows: list[Row], out: Path) -> None:
    """``rows``, and what they were measured on, as JSON."""
    about = {"octavo": octavo.__version__, "python": platform.python_version(), "machine": platform.machine()}
    out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}", file=sys.stderr)


def table(rows: list[Row], columns: Columns) -> str:
    """``rows`` under the titles of those ``columns`` that some row has."""
    shown = {title: key for title, key in columns.items() if any(_pick(row, key) is not None for row in rows)}
    cells = [list(shown), *([_text(_pick(row, key)) for key in shown.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _pick(row: Row, key: str) -> Any:
    name, _, part = key.partition(".")
    value = row.get(name)
    return value.get(part) if part and isinstance(value, dict) else value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
