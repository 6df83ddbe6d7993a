"""One model in a process of its own, telling how far it came: `python -m rsi_deploy.benchmark.worker REQUEST.json`.

Every phase ends with one JSON line on stdout, so that a process that is ended leaves what it knew:

    import    numpy and onnxruntime are there
    load      the session is made
    run       the calls are done

Nothing but the standard library is imported before the first reading of the clock. What this package needs for
itself is loaded between the phases, outside of their times.
"""

import json
import os
import sys
import time
from typing import Any

STARTED_NS = time.monotonic_ns()


def main(path: str) -> None:
    """Do what the request at `path` asks; `processes` writes it."""
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    try:
        _phases(request)
    except Exception as error:  # told to the parent, which raises or records it
        _say({"error": str(error) or type(error).__name__, "kind": type(error).__name__})
    sys.stdout.flush()
    os._exit(0)  # freeing what was loaded is nobody's measurement


def _phases(request: dict[str, Any]) -> None:
    before = time.perf_counter_ns()
    import numpy as np  # noqa: F401
    import onnxruntime  # noqa: F401

    spent = time.perf_counter_ns() - before
    from pathlib import Path

    from rsi_deploy.benchmark.variants import Runtime
    from rsi_deploy.io.arrays import read_npz

    feeds = dict(zip(request["names"], read_npz(request["feeds"]).values(), strict=True))
    runtime = Runtime(
        provider=request["provider"],
        threads=request["threads"],
        allow_fallback=request["allow_fallback"],
        checked=True,  # by whoever wrote the request
    )
    import rsi_deploy.runtime.machine  # noqa: F401

    _say({"phase": "import", "ms": spent / 1e6, "started_ns": STARTED_NS})
    before = time.perf_counter_ns()
    session = runtime.session(Path(request["model"]))
    _say({"phase": "load", "ms": (time.perf_counter_ns() - before) / 1e6})
    times = []
    for _ in range(request["calls"]):
        before = time.perf_counter_ns()
        session.run(None, feeds)
        times.append((time.perf_counter_ns() - before) / 1e6)
    _say({"phase": "run", "ms": times[0], "calls_ms": times})


def _say(message: dict[str, Any]) -> None:
    """One line, with the memory this process has now and had at most, bytes."""
    from rsi_deploy.runtime.machine import peak_memory, resident_memory

    sys.stdout.write(json.dumps(message | {"resident": resident_memory(), "peak": peak_memory()}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
