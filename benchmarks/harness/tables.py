"""Rows as tables: for the terminal, the README and the documentation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from benchmarks.harness.allocator import DEFAULT

Row = dict[str, Any]


def rows_by(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows grouped by the values of these keys, in the order of their first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def speedups(rows: Sequence[Row]) -> list[float]:
    """How many times faster than the baseline fastmask is, in each case and form, but for partial ones. Of a case that
    was measured with two allocators, the smaller ratio counts."""
    ours = [row for row in rows if row["provider"].startswith("fastmask") and "speedup" in row]
    ours = [row for row in ours if not row.get("partial")]
    groups = rows_by(ours, "op", "case", "dtype", "provider").values()
    return [min(row["speedup"] for row in group) for group in groups]


def case_words(row: Row) -> str:
    """A row's case and dtype, and its allocator unless that is the default one."""
    words = [row["case"], row["dtype"], row["allocator"]]
    return ", ".join(words if row["allocator"] != DEFAULT else words[:2])


def markdown_lines(header: Sequence[str], lines: Sequence[Sequence[str]], words: Collection[str] = ()) -> list[str]:
    """The lines of a Markdown table. Columns with these headers, and by default the first, stand left, others right."""
    left = words or header[:1]
    rule = "|".join("---" if title in left else "--:" for title in header)
    return [f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]


def markdown_table(rows: Sequence[Row]) -> str:
    """One operation's table, a section for each case and allocator; under it, what failed and what is missing."""
    baselines = list(dict.fromkeys(row["baseline"] for row in rows if "baseline" in row))
    against = f"× vs {baselines[0]}" if len(baselines) == 1 else "×"
    lines = [
        f"| case | provider | median ms (p20–p80) | {against} | peak MB: tensors / process | time / floor |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for group in rows_by(rows, "case", "dtype", "allocator").values():
        timed = [row for row in group if row["status"] == "ok"]
        for number, row in enumerate(timed):
            cells = [case_words(row) if number == 0 else "", row["provider"], *row_cells(row)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *excuses(rows)])


def row_cells(row: Row) -> list[str]:
    """Time, speed-up, memory and distance from the floor of a timed row."""
    speedup = number(row["speedup"]) if "speedup" in row else "–"
    memory = row["memory_bytes"]
    kinds = [memory["allocator"], memory["resident"]]
    return [
        f"{number(row['median_ms'])} ({number(row['p20_ms'])}–{number(row['p80_ms'])})",
        speedup,
        " / ".join(number(size / 1e6) for size in kinds if size is not None),
        number(row["times_floor"]),
    ]


def excuses(rows: Sequence[Row]) -> list[str]:
    """A line for each provider and reason of those that were not timed, blank line first; nothing if all were."""
    untimed = [row for row in rows if row["status"] != "ok"]
    lines = []
    for (status, provider, reason), group in rows_by(untimed, "status", "provider", "reason").items():
        where = "; ".join(dict.fromkeys(f"{row['case']}, {row['dtype']}" for row in group))
        lines.append(f"{'Failed' if status == 'failed' else 'Not run'}: {provider} ({reason}) on {where}.")
    return ["", "  \n".join(lines)] if lines else []


def number(value: float) -> str:
    """Three significant digits without exponent."""
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.3f}"
