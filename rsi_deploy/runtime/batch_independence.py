"""Check whether the samples of a batch are independent, so that several requests may share a run.

    proof    on the graph: no operator mixes samples along the first axis (graph_passes.batch_axis)
    run      several samples in one run == each of them alone, within rounding
    run      a sample has the same result beside larger, smaller and other samples

Both the proof and the runs must succeed: the proof covers every input, the runs cover the runtime. `serve` checks this
before it batches requests of several clients, and `package` before it packages a model for a server that does so.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import ModelProto

from graph_passes.batch_axis import find_batch_axes, prove
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Array, Feeds, Shape
from rsi_deploy.io.onnx_reader import read_graph
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.sessions import run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

OPEN_SIZE = 16
"""Size for a dynamic dimension of unknown size."""
TOLERANCE = {2: 5e-3, 4: 1e-4, 8: 1e-6}
"""Item size of a floating output -> largest change of a sample in a batch, relative to its largest value."""
MAGNITUDES = (1e3, 1e-3)
"""Factors for the other samples of a batch while the first one stays as it is."""


def count_samples(model: str | Path | ModelProto, feeds: Feeds) -> int:
    """Return the number of samples in the inputs of a model, or 1 if it has no batch axis.

    Args:
        model: ONNX file, or the same as `read_graph` reads it.
        feeds: input name -> array.

    Raises:
        ModelError: The model cannot be read.
    """
    shapes = {name: getattr(array, "shape", ()) for name, array in feeds.items()}
    graph = model if isinstance(model, ModelProto) else read_graph(model)
    axes = find_batch_axes(graph, shapes)
    return next((shapes[name][axis] for name, axis in axes.items() if axis is not None), 1)


def why_not_proved(model: str | Path) -> str:
    """Return which operator mixes samples along the first axis of the inputs, or "" if provably none does.

    Raises:
        ModelError: The model cannot be read.
    """
    proto = read_graph(model)
    proof = prove(proto, {spec.name: 0 for spec in model_inputs(proto)})
    if not proof.holds:
        return f"samples are not proved independent: {proof.reason}"
    for name, place in proof.outputs.items():
        if place is None or place.axis or not place.plain:
            return f"output {name} does not have one sample after another along its first axis"
    return ""


def why_not_batchable(
    model: str | Path, session: "InferenceSession", known: Mapping[str, Sequence[int]], count: int
) -> str:
    """Return why samples must not share a run, by proof and by runs with random samples; "" if they may.

    Args:
        model: ONNX file.
        session: session of the model, which runs each sample and all of them.
        known: input name -> whole shape that works, with any batch size.
        count: number of samples, 2 or more.
    """
    if why := no_batch_axis(session) or why_not_proved(model):
        return why
    specs = model_inputs(session)
    try:
        samples = random_feeds(specs, count, 1, _shapes(specs, known, count))
        others = random_feeds(specs, count, 2, _shapes(specs, known, count))
    except UsageError as error:
        return f"samples for a test batch cannot be created: {error}"[:300]
    return why_runs_differ(session, samples, others)


def why_not_batchable_on(model: str | Path, session: "InferenceSession", samples: Feeds) -> str:
    """Return `why_not_batchable`, with the user's samples.

    Args:
        model: ONNX file.
        session: session of the model, which runs each sample and all of them.
        samples: input name -> `(n, ...)`, with `n` of 2 or more, no two samples alike.
    """
    if why := no_batch_axis(session) or why_not_proved(model):
        return why
    return why_runs_differ(session, samples, {name: array[::-1] for name, array in samples.items()})


def no_batch_axis(session: "InferenceSession") -> str:
    """Return which input or output has no dynamic first dimension, or "" if all have one."""
    for what, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for value in values:
            if not value.shape or isinstance(value.shape[0], int):
                dims = ", ".join("?" if dim is None else str(dim) for dim in value.shape)
                return f"{what} {value.name} ({dims}) has no dynamic first dimension"
    return ""


def _shapes(specs: Sequence[InputSpec], known: Mapping[str, Sequence[int]], count: int) -> dict[str, Shape]:
    """Return whole shapes of `count` samples."""
    shapes = {}
    for spec in specs:
        found = known.get(spec.name, ())
        fits = len(found) == len(spec.shape)
        rest = (
            dim if isinstance(dim, int) else found[axis] if fits else OPEN_SIZE
            for axis, dim in enumerate(spec.shape)
            if axis
        )
        shapes[spec.name] = (count, *rest)
    return shapes


def _neighbours(samples: Feeds, others: Feeds) -> Iterator[dict[str, Array]]:
    """Yield batches with the same first sample beside larger, smaller and other samples."""
    for magnitude in MAGNITUDES:
        batch = {}
        for name, array in samples.items():
            scaled = array * np.asarray(magnitude, array.dtype) if array.dtype.kind == "f" else others[name]
            batch[name] = np.concatenate([array[:1], scaled[1:]])
        yield batch


def why_runs_differ(session: "InferenceSession", samples: Feeds, others: Feeds) -> str:
    """Return which output of a sample depends on the batch around it, or "" if none does.

    Args:
        session: session of the model, which runs each sample and all of them.
        samples: input name -> `(n, ...)`, with `n` of 2 or more, no two samples alike.
        others: integers and booleans of the same shapes, to put beside the first sample.
    """
    count = len(next(iter(samples.values())))
    try:
        together = run_session(session, samples, "a batch")
        alone = [
            run_session(session, {name: array[at : at + 1] for name, array in samples.items()}, "a sample")
            for at in range(count)
        ]
        beside = [run_session(session, batch, "a batch") for batch in _neighbours(samples, others)]
    except ModelError as error:
        return f"the model does not run on these samples, so a batch cannot be tested: {error}"[:300]
    for place, (value, whole) in enumerate(zip(session.get_outputs(), together, strict=True)):
        if not isinstance(whole, np.ndarray):
            return f"output {value.name} is not a tensor"
        if whole.ndim == 0 or len(whole) != count:
            return f"output {value.name} has shape {whole.shape} for {count} samples"
        apart = all(_same(parts[place], whole[at : at + 1]) for at, parts in enumerate(alone))
        if not apart or not all(_same(whole[:1], batch[place][:1]) for batch in beside):
            return f"rows of output {value.name} depend on the other rows of their batch"
    return ""


def _same(alone: Array, together: Array) -> bool:
    """Return whether a sample `(1, ...)` has the same result in both runs."""
    if alone.shape != together.shape:
        return False
    if alone.dtype.kind != "f":
        return bool((alone == together).all())
    finite = np.abs(alone[np.isfinite(alone)].astype(np.float64))
    atol = TOLERANCE[alone.itemsize] * float(finite.max(initial=0.0)) + 1e-12
    return bool(np.allclose(together.astype(np.float64), alone.astype(np.float64), rtol=0, atol=atol, equal_nan=True))
