"""Scores and gates as pure functions: no input or output, no networks."""
