"""Benchmarks: one module per question, launched as `python -m benchmarks.NAME`."""
