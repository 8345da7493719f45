"""Renders the result files into the README's tables: ``python benchmarks/report.py``; ``--check`` only compares.

Files of ``benchmarks.ablations`` have markers of their own, which a README may do without.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    # So that `python benchmarks/report.py` finds the package, and the folder's own files shadow no other module.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer

from benchmarks.ablations.tables import render as render_ablation
from benchmarks.harness.machine import ROOT
from benchmarks.harness.registry import load_operations
from benchmarks.harness.results import read_results
from benchmarks.harness.tables import markdown_table, rows_by

LONG_TABLE = 40  # rows beyond which a table is folded
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
ABLATION_BEGIN, ABLATION_END = "<!-- ablation:begin -->", "<!-- ablation:end -->"


def render(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """One machine's section: what it is, then a table for each operation.

    Args:
        results: a result file's content.
        titles: a line for each operation, by name; others stand under their name alone.
    """
    machine, rates, rows = results["machine"], results["rates"], results["rows"]
    packages = machine["packages"]
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("transformers", "scipy", "triton") if packages.get(name)
    )
    floor = f"{rates['bytes'] / 1e9:.3g} GB/s, {rates['specials'] / 1e9:.3g} G special functions/s ({rates['source']})"
    host = f"{machine['cpu']}, {machine['cores']} cores, SIMD {machine['simd'] or 'unknown'}"
    lines = [
        f"### {machine['gpu'] or machine['cpu']}",
        "",
        f"{'Host: ' if machine['gpu'] else ''}{host}; Python {machine['python']}, {versions}.",
        f"Floors: {floor}.",
    ]
    for (op,), group in sorted(rows_by(rows, "op").items(), key=lambda item: len(item[1])):
        title = f": {titles[op]}" if op in titles else ""
        table = [markdown_table(group), "", measured(group)]
        if len(group) > LONG_TABLE:
            table = [f"<details><summary>all {len(group)} rows</summary>", "", *table, "", "</details>"]
        lines += ["", f"**`{op}`**{title}", "", *table]
    return "\n".join(lines)


def measured(rows: Sequence[Mapping[str, Any]]) -> str:
    """When, from which commit and with what these rows were measured."""
    runs = {
        f"{row['date']} at {row['commit'] or 'an unknown commit'}{' with local changes' if row['dirty'] else ''}, "
        f"torch {row['torch']}, {row['threads']} threads": None
        for row in rows
    }
    return f"Measured {'; '.join(runs)}."


def replace_between(text: str, tables: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with ``tables`` between the two markers.

    Raises:
        ValueError: the markers are missing, repeated or in the wrong order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and then {end}, once each")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    return f"{head}{begin}\n{tables}\n{end}{tail}"


def main(
    readme: Annotated[Path, typer.Option(help="The file that holds the markers.")] = ROOT / "README.md",
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = ROOT / "benchmarks" / "results",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if the tables differ.")] = False,
) -> None:
    """Writes the tables of all result files between the markers."""
    files = sorted(path for path in results.glob("*.json") if not path.name.startswith("ablation-"))
    ablations = sorted(results.glob("ablation-*.json"))
    if not files:
        raise typer.BadParameter(f"{results} holds no result files; run benchmarks/run.py first")
    titles = {name: operation.title for name, operation in load_operations().items()}
    if not readme.exists():
        raise typer.BadParameter(f"{readme} does not exist")
    text = readme.read_text()
    try:
        new = replace_between(text, "\n\n".join(render(read_results(path), titles) for path in files))
        if ABLATION_BEGIN in text:
            tables = "\n\n".join(render_ablation(read_results(path)) for path in ablations)
            new = replace_between(new, tables, ABLATION_BEGIN, ABLATION_END)
    except ValueError as error:
        raise typer.BadParameter(f"{readme}: {error}") from error
    if new == text:
        print(f"{readme} is up to date")
    elif check:
        print(f"{readme} does not show the result files of {results}; run benchmarks/report.py")
        raise typer.Exit(1)
    else:
        readme.write_text(new)
        print(f"wrote {len(files) + len(ablations)} result file(s) into {readme}")


if __name__ == "__main__":
    typer.run(main)
