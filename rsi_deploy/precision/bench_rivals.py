"""`bench --rivals`: the first model as onnxruntime's own tools quantize it, beside the other models."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_deploy.benchmark.result import BenchDocument
from rsi_deploy.benchmark.settings import BenchConfig
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import open_data
from rsi_deploy.data.text_data import TextOptions, with_text
from rsi_deploy.evaluation.sample_feeds import sample_batches
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.precision.quantizers import FeedsSource
from rsi_deploy.precision.rivals import Rival, make_rivals, rival_schemes
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.providers import short_name

BATCH, SAMPLES = 32, 512
"""Samples of a calibration batch, and most samples in all."""


@dataclass(frozen=True, kw_only=True)
class BenchRivals:
    """The rivals of a run.

    Attributes:
        made: rivals that onnxruntime has made and loaded.
        notes: for each of the others, its name and onnxruntime's error.
    """

    made: tuple[Rival, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in a temporary folder."""
        return tuple(rival.path for rival in self.made if rival.path is not None)

    @property
    def labels(self) -> tuple[str, ...]:
        """One label per file."""
        return tuple(rival.name for rival in self.made)

    def shown_in(self, document: BenchDocument) -> BenchDocument:
        """Return the document with the notes, and with names in place of temporary files."""
        names = {str(rival.path): rival.name for rival in self.made}

        def named(arms: Any) -> Any:
            return tuple(arm.model_copy(update={"model": names.get(arm.model, arm.model)}) for arm in arms)

        cells = tuple(cell.model_copy(update={"arms": named(cell.arms)}) for cell in document.cells)
        notes = (*document.notes, *self.notes)
        return document.model_copy(update={"arms": named(document.arms), "cells": cells, "notes": notes})


@contextmanager
def bench_rivals(model: Path, settings: BenchConfig, steps: Preprocessing | None) -> Iterator[BenchRivals]:
    """Make the rivals of a model in a temporary folder; none without `--rivals`.

    Raises:
        UsageError: calibration data that do not fit.
        ModelError: not an ONNX file.
    """
    if not settings.rivals:
        yield BenchRivals()
        return
    feeds = None if settings.calib is None else _calibration(settings, model, steps)
    operators = {node.op_type for node in read_proto(model).graph.node}
    schemes = rival_schemes(operators, short_name(parse_provider(settings.provider).name))
    with ScratchFolder() as folder:
        rivals = list(make_rivals(model, Path(folder), schemes, feeds, settings.provider))
        yield BenchRivals(
            made=tuple(rival for rival in rivals if not rival.error),
            notes=tuple(f"{rival.name} is left out: {rival.error}" for rival in rivals if rival.error),
        )


def check_rivals(model: Path, settings: BenchConfig) -> None:
    """Check the options before any work.

    Raises:
        UsageError: `--calib` without `--rivals`, gates, or a file in onnxruntime's own format.
    """
    if settings.calib is not None and not settings.rivals:
        raise UsageError("--calib calibrates onnxruntime's static int8 of --rivals; add --rivals, or leave it out")
    if not settings.rivals:
        return
    if model.suffix == ".ort":
        raise UsageError(
            f"--rivals quantizes the first model, but {model.name} has onnxruntime's own format",
            hint="put an .onnx file first",
        )
    if settings.max_slowdown is not None or settings.max_drop is not None:
        raise UsageError("--max-slowdown and --max-drop check every model of a run; leave out --rivals")


def _calibration(settings: BenchConfig, model: Path, steps: Preprocessing | None) -> FeedsSource:
    """Return a function that returns batches of the calibration data; data that do not fit are refused here."""
    data, provider = with_text(settings.calib, TextOptions.of(settings), model), settings.provider
    dataset = open_data(data, specs=model_inputs(model), labelled=False) if isinstance(data, str) else data

    def feeds() -> Iterator[Feeds]:
        return sample_batches(dataset, model, provider, BATCH, SAMPLES, preprocessing=steps, option="--calib")

    next(feeds())
    return feeds
