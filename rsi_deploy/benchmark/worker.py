"""Run one model in its own process and report each phase: `python -m rsi_deploy.benchmark.worker REQUEST.json`.

Every phase ends with one JSON line on stdout, so that the results of earlier phases survive if the process is killed:

    import    numpy and onnxruntime are imported
    load      the session is created
    run       the calls are finished

A request with a prompt is about a model of onnxruntime-genai; its calls are the tokens of one generation.

Only the standard library is imported before the first reading of the clock. Other modules of this package are imported
between the phases, outside of their times.
"""

import json
import os
import sys
import time
from typing import Any

STARTED_NS = time.monotonic_ns()


def main(path: str) -> None:
    """Run the request at `path`, which `processes` writes."""
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    try:
        (_generation if "prompt" in request else _phases)(request)
    except Exception as error:  # the parent raises or records it
        _report({"error": str(error) or type(error).__name__, "kind": type(error).__name__})
    sys.stdout.flush()
    os._exit(0)  # skips freeing the memory, which is not measured


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
        checked=True,  # the parent has checked the files
    )
    import rsi_deploy.runtime.machine  # noqa: F401

    _report({"phase": "import", "ms": spent / 1e6, "started_ns": STARTED_NS})
    before = time.perf_counter_ns()
    session = runtime.session(Path(request["model"]))
    _report({"phase": "load", "ms": (time.perf_counter_ns() - before) / 1e6})
    times = []
    for _ in range(request["calls"]):
        before = time.perf_counter_ns()
        session.run(None, feeds)
        times.append((time.perf_counter_ns() - before) / 1e6)
    _report({"phase": "run", "ms": times[0], "calls_ms": times})


def _generation(request: dict[str, Any]) -> None:
    before = time.perf_counter_ns()
    import numpy as np

    from rsi_deploy.benchmark.generation.genai import GenaiFolder, genai_library

    genai_library()
    _report({"phase": "import", "ms": (time.perf_counter_ns() - before) / 1e6, "started_ns": STARTED_NS})
    before = time.perf_counter_ns()
    model = GenaiFolder.read(request["folder"]).load(request["threads"])
    _report({"phase": "load", "ms": (time.perf_counter_ns() - before) / 1e6})
    times = model.generate(np.asarray(request["prompt"], np.int32), request["generate"]).tolist()
    _report({"phase": "run", "ms": times[0], "calls_ms": times})


def _report(message: dict[str, Any]) -> None:
    """Write one line, with the current and the largest memory of this process in bytes."""
    from rsi_deploy.runtime.machine import peak_memory, resident_memory

    sys.stdout.write(json.dumps(message | {"resident": resident_memory(), "peak": peak_memory()}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
