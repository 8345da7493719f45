"""Bar charts of a result file: ``python -m benchmarks.gpu.charts FILE``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness.plots import write_plots
from benchmarks.harness.results import read_results


def main() -> int:
    path = Path(sys.argv[1])
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return 0
    if not path.exists():
        print(f"no plots: {path} does not exist")
        return 0
    results = read_results(path)
    machine = results["machine"]["gpu"] or f"{results['machine']['cpu']}, {results['machine']['threads']} threads"
    for plot in write_plots(results["rows"], path.parent / "plots", path.stem, machine):
        print(plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
