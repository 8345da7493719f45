"""Benchmarks: one file for each operation, ``run.py`` to measure, ``report.py`` to render them for README and docs."""
