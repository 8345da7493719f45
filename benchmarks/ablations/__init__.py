"""The papers' findings in small: the plan, training, analysis, tables and plots."""
