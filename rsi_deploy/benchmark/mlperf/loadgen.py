"""Test one model with MLPerf LoadGen, the load generator of the MLPerf benchmarks, and report its VALID or INVALID.

    SingleStream   one query after the other                     90th percentile of the latency
    MultiStream    eight samples a query, one after the other    99th percentile of a query's latency
    Server         queries at random (Poisson) times             samples a second, within a latency
    Offline        all samples at once                           samples a second

The test runs in a separate process with its logs in a temporary folder. VALID means that the run was long enough for
its percentile and met its constraints; a submission to MLPerf requires far more. For SingleStream the same calls are
also timed by this tool, so that the two 90th percentiles can be compared.
"""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from rsi_deploy.benchmark.mlperf.worker import FEEDS, STREAMS, LoadGenRequest, Reply, Scenario
from rsi_deploy.core import errors
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.runtime.provider_spec import parse_provider

SCENARIOS: tuple[Scenario, ...] = ("SingleStream", "MultiStream", "Server", "Offline")
SUMMARY = "mlperf_log_summary.txt"
_ENOUGH = {"99": 1000, "99.9": 10000}  # queries that a percentile needs, so that ten lie beyond it
_NEUTRAL = ("Processed ", "Would discard ", "Early stopping ")  # messages that valid runs have, too
_RATES = ("QPS w/o loadgen overhead", "Completed samples per second", "Samples per second")


class LoadGenResult(BaseModel, frozen=True, extra="forbid"):
    """The result of one LoadGen test.

    Attributes:
        model: path of the file.
        scenario: one of `SCENARIOS`.
        valid: verdict of LoadGen.
        reasons: messages of LoadGen about unsatisfied constraints, with its recommendations; () for a valid run.
        headline: main figure of the scenario, such as "90.0th percentile latency: 3.161 ms".
        latency_ms: "min", "mean", "max" and percentiles ("50" ... "99.9", with enough queries) of the latency of a
            query; empty for Offline, where it would be the time of the whole test.
        per_second: samples per second.
        queries: number of queries; None if LoadGen does not report it.
        own_p90_ms: 90th percentile of the same calls by this tool's clock, for SingleStream only.
        batch: samples per call.
        call_ms: median time of a call before the test.
        target_qps: target of Server in queries per second; for Offline the rate that sized its query.
        target_latency_ms: latency target of Server.
        inputs: input name -> dtype and shape, the same in every query.
        provider: full name of the provider that ran the model.
        provider_nodes: as in `Placement`.
        how: binding of inputs and outputs.
        seconds: requested shortest duration.
        loadgen: version of LoadGen.
        summary: full summary of LoadGen.
    """

    model: str
    scenario: Scenario
    valid: bool
    reasons: tuple[str, ...]
    headline: str
    latency_ms: dict[str, float]
    per_second: float | None
    queries: int | None
    own_p90_ms: float | None
    batch: int
    call_ms: float
    target_qps: float | None
    target_latency_ms: float | None
    inputs: dict[str, str]
    provider: str
    provider_nodes: dict[str, int]
    how: str
    seconds: float
    loadgen: str
    summary: str


def run_loadgen(
    model: str | Path,
    scenario: Scenario,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    batch: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
    feeds: Mapping[str, npt.NDArray[Any]] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    target_qps: float | None = None,
    target_latency_ms: float | None = None,
    allow_fallback: bool = False,
) -> LoadGenResult:
    """Test a model with LoadGen in a separate process.

    Args:
        model: ONNX file.
        scenario: one of `SCENARIOS`.
        provider: short or full name of an execution provider, with options.
        threads: threads inside one operator; None for onnxruntime's default.
        batch: samples per call; above 1 for MultiStream and Offline only.
        seconds: shortest duration; a scenario that needs more queries takes up to four times as long.
        seed: random seed for inputs and LoadGen's schedule.
        feeds: input name -> array, in place of random inputs.
        input_shape: see `random_feeds`.
        target_qps: queries per second for Server; None for half of the rate of consecutive calls.
        target_latency_ms: latency that 99 % of Server's queries must meet; None for ten times the time of a call, and
            at least 10 ms.
        allow_fallback: as in `proven_placement`.

    Raises:
        UsageError: LoadGen is not installed, or the request is invalid.
        ModelError: the model cannot be loaded or run, or the test process crashed.
    """
    check_loadgen(scenario, batch, seconds, target_qps, target_latency_ms)
    parse_provider(provider)  # raises before the process starts
    with ScratchFolder() as folder:
        if feeds is not None:
            np.savez(Path(folder) / FEEDS, *feeds.values())
        request = LoadGenRequest(
            model=str(model),
            scenario=scenario,
            folder=folder,
            provider=provider,
            threads=threads,
            batch=batch,
            seconds=seconds,
            seed=seed,
            input_shape=None if input_shape is None else {name: tuple(shape) for name, shape in input_shape.items()},
            feeds=None if feeds is None else tuple(feeds),
            target_qps=target_qps,
            target_latency_ms=target_latency_ms,
            allow_fallback=allow_fallback,
        )
        reply = _worked(request, Path(folder))
        summary = (Path(folder) / SUMMARY).read_text(encoding="utf-8")
    return LoadGenResult(
        model=request.model,
        scenario=scenario,
        **parse_summary(summary),
        **reply.model_dump(exclude={"error", "error_kind"}),
        seconds=seconds,
        loadgen=importlib.metadata.version("mlcommons-loadgen"),
        summary=summary,
    )


def check_loadgen(
    scenario: str,
    batch: int,
    seconds: float,
    target_qps: float | None = None,
    target_latency_ms: float | None = None,
) -> None:
    """Check the arguments of `run_loadgen`.

    Raises:
        UsageError: LoadGen is not installed, or the request is invalid.
    """
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise UsageError("MLPerf LoadGen is not installed: pip install 'rsi-deploy[loadgen]'")
    if scenario not in SCENARIOS:
        raise UsageError(f"--loadgen takes {', '.join(SCENARIOS)}, but got {scenario!r}")
    if batch > 1 and scenario in ("SingleStream", "Server"):
        raise UsageError(f"a query of {scenario} is one sample: take --batch 1, or MultiStream or Offline, not {batch}")
    if scenario == "MultiStream" and STREAMS % batch:
        raise UsageError(f"a MultiStream query is {STREAMS} samples: --batch must divide it, but got {batch}")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be a positive number, but got {seconds}")
    for name, value in (("target-qps", target_qps), ("target-latency", target_latency_ms)):
        if value is None:
            continue
        if scenario != "Server":
            raise UsageError(f"--{name} is for the Server scenario; {scenario} has no such target")
        if value <= 0:
            raise UsageError(f"--{name} must be above 0, but got {value}")


def parse_summary(text: str) -> dict[str, Any]:
    r"""Parse the fields of a `LoadGenResult` in LoadGen's summary.

    >>> found = parse_summary("Scenario : Offline\nSamples per second: 320.0\nResult is : VALID\n")
    >>> found["valid"], found["per_second"], found["headline"]
    (True, 320.0, 'Samples per second: 320')

    Raises:
        ModelError: it has no verdict, because the test did not finish.
    """
    verdict = re.search(r"^Result is\s*:\s*(\w+)", text, re.MULTILINE)
    if verdict is None:
        raise ModelError("LoadGen wrote no verdict: the test did not finish; give it more --seconds")
    head, _, rest = text.partition(verdict.group(0))
    offline = "Scenario : Offline" in head
    queries = re.search(r"(?:Processed at least|Only processed|Processed).*?(\d+) queries(?: \((\d+)\))?", rest)
    count = int(queries.group(2) or queries.group(1)) if queries else None
    rates = [float(found.group(1)) for rate in _RATES if (found := re.search(rf"^{rate}\s*:\s*([\d.]+)", text, re.M))]
    latencies = {} if offline else _latencies(rest, count)
    if not rates and latencies:  # MultiStream reports none
        rates = [STREAMS * 1e3 / latencies["mean"]]
    return {
        "valid": verdict.group(1) == "VALID",
        "reasons": () if verdict.group(1) == "VALID" else _reasons(rest),
        "headline": _headline(head),
        "latency_ms": latencies,
        "per_second": rates[0] if rates else None,
        "queries": count,
    }


def _latencies(text: str, queries: int | None) -> dict[str, float]:
    """Parse lines such as "90.00 percentile latency (ns)   : 3161434" and "Min latency (ns) : 3020645" into ms."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(Min|Mean|Max|[\d.]+ percentile) latency \(ns\)\s*:\s*(\d+)", text, re.M):
        key = f"{float(name.split()[0]):g}" if "percentile" in name else name.lower()
        if queries is None or queries >= _ENOUGH.get(key, 0):
            found[key] = int(value) / 1e6
    return found


def _reasons(text: str) -> tuple[str, ...]:
    """Return the unsatisfied constraints, and the sentences under Recommendations and Early Stopping Result."""
    part = text.partition("=====")[0]
    failed = [line.strip() for line in part.splitlines() if re.search(r"satisfied\s*:\s*NO", line)]
    starred = [" ".join(entry.split()) for entry in re.findall(r"^ \* ((?:.*\n)(?: (?!\*).*\n)*)", part, re.M)]
    return (*failed, *(entry for entry in starred if not entry.startswith(_NEUTRAL)))


def _headline(head: str) -> str:
    """Return the line before the verdict, with times in ms."""
    name, _, value = head.strip().splitlines()[-1].partition(":")
    if "(ns)" in name:
        return f"{name.replace('(ns)', '').strip()}: {int(value) / 1e6:.4g} ms"
    return f"{name.strip()}: {float(value):.4g}"


def _worked(request: LoadGenRequest, folder: Path) -> Reply:
    """Run the worker and read its reply."""
    request_file, reply_file = folder / "request.json", folder / "reply.json"
    request_file.write_text(request.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "rsi_deploy.benchmark.mlperf.worker", str(request_file), str(reply_file)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if not reply_file.exists():
        last = (process.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ModelError(
            f"{request.model}: the process of the LoadGen test ended with {process.returncode}: {last}"
            f"; check that bench without --loadgen runs it"
        )
    reply = Reply.model_validate_json(reply_file.read_text(encoding="utf-8"))
    if reply.error:
        kind: type[errors.RsiDeployError] = getattr(errors, reply.error_kind, ModelError)
        raise kind(reply.error)
    return reply
