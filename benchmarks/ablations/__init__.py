"""The parts of ``benchmarks/ablation.py``: the plan, training, analysis, tables and plots."""
