"""Result files: one JSON for each machine, in which a run replaces the rows that it measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.allocator import DEFAULT, current_allocator
from benchmarks.harness.tables import rows_by
from fastmask.files import read_json, replace_file

SCHEMA = 1
CASE = ("op", "case", "dtype", "device")
Row = dict[str, Any]


def read_results(path: Path) -> dict[str, Any]:
    """A result file's content; an empty one if there is no file. Rows that name no allocator had the default one.

    Raises:
        ValueError: the file is no result file of this schema.
    """
    results = read_json(path, {"schema": SCHEMA, "rows": []})
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or not isinstance(results.get("rows"), list):
        raise ValueError(f"{path} is no result file of schema {SCHEMA}; move it away to start a new one")
    results["rows"] = [{"allocator": DEFAULT} | row for row in results["rows"]]
    return results


def merge_rows(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of the same operation, case, dtype, device and allocator are replaced as a group: their ratios belong to one
    run.

    Groups keep the place they had. New ones come last, but beside those of the same case with another allocator.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for rows in (old, new):
        fresh: set[tuple[Any, ...]] = set()
        for row in rows:
            key = tuple(row[name] for name in (*CASE, "allocator"))
            if key not in fresh:
                groups[key] = []
                fresh.add(key)
            groups[key].append(row)
    merged = [row for group in groups.values() for row in group]
    return [row for group in rows_by(merged, *CASE).values() for row in group]


def write_results(path: Path, run: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Merges ``rows`` into the file at ``path``, each with the run's date, commit, threads and torch version, and with
    the allocator of this process unless the row names one.

    Args:
        run: "machine", "rates", "date", "commit", "dirty" and "argv" of this run.
    """
    stamp = {
        "date": run["date"],
        "commit": run["commit"],
        "dirty": run["dirty"],
        "threads": run["machine"]["threads"],
        "torch": run["machine"]["packages"]["torch"],
    }
    new = [{"allocator": current_allocator()} | row | stamp for row in rows]
    results = {"schema": SCHEMA, **run, "rows": merge_rows(read_results(path)["rows"], new)}
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(results, indent=1) + "\n"))
