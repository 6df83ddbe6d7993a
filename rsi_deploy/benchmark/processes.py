"""Measurements in separate processes: cold start, resident memory, and whether a model fits under a memory limit.

The limit is on *resident* memory and is checked from outside every 2 ms. Where the system records the peak resident
set of a process (Linux: VmHWM), no spike between two checks is missed. A limit on address space (RLIMIT_AS) would
refuse models that fit, because onnxruntime reserves gigabytes that it never uses.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from rsi_deploy.benchmark.sections import ColdStart, Memory, Phase
from rsi_deploy.benchmark.statistics import FIRST, compare, median_interval, verdict
from rsi_deploy.benchmark.variants import Runtime
from rsi_deploy.core import errors
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.types import Feeds
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.io.onnx_reader import check_file
from rsi_deploy.runtime.machine import peak_memory

MIN_STARTS, MAX_STARTS = 8, 30
MEMORY_CALLS = 10
_POLL = 0.002
_AFTER: dict[str, Phase] = {"": "import", "import": "load", "load": "run", "run": "done"}


@dataclass(kw_only=True)
class WorkerRun:
    """The messages of one worker process, and observations of it.

    Attributes:
        phases: phase -> message of the worker.
        spawned_ns: `time.monotonic_ns` before the start.
        error: message of the worker's error, or how the process ended.
        kind: class name of the error.
        peak: largest observed resident set in bytes.
        over: whether the memory exceeded the limit.
    """

    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    spawned_ns: int = 0
    error: str = ""
    kind: str = ""
    peak: int = 0
    over: bool = False

    @property
    def stopped_in(self) -> Phase:
        """The phase that did not finish."""
        return _AFTER[list(self.phases)[-1] if self.phases else ""]


def cold_starts(
    models: Sequence[Path], labels: Sequence[str], feeds: Feeds, runtime: Runtime, *, seconds: float, seed: int
) -> tuple[ColdStart, ...]:
    """Measure cold starts for about `seconds`, with 8 to 30 processes per model, interleaved in shuffled order.

    Raises:
        UsageError, ModelError: a worker failed.
    """
    rng = np.random.default_rng([seed, *b"cold"])
    taken: list[list[list[float]]] = []
    end = time.monotonic() + seconds
    with _requests(models, feeds, runtime, calls=1) as requests:
        run_worker(requests[0])  # puts Python and onnxruntime into the page cache
        while len(taken) < MIN_STARTS or (len(taken) < MAX_STARTS and time.monotonic() < end):
            found = {int(index): _start(requests[index], models[index]) for index in rng.permutation(len(models))}
            taken.append([found[index] for index in range(len(models))])
    times = np.asarray(taken)  # (starts, variants, phases) ms
    totals = times.sum(axis=2).T
    results = []
    for index, label in enumerate(labels):
        total, ends = median_interval(totals[index], seed)
        words = FIRST
        if index:
            words = verdict(*compare(totals[0], totals[index], seed), len(taken))
        process, imported, load, first = (float(value) for value in np.median(times[:, index], axis=0))
        results.append(
            ColdStart(
                label=label,
                repeats=len(taken),
                process_ms=process,
                import_ms=imported,
                load_ms=load,
                first_ms=first,
                total_ms=total,
                total_interval_ms=ends,
                verdict=words,
            )
        )
    return tuple(results)


def measure_memory(
    models: Sequence[Path], labels: Sequence[str], feeds: Feeds, runtime: Runtime, *, limit: int | None = None
) -> tuple[Memory, ...]:
    """Measure the resident memory of each model after import, after loading, and the peak during ten calls.

    Args:
        models: files of the models.
        labels: one label per model.
        feeds: input name -> array.
        runtime: provider and threads.
        limit: memory limit in bytes. A process that exceeds it is killed, and the model does not fit.

    Raises:
        UsageError, ModelError: a worker without a limit failed.
    """
    with _requests(models, feeds, runtime, calls=MEMORY_CALLS) as requests:
        return memory_of(requests, models, labels, limit)


def generation_memory(
    folders: Sequence[Path],
    labels: Sequence[str],
    prompt: Sequence[int],
    generate: int,
    threads: int | None,
    *,
    limit: int | None = None,
) -> tuple[Memory, ...]:
    """Measure the resident memory of each model of onnxruntime-genai, with the peak during one generation.

    Args:
        folders: folders of the models.
        labels: one label per model.
        prompt: token ids.
        generate: number of tokens to generate.
        threads: threads inside one operator; None for the folder's.
        limit: as in `measure_memory`.

    Raises:
        UsageError, ModelError: a worker without a limit failed.
    """
    same = {"prompt": list(prompt), "generate": generate, "threads": threads}
    with ScratchFolder() as scratch:
        requests = [Path(scratch) / f"{index}.json" for index in range(len(folders))]
        for request, folder in zip(requests, folders, strict=True):
            request.write_text(json.dumps({"folder": str(folder), **same}), encoding="utf-8")
        return memory_of(requests, folders, labels, limit)


def memory_of(
    requests: Sequence[Path], models: Sequence[Path], labels: Sequence[str], limit: int | None
) -> tuple[Memory, ...]:
    """Run one worker for each request, and return what memory it takes.

    Raises:
        UsageError, ModelError: a worker without a limit failed.
    """
    run = [run_worker(request, limit) for request in requests]
    for one, model in zip(run, models, strict=True):
        if one.error and limit is None:
            _raise(one, model)
    return tuple(_memory(one, label, limit) for one, label in zip(run, labels, strict=True))


def run_worker(request: Path, limit: int | None = None) -> WorkerRun:
    """Run one worker until it ends or exceeds the memory limit."""
    run = WorkerRun(spawned_ns=time.monotonic_ns())
    command = [sys.executable, "-m", "rsi_deploy.benchmark.worker", str(request)]
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        watch = threading.Thread(target=_watch, args=(process, run, limit), daemon=True)
        watch.start()
        try:
            _listen(process, run)
            process.wait()
        except BaseException:
            process.kill()
            raise
        watch.join()
        stderr.seek(0)
        last = (stderr.read().decode(errors="replace").strip().splitlines() or ["it wrote nothing"])[-1]
    if not run.error and run.stopped_in != "done":
        run.error = "killed above the memory limit" if run.over else f"ended with {process.returncode}: {last}"
    if limit is not None and run.peak > limit:
        run.over = True
    return run


def _listen(process: "subprocess.Popen[str]", run: WorkerRun) -> None:
    for line in process.stdout or ():
        message = json.loads(line)
        run.peak = max(run.peak, message["peak"])
        if "error" in message:
            run.error, run.kind = message["error"], message["kind"]
        else:
            run.phases[message["phase"]] = message


def _watch(process: "subprocess.Popen[str]", run: WorkerRun, limit: int | None) -> None:
    """Check the resident set until the process ends, and kill it above the limit."""
    try:
        seen = psutil.Process(process.pid)
        while limit is not None and process.poll() is None:
            run.peak = max(run.peak, seen.memory_info().rss, peak_memory(process.pid))
            if run.peak > limit:
                run.over = True
                process.kill()
                return
            time.sleep(_POLL)
    except psutil.Error:  # it has ended
        return


def _start(request: Path, model: Path) -> list[float]:
    """Return the times of process start, import, load and first inference in ms."""
    run = run_worker(request)
    if run.error:
        _raise(run, model)
    begun = (run.phases["import"]["started_ns"] - run.spawned_ns) / 1e6
    return [begun, *(run.phases[phase]["ms"] for phase in ("import", "load", "run"))]


def _memory(run: WorkerRun, label: str, limit: int | None) -> Memory:
    phases = run.phases
    return Memory(
        label=label,
        import_bytes=phases["import"]["resident"] if "import" in phases else None,
        loaded_bytes=phases["load"]["resident"] if "load" in phases else None,
        peak_bytes=run.peak,
        limit_bytes=limit,
        fits=None if limit is None else not run.over and not run.error,
        stopped_in=run.stopped_in,
        median_ms=float(np.median(phases["run"]["calls_ms"])) if "run" in phases and not run.over else None,
        detail=run.error,
    )


def _raise(run: WorkerRun, model: Path) -> None:
    kind: type[errors.RsiDeployError] = getattr(errors, run.kind, ModelError)
    raise kind(run.error if str(model) in run.error else f"{model}: {run.error}")


@contextmanager
def _requests(models: Sequence[Path], feeds: Feeds, runtime: Runtime, calls: int) -> Iterator[list[Path]]:
    """Check the models, and write one temporary request file per model."""
    for model in models:
        if model.suffix != ".ort":
            check_file(model)
    with ScratchFolder() as folder:
        stored = Path(folder) / "feeds.npz"
        np.savez(stored, *feeds.values())
        paths = []
        for index, model in enumerate(models):
            path = Path(folder) / f"{index}.json"
            request = {
                "model": str(model),
                "feeds": str(stored),
                "names": list(feeds),
                "provider": runtime.provider,
                "threads": runtime.threads,
                "allow_fallback": runtime.allow_fallback,
                "calls": calls,
            }
            path.write_text(json.dumps(request), encoding="utf-8")
            paths.append(path)
        yield paths
