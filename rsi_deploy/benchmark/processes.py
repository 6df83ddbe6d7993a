"""What needs a process of its own: cold start, resident memory, and whether a model fits under a memory ceiling.

The ceiling is on *resident* memory and is watched from outside, every 2 ms; where the system keeps a process's largest
resident set (Linux: VmHWM) no spike between two looks is missed. A limit on address space (RLIMIT_AS) would refuse
models that fit: onnxruntime reserves gigabytes that it never touches.
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
from rsi_deploy.benchmark.statistics import compare, median_interval, verdict
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
FIRST = "the arm that the others are compared with"


@dataclass(kw_only=True)
class Told:
    """What a worker said, by phase, and what was seen of it.

    Attributes:
        phases: phase -> its message.
        spawned_ns: `time.monotonic_ns` before it was started.
        error: its own words, or how it ended.
        kind: name of the error's class.
        peak: largest resident set seen, bytes.
        over: it was ended for passing the ceiling.
    """

    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    spawned_ns: int = 0
    error: str = ""
    kind: str = ""
    peak: int = 0
    over: bool = False

    @property
    def stopped_in(self) -> Phase:
        """The phase that did not end."""
        return _AFTER[list(self.phases)[-1] if self.phases else ""]


def cold_starts(
    models: Sequence[Path], labels: Sequence[str], feeds: Feeds, runtime: Runtime, *, seconds: float, seed: int
) -> tuple[ColdStart, ...]:
    """Start processes for about `seconds`, 8 to 30 an arm, the arms in shuffled order.

    Raises:
        UsageError, ModelError: what a worker could not do.
    """
    rng = np.random.default_rng([seed, *b"cold"])
    taken: list[list[list[float]]] = []
    end = time.monotonic() + seconds
    with _requests(models, feeds, runtime, calls=1) as requests:
        run_worker(requests[0])  # puts Python and onnxruntime into the page cache
        while len(taken) < MIN_STARTS or (len(taken) < MAX_STARTS and time.monotonic() < end):
            found = {int(index): _start(requests[index], models[index]) for index in rng.permutation(len(models))}
            taken.append([found[index] for index in range(len(models))])
    times = np.asarray(taken)  # (starts, arms, phases) ms
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
    """Resident memory of each arm, after import, after loading, and at most during ten calls.

    Args:
        models: files.
        labels: one a model.
        feeds: input name -> array.
        runtime: where they run.
        limit: ceiling in bytes: a process that passes it is ended, and said not to fit.

    Raises:
        UsageError, ModelError: what a worker without a ceiling could not do.
    """
    with _requests(models, feeds, runtime, calls=MEMORY_CALLS) as requests:
        told = [run_worker(request, limit) for request in requests]
    for one, model in zip(told, models, strict=True):
        if one.error and limit is None:
            _raise(one, model)
    return tuple(_memory(one, label, limit) for one, label in zip(told, labels, strict=True))


def run_worker(request: Path, limit: int | None = None) -> Told:
    """One worker to its end, or to the ceiling."""
    told = Told(spawned_ns=time.monotonic_ns())
    command = [sys.executable, "-m", "rsi_deploy.benchmark.worker", str(request)]
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        watch = threading.Thread(target=_watch, args=(process, told, limit), daemon=True)
        watch.start()
        try:
            _listen(process, told)
            process.wait()
        except BaseException:
            process.kill()
            raise
        watch.join()
        stderr.seek(0)
        last = (stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    if not told.error and told.stopped_in != "done":
        told.error = "ended for passing the ceiling" if told.over else f"ended with {process.returncode}: {last}"
    if limit is not None and told.peak > limit:
        told.over = True
    return told


def _listen(process: "subprocess.Popen[str]", told: Told) -> None:
    for line in process.stdout or ():
        message = json.loads(line)
        told.peak = max(told.peak, message["peak"])
        if "error" in message:
            told.error, told.kind = message["error"], message["kind"]
        else:
            told.phases[message["phase"]] = message


def _watch(process: "subprocess.Popen[str]", told: Told, limit: int | None) -> None:
    """Look at the resident set until the process ends; end it above the ceiling."""
    try:
        seen = psutil.Process(process.pid)
        while limit is not None and process.poll() is None:
            told.peak = max(told.peak, seen.memory_info().rss, peak_memory(process.pid))
            if told.peak > limit:
                told.over = True
                process.kill()
                return
            time.sleep(_POLL)
    except psutil.Error:  # it has ended
        return


def _start(request: Path, model: Path) -> list[float]:
    """Process, import, load and first inference of one start, ms."""
    told = run_worker(request)
    if told.error:
        _raise(told, model)
    begun = (told.phases["import"]["started_ns"] - told.spawned_ns) / 1e6
    return [begun, *(told.phases[phase]["ms"] for phase in ("import", "load", "run"))]


def _memory(told: Told, label: str, limit: int | None) -> Memory:
    phases = told.phases
    return Memory(
        label=label,
        import_bytes=phases["import"]["resident"] if "import" in phases else None,
        loaded_bytes=phases["load"]["resident"] if "load" in phases else None,
        peak_bytes=told.peak,
        limit_bytes=limit,
        fits=None if limit is None else not told.over and not told.error,
        stopped_in=told.stopped_in,
        median_ms=float(np.median(phases["run"]["calls_ms"])) if "run" in phases and not told.over else None,
        detail=told.error,
    )


def _raise(told: Told, model: Path) -> None:
    kind: type[errors.RsiDeployError] = getattr(errors, told.kind, ModelError)
    raise kind(told.error if str(model) in told.error else f"{model}: {told.error}")


@contextmanager
def _requests(models: Sequence[Path], feeds: Feeds, runtime: Runtime, calls: int) -> Iterator[list[Path]]:
    """One request file a model, for as long as they are needed; the models are checked here and not there."""
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
