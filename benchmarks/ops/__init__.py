"""Operators, matching and criterion against what users have today: one file a comparison."""
