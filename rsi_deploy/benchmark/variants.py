"""Variants: models that are ready to be timed, with sessions, bound inputs, compared outputs and warm caches.

The variants of one configuration get the same inputs, and must have outputs of the same names, types and shapes. Every
configuration is warmed separately, because a new input shape means new memory plans and, on devices, a new search for
algorithms.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.benchmark.statistics import SHORT_MS, Floats, calls_per_visit, is_settled
from rsi_deploy.benchmark.timing import time_calls
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.runtime.binding import Bound, bind
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.feeds.user_feeds import check_feeds, user_feeds
from rsi_deploy.runtime.feeds.values import describe_array
from rsi_deploy.runtime.placement import Placement, proven_placement
from rsi_deploy.runtime.sessions import effective_options, make_session, model_label, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Feeds = dict[str, npt.NDArray[Any]]
WARM_CALLS = 1000  # largest number of calls before the first block


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The provider and settings of sessions, the same for all variants.

    Attributes:
        provider: execution provider with its options, as on the command line.
        threads: threads inside one operator; None for onnxruntime's default.
        allow_fallback: allow nodes to run on other providers than the requested one.
        checked: as in `make_session`.
    """

    provider: str = "cpu"
    threads: int | None = None
    allow_fallback: bool = False
    checked: bool = False

    def session(self, model: Path) -> "InferenceSession":
        """Create a session whose workers stop spinning after a run, because they would slow the next variant down."""
        return make_session(
            model,
            self.provider,
            self.threads,
            spin_between_runs=False,
            allow_fallback=self.allow_fallback,
            checked=self.checked,
        )

    def placement(self, model: Path, feeds: Feeds) -> Placement:
        """Return which provider ran which node; raise an error if the requested provider did not run the model."""
        return proven_placement(model, self.provider, feeds, self.threads, self.allow_fallback)

    def bound(self, session: "InferenceSession", feeds: Feeds) -> Bound:
        """Bind the inputs of a session."""
        return bind(session, feeds, self.provider)


@dataclass(kw_only=True)
class Variant:
    """A model during its measurement; `visits` holds the timed calls of each block in ms."""

    label: str
    model: str
    call: Callable[[], object]
    placement: Placement
    settings: dict[str, str] = field(default_factory=dict)
    how: str = ""
    warmup_calls: int = 0
    call_ms: float = 0.0
    warm: bool = False
    visits: list[Floats] = field(default_factory=list)

    def visit(self) -> Floats:
        """Run an untimed call if calls are short, then the timed ones, and return their times in ms."""
        if self.call_ms < SHORT_MS:
            self.call()  # warms caches and workers after another variant
        return time_calls(self.call, calls_per_visit(self.call_ms)) / 1e6

    def warm_up(self, seconds: float) -> None:
        """Call at least 3 times and until the times settle, for at most `seconds`."""
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < 3 or (not is_settled(times) and len(times) < WARM_CALLS and time.monotonic() < end):
            times.append(float(time_calls(self.call, 1)[0]) / 1e6)
        self.warmup_calls = len(times) + 1
        self.call_ms = float(np.median(times[-5:]))
        self.warm = is_settled(times)


def open_variants(
    models: Sequence[Path],
    labels: Sequence[str],
    sessions: Sequence["InferenceSession"],
    feeds: Feeds,
    runtime: Runtime,
    *,
    prove: bool = True,
) -> list[Variant]:
    """Bind the inputs in every session, and compare the outputs with those of the first.

    Args:
        models: files of the models.
        labels: one label per model.
        sessions: one session per model.
        feeds: input name -> array.
        runtime: settings of the sessions.
        prove: run each model under the profiler to record which provider runs its nodes.

    Raises:
        UsageError: inputs or outputs differ between the variants, or the requested provider did not run a model.
        ModelError: a model cannot be run.
    """
    variants: list[Variant] = []
    outputs: dict[str, str] = {}
    for model, label, session in zip(models, labels, sessions, strict=True):
        check_feeds(model_inputs(session, model_label(model)), feeds, model_label(model))
        _try(session, feeds, model_label(model))  # reports a failing model before any timing
        placement = runtime.placement(model, feeds) if prove else Placement(provider_nodes={}, memcpy_nodes=0, nodes={})
        bound = runtime.bound(session, feeds)
        given = _described(session, bound)
        outputs = outputs or given
        if given != outputs:
            raise UsageError(
                f"{model_label(model)} gives {_listed(given)}, but {model_label(models[0])} gives {_listed(outputs)}: "
                f"models must compute the same outputs to be compared"
            )
        settings = effective_options(session, runtime.provider)
        variants.append(
            Variant(
                label=label, model=str(model), call=bound.call, placement=placement, settings=settings, how=bound.how
            )
        )
    return variants


def _try(session: "InferenceSession", feeds: Feeds, name: str) -> None:
    try:
        run_session(session, feeds, name)
    except ModelError as error:
        raise ModelError(f"{error}: pass --input-shape or --feeds") from error


def make_feeds(
    specs: Sequence[InputSpec],
    *,
    batch: int,
    seed: int,
    given: Mapping[str, npt.NDArray[Any]] | None,
    shapes: Mapping[str, Sequence[int]] | None,
) -> tuple[Feeds, int]:
    """Return the inputs of every variant and their batch: random inputs, or the first samples of `given`.

    Args:
        specs: inputs of the first model.
        batch: number of samples; 0 takes the `given` arrays whole, as does a model with a fixed batch.
        seed: random seed of the inputs.
        given: input name -> array; None for random inputs.
        shapes: see `random_feeds`.

    Raises:
        UsageError: fewer samples than the batch, or shapes that do not fit.
    """
    if given is None:
        return random_feeds(specs, batch, seed, shapes), batch
    feeds, axes = user_feeds(specs, given, "the model"), BatchAxes.of({spec.name: spec.shape for spec in specs})
    rows = axes.samples(feeds)
    if not batch or batch == rows or axes.fixed is not None:
        return feeds, rows
    if batch > rows:
        raise UsageError(f"batch {batch} needs as many samples of data, but got {rows}")
    return axes.cut(feeds, slice(0, batch)), batch


def variant_labels(models: Sequence[str | Path], labels: Sequence[str] | None) -> list[str]:
    """Return distinct labels of the variants: `labels`, the stems of the files, or their paths.

    Raises:
        UsageError: there are no models, or not one distinct label for each.
    """
    if not models:
        raise UsageError("bench needs at least one ONNX file")
    if labels is None:
        stems = [Path(model).stem for model in models]
        names = stems if len(set(stems)) == len(stems) else [str(model) for model in models]
        earlier = [names[:i].count(name) for i, name in enumerate(names)]
        return [f"{name} ({n + 1})" if n else name for name, n in zip(names, earlier, strict=True)]
    if len(labels) != len(models):
        raise UsageError(f"labels must be one for each of the {len(models)} models, but got {list(labels)}")
    if len(set(labels)) != len(labels):
        raise UsageError(f"labels must differ from each other, but got {list(labels)}")
    return list(labels)


def short_names(models: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of the models without their common folders, all different.

    >>> short_names(["out/a/model.onnx", "out/b/model.onnx"])
    ('a/model.onnx', 'b/model.onnx')
    >>> short_names(["out/dense.onnx"])
    ('dense.onnx',)
    """
    if len(set(models)) < len(models):
        return tuple(variant_labels(models, None))
    parts = [Path(model).parts for model in models]
    folders = zip(*(part[:-1] for part in parts), strict=False)
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, folders)))
    return tuple(str(Path(*part[shared:])) for part in parts)


def _described(session: Any, bound: Bound) -> dict[str, str]:
    """Return output name -> dtype and shape."""
    arrays = bound.outputs()
    if not arrays:  # outputs that are not tensors have a name and a type only
        return {output.name: output.type for output in session.get_outputs()}
    return {
        output.name: describe_array(array) if isinstance(array, np.ndarray) else output.type
        for output, array in zip(session.get_outputs(), arrays, strict=True)
    }


def _listed(outputs: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {kind}" for name, kind in outputs.items())
