"""A whole run of `bench`: every configuration of the matrix and the separate measurements, in one document.

All configurations are open at once, so that the one with the widest intervals can be measured next. Those that differ
only in batch or shape share their sessions. The separate measurements follow in the first configuration, after the
other sessions are closed. Ctrl-C ends the run and keeps the measurements so far.
"""

import datetime
import importlib.metadata
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_deploy.benchmark import concurrency, processes
from rsi_deploy.benchmark.blocks import Cell, Progress, run_cells
from rsi_deploy.benchmark.latency import PARTIAL_BLOCKS, cell_result, check_targets
from rsi_deploy.benchmark.profiling import profile_models
from rsi_deploy.benchmark.request import BenchRequest, Setting
from rsi_deploy.benchmark.result import BenchDocument, BenchResult, VariantFile
from rsi_deploy.benchmark.variants import Runtime, make_feeds, open_variants
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.io.onnx_file import external_files
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.float16 import float16_file
from rsi_deploy.runtime.machine import environment, load_average
from rsi_deploy.runtime.pinning import pinned

WARM_SHARE = 0.3  # largest share of the time for the warm-up of all cells


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A configuration with open sessions and its cell."""

    setting: Setting
    runtime: Runtime
    feeds: Feeds
    specs: Sequence[InputSpec]
    batch: int
    models: Sequence[Path]
    cell: Cell


def run_bench(request: BenchRequest, *, command: str = "", progress: Progress | None = None) -> BenchDocument:
    """Measure everything in a request.

    Args:
        request: models, configurations and measurements.
        command: command line for the document.
        progress: function that is called with the current step and the share of the matrix's time that is over.

    Raises:
        UsageError: a request that cannot be measured, or models that cannot be compared.
        ModelError: a model cannot be loaded or run.
        KeyboardInterrupt: the user interrupted before anything was measured.
    """
    check_targets(request.budget or request.seconds, request.precision)
    settings = request.settings()
    machine = environment()
    files = tuple(variant_file(model, label) for model, label in zip(request.models, request.labels, strict=True))
    start = time.monotonic()
    notes: list[str] = []
    with ScratchFolder() as folder, pinned(request.pinned):
        opened = _opened(request, settings, Path(folder))
        cells, interrupted = _measured(request, opened, start, progress)
        first = opened[0]
        opened = []  # closes the other sessions before the separate measurements
        sections: dict[str, Any] = {}
        if not interrupted:
            with keep_on_interrupt(notes):
                for name, section in _separate(request, first):
                    sections[name] = section
                    if progress is not None:
                        progress(name.replace("_", " "), 1.0)
    if len(cells) < len(settings):
        notes.append(f"interrupted: {len(settings) - len(cells)} of {len(settings)} configurations were not measured")
    return bench_document(cells, sections, notes, command=command, environment=machine, arms=files)


def bench_document(
    cells: Sequence[BenchResult], sections: Mapping[str, Any], notes: Sequence[str], **facts: Any
) -> BenchDocument:
    """Return the document of a run that has just ended.

    Args:
        cells: results by configuration.
        sections: name of a field of the document -> separate measurements.
        notes: notes on the whole run.
        facts: `command`, `environment` and `arms` of the document.
    """
    notes = [*notes, *(f"{m.label} does not fit: {m.detail}" for m in sections.get("memory", ()) if m.fits is False)]
    return BenchDocument(
        tool=f"rsi-deploy {importlib.metadata.version('rsi-deploy')}",
        created=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        load_after=load_average(),
        cells=tuple(cells),
        **sections,
        **facts,
        notes=tuple(notes),
        partial=any("interrupted" in note for note in notes) or any(cell.partial for cell in cells),
    )


def variant_file(model: Path, label: str) -> VariantFile:
    """Describe the file of a model.

    Raises:
        ModelError: it is not an ONNX file.
    """
    import hashlib

    ort = model.suffix == ".ort"
    parts = [model] if ort else [model, *external_files(model)]
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return VariantFile(
        label=label,
        model=str(model),
        format="ort" if ort else "onnx",
        file_bytes=sum(part.stat().st_size for part in parts),
        sha256=digest.hexdigest(),
    )


def _opened(request: BenchRequest, settings: Sequence[Setting], folder: Path) -> list[Opened]:
    """Open every configuration; those with equal threads and precision share their sessions."""
    halves: tuple[Path, ...] = ()
    if "float16" in request.precisions:
        halves = tuple(float16_file(model, folder) for model in request.models)
    sessions: dict[tuple[object, ...], list[Any]] = {}
    found = []
    for setting in settings:
        models = request.models if setting.precision == "stored" else halves
        runtime = Runtime(provider=request.provider, threads=setting.threads, allow_fallback=request.allow_fallback)
        key = (setting.threads, setting.precision)
        if key not in sessions:
            sessions[key] = [runtime.session(model) for model in models]
        specs = model_inputs(sessions[key][0], str(models[0]))
        feeds, batch = make_feeds(
            specs, batch=setting.batch, seed=request.seed, given=request.feeds, shapes=setting.shapes or None
        )
        variants = open_variants(models, request.labels, sessions[key], feeds, runtime)
        for variant, model in zip(variants, request.models, strict=True):
            variant.model = str(model)  # not the temporary converted file
        found.append(
            Opened(
                setting=setting,
                runtime=runtime,
                feeds=feeds,
                specs=specs,
                batch=batch,
                models=models,
                cell=Cell(name=setting.name, variants=variants),
            )
        )
    return found


def _measured(
    request: BenchRequest, opened: Sequence[Opened], start: float, progress: Progress | None
) -> tuple[list[BenchResult], bool]:
    """Warm up and measure the matrix; also return whether the user interrupted."""
    total = request.share() if request.budget is not None else request.seconds * len(opened)
    warm = WARM_SHARE * total / sum(len(one.cell.variants) for one in opened)
    for one in opened:
        if progress is not None:
            progress(f"warming up, {one.cell.name}", 0.0)
        for variant in one.cell.variants:
            variant.warm_up(warm)
    if request.budget is not None:  # loading and warm-up are part of a budget
        total = max(total - (time.monotonic() - start), 0.1 * total)
    cells = [one.cell for one in opened]
    interrupted = run_cells(cells, seconds=total, precision=request.precision, seed=request.seed, progress=progress)
    kept = [one for one in opened if one.cell.blocks >= (PARTIAL_BLOCKS if interrupted else 1)]
    if not kept:
        raise KeyboardInterrupt
    results = [
        cell_result(
            one.cell,
            one.specs,
            one.feeds,
            one.runtime,
            batch=one.batch,
            seed=request.seed,
            precision=request.precision,
            interrupted=interrupted,
            pinned=request.pinned,
            stored=one.setting.precision,
        )
        for one in kept
    ]
    return results, interrupted


def _separate(request: BenchRequest, first: Opened) -> Iterator[tuple[str, Any]]:
    """Yield the separate measurements in the first configuration: the name of the document's field, and its value."""
    models, labels, feeds, runtime = first.models, request.labels, first.feeds, first.runtime
    seconds, seed = request.share(), request.seed
    if request.memory or request.memory_limit is not None:
        yield "memory", processes.measure_memory(models, labels, feeds, runtime, limit=request.memory_limit)
    if request.cold_start:
        yield "cold_start", processes.cold_starts(models, labels, feeds, runtime, seconds=seconds, seed=seed)
    if request.burst_gap is not None:
        yield (
            "bursts",
            concurrency.measure_bursts(
                models, labels, feeds, runtime, gap=request.burst_gap, seconds=seconds, seed=seed
            ),
        )
    if request.streams:
        yield (
            "streams",
            concurrency.measure_streams(
                models, labels, feeds, runtime, counts=request.streams, batch=first.batch, seconds=seconds, seed=seed
            ),
        )
    if request.throughput:
        yield "throughput", _throughput(request, first)
    if request.profile:
        yield "profile", profile_models(models, labels, feeds, runtime)


def _throughput(request: BenchRequest, first: Opened) -> Any:
    def feeds_of(batch: int) -> Feeds:
        shapes = {name: (batch, *shape[1:]) for name, shape in first.setting.shapes.items()}
        return make_feeds(first.specs, batch=batch, seed=request.seed, given=request.feeds, shapes=shapes or None)[0]

    try:
        feeds_of(1)
        start = 1
    except UsageError:  # the batch is fixed
        start = first.batch
    return concurrency.measure_throughput(
        first.models,
        request.labels,
        first.runtime,
        feeds_of=feeds_of,
        start=start,
        seconds=request.share(),
        seed=request.seed,
    )


@contextmanager
def keep_on_interrupt(notes: list[str]) -> Iterator[None]:
    """Keep earlier measurements if the user interrupts a separate one."""
    try:
        yield
    except KeyboardInterrupt:
        notes.append("interrupted: some separate measurements are missing")
