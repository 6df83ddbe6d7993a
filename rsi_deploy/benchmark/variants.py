"""Arms ready to be timed: sessions made, inputs bound, outputs held against each other, warmed up.

Arms of one configuration get the same inputs, and must give outputs of the same names, types and shapes: what
computes something else is not compared. Every configuration is warmed for itself: a new input shape means new memory
plans and, on devices, a new search for algorithms.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsi_deploy.benchmark.statistics import SHORT_MS, calls_per_visit, is_settled
from rsi_deploy.benchmark.timing import time_calls
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Array, Feeds, Floats
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

WARM_CALLS = 1000  # settled or not, no more calls than these before the first block


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how sessions run, the same for all arms.

    Attributes:
        provider: as it was typed, options included.
        threads: inside one operator; None is onnxruntime's default.
        allow_fallback: measure what runs, even where it is not the provider asked for.
        checked: as for `make_session`.
    """

    provider: str = "cpu"
    threads: int | None = None
    allow_fallback: bool = False
    checked: bool = False

    def session(self, model: Path) -> "InferenceSession":
        """A session whose workers stop spinning when a run ends, or they would take the cores from the next arm."""
        return make_session(
            model,
            self.provider,
            self.threads,
            spin_between_runs=False,
            allow_fallback=self.allow_fallback,
            checked=self.checked,
        )

    def placement(self, model: Path, feeds: Feeds) -> Placement:
        """Who ran what; refused where the provider did not do the work."""
        return proven_placement(model, self.provider, feeds, self.threads, self.allow_fallback)

    def bound(self, session: "InferenceSession", feeds: Feeds) -> Bound:
        """The session with the inputs bound."""
        return bind(session, feeds, self.provider)


@dataclass(kw_only=True)
class Arm:
    """An arm while it is measured; `visits` holds the timed calls of each block, ms."""

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
        """One turn: an untimed call where calls are short, then the timed ones, ms."""
        if self.call_ms < SHORT_MS:
            self.call()  # caches and workers come back from another arm
        return time_calls(self.call, calls_per_visit(self.call_ms)) / 1e6

    def warm_up(self, seconds: float) -> None:
        """Call until the times settle, at least 3 times and for at most `seconds`."""
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < 3 or (not is_settled(times) and len(times) < WARM_CALLS and time.monotonic() < end):
            times.append(float(time_calls(self.call, 1)[0]) / 1e6)
        self.warmup_calls = len(times) + 1
        self.call_ms = float(np.median(times[-5:]))
        self.warm = is_settled(times)


def open_arms(
    models: Sequence[Path],
    labels: Sequence[str],
    sessions: Sequence["InferenceSession"],
    feeds: Feeds,
    runtime: Runtime,
    *,
    prove: bool = True,
) -> list[Arm]:
    """Bind the inputs in every session and hold the outputs against those of the first.

    Args:
        models: files.
        labels: one a model.
        sessions: one a model.
        feeds: input name -> array.
        runtime: as the sessions were made with.
        prove: run each model under the profiler, to record and prove which provider runs its nodes.

    Raises:
        UsageError: inputs or outputs that differ between the arms, or a provider that did not do the work.
        ModelError: a model cannot be run.
    """
    arms: list[Arm] = []
    outputs: dict[str, str] = {}
    for model, label, session in zip(models, labels, sessions, strict=True):
        check_feeds(model_inputs(session, model_label(model)), feeds, model_label(model))
        _try(session, feeds, model_label(model))  # a failing model says so here, once
        placement = runtime.placement(model, feeds) if prove else Placement(provider_nodes={}, memcpy_nodes=0, nodes={})
        bound = runtime.bound(session, feeds)
        given = _described(session, bound)
        outputs = outputs or given
        if given != outputs:
            raise UsageError(
                f"{model_label(model)} gives {_listed(given)}, but {model_label(models[0])} gives {_listed(outputs)}: "
                f"arms must compute the same outputs"
            )
        settings = effective_options(session, runtime.provider)
        arms.append(
            Arm(label=label, model=str(model), call=bound.call, placement=placement, settings=settings, how=bound.how)
        )
    return arms


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
    given: Feeds | None,
    shapes: Mapping[str, Sequence[int]] | None,
) -> tuple[dict[str, Array], int]:
    """What every arm is fed, and its batch: random inputs, or the first rows of given ones.

    Args:
        specs: the inputs of the first arm.
        batch: samples; 0 with `given` arrays takes them whole, as does a model with a fixed first axis.
        seed: of random inputs.
        given: input name -> array.
        shapes: see `random_feeds`.

    Raises:
        UsageError: fewer rows than the batch, or shapes that do not fit.
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


def arm_labels(models: Sequence[str | Path], labels: Sequence[str] | None) -> list[str]:
    """Names of the arms, all different: those given, the files' stems, or their paths.

    Raises:
        UsageError: no models, or not one label for each.
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
    """The models as typed, without the folders that all of them share; all different.

    >>> short_names(["out/a/model.onnx", "out/b/model.onnx"])
    ('a/model.onnx', 'b/model.onnx')
    >>> short_names(["out/dense.onnx"])
    ('dense.onnx',)
    """
    if len(set(models)) < len(models):
        return tuple(arm_labels(models, None))
    parts = [Path(model).parts for model in models]
    folders = zip(*(part[:-1] for part in parts), strict=False)
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, folders)))
    return tuple(str(Path(*part[shared:])) for part in parts)


def _described(session: Any, bound: Bound) -> dict[str, str]:
    """Output name -> dtype and shape."""
    arrays = bound.outputs()
    if not arrays:  # outputs that are no tensors are known by name alone
        return {output.name: output.type for output in session.get_outputs()}
    return {
        output.name: describe_array(array) if isinstance(array, np.ndarray) else output.type
        for output, array in zip(session.get_outputs(), arrays, strict=True)
    }


def _listed(outputs: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {kind}" for name, kind in outputs.items())
