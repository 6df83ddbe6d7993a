"""Measure the latency of models side by side, in one process and in shuffled blocks, with intervals and verdicts.

variants.py    sessions, bound inputs, compared outputs, warm-up
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
from rsi_deploy.benchmark.result import BenchResult as BenchResult
from rsi_deploy.benchmark.result import Precision, Stopped
from rsi_deploy.benchmark.result import VariantResult as VariantResult
from rsi_deploy.benchmark.statistics import (
    ENOUGH_BLOCKS,
    FIRST,
    MIN_BLOCKS,
    compare,
    median_interval,
    quantiles,
    seconds_needed,
    stalling,
    supported_percentiles,
    verdict,
)
from rsi_deploy.benchmark.variants import Runtime, Variant, make_feeds, open_variants, variant_labels
from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime import providers
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.values import describe_array
from rsi_deploy.runtime.sessions import numeric_notes

PRECISION = 0.02  # relative half width of the intervals at which measuring ends early
PARTIAL_BLOCKS = 5  # an interrupted cell with fewer blocks is dropped

METHOD = (
    "models interleaved in shuffled blocks in one process, {how}; onnxruntime's workers stop spinning after a run, so "
    "that they do not slow the next model down; garbage collector off; clock time.perf_counter_ns; bootstrap over "
    "paired blocks, runs of neighbours together: 99 % intervals for speedups, 95 % for medians; a difference is "
    "claimed if the whole interval is beyond 1 %"
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
    """Measure the latency of models on equal inputs, and compare the others with the first.

    Args:
        models: ONNX files, or files in onnxruntime's own format (`.ort`).
        batch: batch size of the random inputs, if the first axis is dynamic.
        provider: short or full name of an execution provider, with options.
        threads: threads inside one operator; None for onnxruntime's default.
        seconds: time for the blocks, which end earlier if every interval is narrow enough. Loading and warm-up take
            additional time; warm-up at most half of `seconds`.
        seed: random seed for the inputs, the block order and the bootstrap.
        feeds: input name -> array, in place of random inputs; their first axis is the batch.
        input_shape: see `random_feeds`.
        labels: labels of the models; None for the file names.
        precision: relative half width of intervals that are narrow enough.
        allow_fallback: allow nodes to run on other providers than the requested one.

    Raises:
        UsageError: no models, different inputs or outputs, or a provider that ran nothing.
        ModelError: a model cannot be loaded or run.
        KeyboardInterrupt: the user interrupted before 5 blocks; after that, the result is partial.
    """
    names = variant_labels(models, labels)
    check_targets(seconds, precision)
    runtime = Runtime(provider=provider, threads=threads, allow_fallback=allow_fallback)
    files = [Path(model) for model in models]
    sessions = [runtime.session(model) for model in files]
    specs = model_inputs(sessions[0], str(files[0]))
    fed, batch = make_feeds(specs, batch=0 if feeds else batch, seed=seed, given=feeds or None, shapes=input_shape)
    variants = open_variants(files, names, sessions, fed, runtime)
    for variant in variants:
        variant.warm_up(seconds / (2 * len(variants)))
    cell = Cell(name=f"batch {batch}", variants=variants)
    interrupted = run_cells([cell], seconds=seconds, precision=precision, seed=seed)
    if interrupted and cell.blocks < PARTIAL_BLOCKS:
        raise KeyboardInterrupt
    return cell_result(cell, specs, fed, runtime, batch=batch, seed=seed, precision=precision, interrupted=interrupted)


def check_targets(seconds: float, precision: float) -> None:
    """Check a time and a precision.

    Raises:
        UsageError: one of them is out of range.
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
    """Return the result of a measured cell."""
    import onnxruntime

    stopped = reason_of_end(cell, interrupted=interrupted)
    provider = providers.resolve_provider(runtime.provider)
    return BenchResult(
        arms=tuple(variant_result(cell, index, seed) for index in range(len(cell.variants))),
        provider=provider,
        provider_options=cell.variants[0].settings,
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
        method=METHOD.format(how=cell.variants[0].how),
        notes=tuple(_notes(cell, specs, batch, provider, stopped, precision)),
    )


def variant_result(cell: Cell, index: int, seed: int) -> VariantResult:
    """Return the times of one variant of a measured cell, compared with those of the first."""
    variant, blocks = cell.variants[index], cell.medians()
    times = np.concatenate(variant.visits[: cell.blocks])
    median, ends = median_interval(blocks[index], seed)
    speedup, speedup_ends, words = None, None, FIRST
    if index:
        speedup, speedup_ends = compare(blocks[0], blocks[index], seed)
        words = verdict(speedup, speedup_ends, cell.blocks)
    return VariantResult(
        label=variant.label,
        model=variant.model,
        n=len(times),
        blocks=cell.blocks,
        median_ms=median,
        median_interval_ms=ends,
        percentiles_ms=supported_percentiles(times),
        quantiles_ms=quantiles(times),
        warmup_calls=variant.warmup_calls,
        warm=variant.warm,
        provider_nodes=variant.placement.provider_nodes,
        memcpy_nodes=variant.placement.memcpy_nodes,
        speedup=speedup,
        speedup_interval=speedup_ends,
        verdict=words,
    )


def reason_of_end(cell: Cell, *, interrupted: bool) -> Stopped:
    """Return why the measurement of a cell ended."""
    return "precise" if cell.precise else "interrupted" if interrupted else "time"


def _notes(
    cell: Cell, specs: Sequence[InputSpec], batch: int, provider: str, stopped: Stopped, precision: float
) -> list[str]:
    notes = time_notes(cell, stopped, precision) + numeric_notes(cell.variants[0].settings, provider)
    firsts = [spec.shape[0] for spec in specs if spec.shape]
    if firsts and all(isinstance(dim, int) and dim != batch for dim in firsts):
        notes.append("the batch is fixed in the model; see the shapes of the inputs")
    for variant in cell.variants:
        notes += variant_notes(variant)
        elsewhere = sum(count for name, count in variant.placement.provider_nodes.items() if name != provider)
        if elsewhere:
            notes.append(f"{variant.label}: {elsewhere} nodes ran on other providers than {provider}")
    return notes


def time_notes(cell: Cell, stopped: Stopped, precision: float) -> list[str]:
    """Return notes on a cell that was interrupted, or had too little time."""
    notes = []
    if stopped == "interrupted":
        notes.append("interrupted: the result holds the blocks until then")
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
    return notes


def variant_notes(variant: Variant) -> list[str]:
    """Return notes on times that had not settled, and on calls that wait."""
    notes = []
    if not variant.warm:
        notes.append(f"{variant.label}: times had not settled after {variant.warmup_calls} warm-up calls")
    if (waits := stalling(np.concatenate(variant.visits))) is not None:
        notes.append(
            f"{variant.label}: half of its calls take at least {waits:.1f} times as long as the fastest: they wait for "
            f"cores that others use, or its threads for each other; use a quieter machine or fewer threads"
        )
    return notes


def _time(seconds: float) -> str:
    """Format an estimated time with two digits.

    >>> [_time(s) for s in (0.042, 4.2, 80, 4000)]
    ['0.042 s', '4.2 s', '80 s', '67 min']
    """
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.2g} s"
