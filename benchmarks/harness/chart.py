"""The chart of the README: each operation's range of speedups on one machine, as an SVG of a few kilobytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.harness.tables import number, rows_by, speedups

WIDTH, LEFT, RIGHT, ROW, TOP = 760, 330, 90, 30, 80  # in pixels
BAR, GRID, TEXT = "#2a6f97", "#d5dae0", "#1f2933"


def speedup_chart(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str], machine: str) -> str:
    """An SVG with one bar an operation: from the smallest to the largest ratio that any of its cases shows. Of a case
    that was measured with two allocators, the smaller ratio counts.

    Args:
        rows: of a result file.
        titles: a few words for each operation to show, in order; operations without rows are left out.
        machine: where the rows were measured.
    """
    by_op = {op: group for (op,), group in rows_by(rows, "op").items()}
    ranges = {op: speedups(by_op[op]) for op in titles if op in by_op and speedups(by_op[op])}
    if not ranges:
        raise ValueError("no operation of the chart has a row of fastmask")
    baselines = dict.fromkeys(row["baseline"] for op in ranges for row in by_op[op] if "baseline" in row)
    largest = max(max(ratios) for ratios in ranges.values())
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= largest]
    width = (WIDTH - LEFT - RIGHT) / math.log(largest)
    bottom = TOP + ROW * len(ranges)

    def x(ratio: float) -> str:
        return f"{LEFT + width * math.log(max(ratio, 1)):.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 34}" font-family="sans-serif" '
        f'font-size="13" fill="{TEXT}">',
        f'<rect width="{WIDTH}" height="{bottom + 34}" rx="6" fill="#ffffff"/>',
        '<text x="16" y="24" font-size="15" font-weight="bold">Times faster than the code that is in use today</text>',
        f'<text x="16" y="44" font-size="12">{escape(machine)}; each bar spans all measured cases</text>',
        f'<text x="16" y="60" font-size="12">compared with {escape(" · ".join(baselines))}; logarithmic scale</text>',
    ]
    for tick in ticks:
        lines.append(f'<path d="M{x(tick)} {TOP - 6}V{bottom}" stroke="{GRID}"/>')
        lines.append(f'<text x="{x(tick)}" y="{bottom + 18}" text-anchor="middle" font-size="11">{tick}×</text>')
    for row, (op, ratios) in enumerate(ranges.items()):
        y, low, high = TOP + ROW * row, min(ratios), max(ratios)
        length = max(float(x(high)) - float(x(low)), 4)
        label = f"{number(low)}×" if number(low) == number(high) else f"{number(low)}–{number(high)}×"
        lines.append(f'<text x="16" y="{y + 16}">{escape(titles[op])}</text>')
        lines.append(f'<rect x="{x(low)}" y="{y + 4}" width="{length:.1f}" height="16" rx="3" fill="{BAR}"/>')
        lines.append(f'<text x="{float(x(low)) + length + 6:.1f}" y="{y + 16}" font-size="12">{label}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"
