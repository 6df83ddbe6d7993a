"""CPU seconds of each file of tests: `--cpu-seconds` measures and stores them, `--fast` leaves out the expensive files.

`tests/cpu_seconds.txt` lists the files that take at least SLOW seconds of CPU (processes that they start and wait for
included), the most expensive first. A file that is not listed is fast.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

SLOW = 2.0
STORED = Path(__file__).with_suffix(".txt")
HEAD = "# CPU seconds of the files that `pytest --fast` leaves out; `pytest --cpu-seconds` writes this file.\n"


def slow_files(stored=STORED):
    """Return the seconds of each listed file; paths are relative to this folder."""
    lines = stored.read_text(encoding="utf-8").splitlines() if stored.is_file() else []
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return {path: float(seconds) for seconds, path in rows}


class CpuSeconds:
    """A pytest plugin that sums the CPU time of all phases of all tests by file, in every worker of xdist."""

    def __init__(self, stored=STORED):
        self.stored, self.seconds, self.before = stored, Counter(), sum(os.times()[:4])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        now = sum(os.times()[:4])
        report.cpu_seconds, self.before = now - self.before, now
        return report

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid.partition("::")[0].removeprefix("tests/")] += report.cpu_seconds

    def pytest_sessionfinish(self, session):
        """Write the list: files that this run did not reach keep their seconds."""
        if hasattr(session.config, "workerinput"):
            return
        found = {**slow_files(self.stored), **self.seconds}
        exists = {path: spent for path, spent in found.items() if (self.stored.parent / path).is_file()}
        rows = sorted(((spent, path) for path, spent in exists.items() if spent >= SLOW), reverse=True)
        text = "".join(f"{spent:6.1f}  {path}\n" for spent, path in rows)
        self.stored.write_text(HEAD + text, encoding="utf-8")
