"""Runs: all that sees no more of a method than `init`, `round` and metrics."""
