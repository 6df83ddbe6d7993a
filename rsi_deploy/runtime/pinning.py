"""Bind this process and its children to some of the machine's cores."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rsi_deploy.core.errors import UsageError


def parse_cores(text: str) -> tuple[int, ...]:
    """Parse `0`, `0,1` or `0-3`.

    >>> parse_cores("0,2-4")
    (0, 2, 3, 4)

    Raises:
        UsageError: The text has another form.
    """
    cores: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UsageError(f"--pin takes core numbers such as 0 or 0,1 or 0-3, but got {text!r}")
        cores += range(int(first), int(last or first) + 1)
    return tuple(sorted(set(cores)))


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Run all threads of this process on these cores while the block runs; new threads and processes inherit it.

    Args:
        cores: numbers of logical cores; () changes nothing.

    Raises:
        UsageError: The system does not support it, or the process may not use one of the cores.
    """
    if not cores:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("--pin: this operating system cannot bind a process to cores (Linux can)", hint="leave it out")
    before = os.sched_getaffinity(0)
    if not set(cores) <= before:
        raise UsageError(
            f"--pin {','.join(map(str, cores))}: this process may use the cores {', '.join(map(str, sorted(before)))}"
        )
    _bind(set(cores))
    try:
        yield
    finally:
        _bind(before)


def _bind(cores: set[int]) -> None:
    """All threads there are: the call itself binds one thread alone."""
    tasks = Path("/proc/self/task")
    threads = [int(entry.name) for entry in tasks.iterdir()] if tasks.is_dir() else [0]
    for thread in threads:
        try:
            os.sched_setaffinity(thread, cores)
        except ProcessLookupError:
            continue  # it has ended
