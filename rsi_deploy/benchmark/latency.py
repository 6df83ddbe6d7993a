"""Latency of models side by side: one process, shuffled blocks, intervals, and a verdict that may be "no".

arms.py        sessions, inputs bound, outputs held against each other, warmed up
blocks.py      the interleaved loop
statistics.py  intervals and verdicts
matrix.py      many configurations and the separate measurements, in one document
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.benchmark.blocks import Cell, run_cells
from rsi_deploy.benchmark.result import ArmResult as ArmResult
from rsi_deploy.benchmark.result import BenchResult as BenchResult
from rsi_deploy.benchmark.result import Precision, Stopped
from rsi_deploy.benchmark.statistics import (
    ENOUGH_BLOCKS,
    MIN_BLOCKS,
    compare,
    median_interval,
    quantiles,
    seconds_needed,
    stalling,
    supported_percentiles,
    verdict,
)
from rsi_deploy.benchmark.variants import Arm, Runtime, arm_labels, make_feeds, open_arms
from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime import providers
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.values import describe_array
from rsi_deploy.runtime.sessions import numeric_notes

PRECISION = 0.02  # relative half width of the intervals at which measuring ends early
PARTIAL_BLOCKS = 5  # an interrupted cell with fewer is not kept
FIRST = "the arm that the others are compared with"

METHOD = (
    "arms interleaved in shuffled blocks in one process, {how}; onnxruntime's workers stop spinning when a run ends, "
    "or they would take the cores from the next arm; garbage collector off; clock time.perf_counter_ns; bootstrap over "
    "paired blocks, runs of neighbours together: 99 % intervals for speedups, 95 % for medians; a difference is "
    "claimed where the whole interval is beyond 1 %"
)


def bench(
    models: Sequence[str | Path],
    *,
    batch: int = 1,
    provider: str = "cpu",
    threads: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    feeds: Mapping[str, npt.NDArray[Any]] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    labels: Sequence[str] | None = None,
    precision: float = PRECISION,
    allow_fallback: bool = False,
) -> BenchResult:
    """Measure the latency of models on equal inputs; the first is what the others are compared with.

    Args:
        models: ONNX files, or files in onnxruntime's own format (`.ort`).
        batch: size of the dynamic first dimension of the random inputs.
        provider: short or full name, with options; one that does not do the work is refused.
        threads: threads inside one operator; None leaves onnxruntime's default.
        seconds: time for the blocks; they end sooner once every interval is narrow enough. Warm-up may take half
            as long on top, and loading comes before it.
        seed: of the inputs, the block order and the bootstrap.
        feeds: input name -> array, in place of random inputs; the batch is then read from their first axis.
        input_shape: see `random_feeds`.
        labels: names of the arms; without it the file names.
        precision: relative half width of the intervals that is narrow enough.
        allow_fallback: measure what runs, even where it is not the provider asked for.

    Raises:
        UsageError: nothing to measure, inputs or outputs that differ between arms, or a provider that ran nothing.
        ModelError: a model cannot be loaded or run.
        KeyboardInterrupt: again, where fewer than 5 blocks were measured; with more, the result is partial.
    """
    names = arm_labels(models, labels)
    check_targets(seconds, precision)
    runtime = Runtime(provider=provider, threads=threads, allow_fallback=allow_fallback)
    files = [Path(model) for model in models]
    sessions = [runtime.session(model) for model in files]
    specs = model_inputs(sessions[0], str(files[0]))
    fed, batch = make_feeds(specs, batch=0 if feeds else batch, seed=seed, given=feeds or None, shapes=input_shape)
    arms = open_arms(files, names, sessions, fed, runtime)
    for arm in arms:
        arm.warm_up(seconds / (2 * len(arms)))
    cell = Cell(name=f"batch {batch}", arms=arms)
    interrupted = run_cells([cell], seconds=seconds, precision=precision, seed=seed)
    if interrupted and cell.blocks < PARTIAL_BLOCKS:
        raise KeyboardInterrupt
    return cell_result(cell, specs, fed, runtime, batch=batch, seed=seed, precision=precision, interrupted=interrupted)


def check_targets(seconds: float, precision: float) -> None:
    """Refuse a time or a precision that cannot be.

    Raises:
        UsageError: says what came.
    """
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be a positive number, but got {seconds}")
    if not 0 < precision < 1:
        raise UsageError(f"precision must be between 0 % and 100 %, but got {100 * precision:g} %")


def cell_result(
    cell: Cell,
    specs: Sequence[InputSpec],
    feeds: Mapping[str, npt.NDArray[Any]],
    runtime: Runtime,
    *,
    batch: int,
    seed: int,
    precision: float,
    interrupted: bool,
    pinned: tuple[int, ...] = (),
    stored: Precision = "stored",
) -> BenchResult:
    """What a measured cell shows."""
    import onnxruntime

    stopped: Stopped = "precise" if cell.precise else "interrupted" if interrupted else "time"
    provider = providers.resolve_provider(runtime.provider)
    return BenchResult(
        arms=tuple(_summary(cell, index, seed) for index in range(len(cell.arms))),
        provider=provider,
        provider_options=cell.arms[0].settings,
        threads=runtime.threads,
        pinned=pinned,
        batch=batch,
        inputs={name: describe_array(array) for name, array in feeds.items()},
        precision=stored,
        seed=seed,
        seconds=cell.seconds,
        stopped=stopped,
        asked_precision=precision,
        reached_precision=cell.width if np.isfinite(cell.width) else None,
        partial=stopped == "interrupted" or cell.blocks < MIN_BLOCKS,
        onnxruntime=onnxruntime.__version__,
        method=METHOD.format(how=cell.arms[0].how),
        notes=tuple(_notes(cell, specs, batch, provider, stopped, precision)),
    )


def _summary(cell: Cell, index: int, seed: int) -> ArmResult:
    arm, blocks = cell.arms[index], cell.medians()
    times = np.concatenate(arm.visits[: cell.blocks])
    median, ends = median_interval(blocks[index], seed)
    speedup, speedup_ends, words = None, None, FIRST
    if index:
        speedup, speedup_ends = compare(blocks[0], blocks[index], seed)
        words = verdict(speedup, speedup_ends, cell.blocks)
    return ArmResult(
        label=arm.label,
        model=arm.model,
        n=len(times),
        blocks=cell.blocks,
        median_ms=median,
        median_interval_ms=ends,
        percentiles_ms=supported_percentiles(times),
        quantiles_ms=quantiles(times),
        warmup_calls=arm.warmup_calls,
        warm=arm.warm,
        provider_nodes=arm.placement.provider_nodes,
        memcpy_nodes=arm.placement.memcpy_nodes,
        speedup=speedup,
        speedup_interval=speedup_ends,
        verdict=words,
    )


def _notes(
    cell: Cell, specs: Sequence[InputSpec], batch: int, provider: str, stopped: Stopped, precision: float
) -> list[str]:
    notes = []
    if stopped == "interrupted":
        notes.append("interrupted: what was measured until then")
    if cell.blocks < ENOUGH_BLOCKS:
        enough = cell.seconds * ENOUGH_BLOCKS / cell.blocks
        notes.append(
            f"only {cell.blocks} blocks: the intervals are rough; {ENOUGH_BLOCKS} take about {_time(enough)}, "
            f"it got {_time(cell.seconds)}"
        )
    elif stopped == "time" and cell.width > precision:
        needed = seconds_needed(cell.seconds, cell.width, precision)
        notes.append(
            f"the precision of {100 * precision:g} % was not reached: the widest interval is "
            f"+-{100 * cell.width:.1f} %; it would take about {_time(needed)}, it got {_time(cell.seconds)}"
        )
    notes += numeric_notes(cell.arms[0].settings, provider)
    firsts = [spec.shape[0] for spec in specs if spec.shape]
    if firsts and all(isinstance(dim, int) and dim != batch for dim in firsts):
        notes.append("the batch is fixed in the model: read it from the inputs' shapes")
    for arm in cell.arms:
        notes += _arm_notes(arm, provider)
    return notes


def _arm_notes(arm: Arm, provider: str) -> list[str]:
    notes = []
    if not arm.warm:
        notes.append(f"{arm.label}: times had not settled after {arm.warmup_calls} warm-up calls")
    if (waits := stalling(np.concatenate(arm.visits))) is not None:
        notes.append(
            f"{arm.label}: half of its calls take {waits:.1f} times what the fastest do or more: they wait for cores "
            f"that others hold, or its threads for each other; a quieter machine or fewer threads may tell more"
        )
    elsewhere = sum(count for name, count in arm.placement.provider_nodes.items() if name != provider)
    if elsewhere:
        notes.append(f"{arm.label}: {elsewhere} nodes ran on other providers than {provider}")
    return notes


def _time(seconds: float) -> str:
    """Rounded to what an estimate is worth.

    >>> [_time(s) for s in (0.042, 4.2, 80, 4000)]
    ['0.042 s', '4.2 s', '80 s', '67 min']
    """
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.2g} s"
