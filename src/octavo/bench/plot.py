"""Distributions of times as one SVG picture: a panel for each kind of time, a line for each case."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, MARGIN, GAP = 420, 260, 46, 22
COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#b91c1c", "#0f766e", "#a16207", "#475569")
MOST_POINTS = 400  # of one line

Lines = Mapping[str, Sequence[float]]


def distributions(panels: Mapping[str, Lines]) -> str:
    """``panels[kind][case]`` are samples in milliseconds; shown is the share of them below each value."""
    shown = {kind: {case: sorted(v) for case, v in lines.items() if v} for kind, lines in panels.items()}
    shown = {kind: lines for kind, lines in shown.items() if lines}
    cases = list(dict.fromkeys(case for lines in shown.values() for case in lines))
    columns = 2
    rows = math.ceil(len(shown) / columns)
    width, legend = columns * WIDTH, 20 * len(cases) + 10
    body = [_legend(case, i, rows * HEIGHT) for i, case in enumerate(cases)]
    for place, (kind, lines) in enumerate(shown.items()):
        body.append(_panel(kind, lines, cases, place % columns * WIDTH, place // columns * HEIGHT))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{rows * HEIGHT + legend}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        + "".join(body)
        + "</svg>\n"
    )


def _panel(kind: str, lines: Lines, cases: Sequence[str], left: float, top: float) -> str:
    step, most = _scale(max(values[-1] for values in lines.values()))
    across, down = WIDTH - MARGIN - GAP, HEIGHT - MARGIN - GAP
    x0, y0 = left + MARGIN, top + GAP + down

    def at(value: float, share: float) -> str:
        return f"{x0 + across * value / most:.1f},{y0 - down * share:.1f}"

    parts = [f'<text x="{x0}" y="{top + 14}" font-weight="bold">{html.escape(kind)}, ms</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = y0 - down * share
        parts.append(f'<path d="M{x0} {y:.1f}h{across}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for i in range(round(most / step) + 1):
        x = x0 + across * i * step / most
        parts.append(f'<text x="{x:.1f}" y="{y0 + 16:.1f}" text-anchor="middle">{i * step:g}</text>')
    for case, values in lines.items():
        count = len(values)
        picked = sorted({round(i * (count - 1) / MOST_POINTS) for i in range(MOST_POINTS + 1)})
        points = [at(values[0], 0), *(at(values[i], (i + 1) / count) for i in picked)]
        colour = COLOURS[cases.index(case) % len(COLOURS)]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return "".join(parts)


def _legend(case: str, index: int, top: float) -> str:
    y = top + 20 * index + 12
    return (
        f'<rect x="{MARGIN}" y="{y - 8}" width="14" height="4" fill="{COLOURS[index % len(COLOURS)]}"/>'
        f'<text x="{MARGIN + 22}" y="{y}">{html.escape(case)}</text>'
    )


def _scale(most: float) -> tuple[float, float]:
    """(step, end) of an axis from 0 that holds ``most``: 1, 2 or 5 times a power of ten, at most 6 steps."""
    most = max(most, 1e-9)
    power = 10.0 ** math.floor(math.log10(most / 6))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= most)
    return step, step * math.ceil(most / step)
