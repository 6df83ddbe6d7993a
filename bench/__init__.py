"""Benchmark suites: each script answers one question, run as `python -m bench.NAME` from the repository root."""
