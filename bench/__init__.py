"""Benchmark suites: each script answers one question, run as `python -m bench.NAME` from the repository root."""

from rsi_deploy.cli import yield_idle_threads

yield_idle_threads()  # as the command line does; every arm and every child process gets it
