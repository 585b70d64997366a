"""Experiments: one module per kind, launched as `python -m experiments.NAME`."""
