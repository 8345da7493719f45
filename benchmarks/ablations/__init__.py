"""The papers' findings on a small scale: the plan, training, analysis, tables and plots."""
