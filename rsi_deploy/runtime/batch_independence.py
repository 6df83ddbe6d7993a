"""Whether the samples of a batch are independent, so that several requests may share a run.

    proof    on the graph: no operator mixes samples along the first axis (graph_passes.batch_axis)
    run      several samples in one run == each of them alone, within rounding
    run      a sample answers the same beside larger, smaller and other samples

Both the proof and the runs must hold. The proof covers every input; the runs cover what the runtime does.
A server that joins requests of several clients (`serve`), and packages whose engine does so (`package`), ask here.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from graph_passes.batch_axis import find_batch_axes, prove
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.onnx_reader import read_graph
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs, random_feeds
from rsi_deploy.runtime.sessions import run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = npt.NDArray[Any]

OPEN_SIZE = 16
"""Size of a dynamic dimension that is not known."""
TOLERANCE = {2: 5e-3, 4: 1e-4, 8: 1e-6}
"""Item size of a floating output -> how far a sample may move in a batch, as a share of its largest value."""
MAGNITUDES = (1e3, 1e-3)
"""What the other samples of a batch are multiplied by while the first one stays as it is."""


def samples_in(model: str | Path | ModelProto, feeds: Mapping[str, Array]) -> int:
    """Return how many samples these inputs of a model hold: the size of its batch axis; 1 for a model without one.

    Args:
        model: an ONNX file, or the same parsed (`read_graph`).
        feeds: input name -> array.

    Raises:
        ModelError: the model cannot be read.
    """
    shapes = {name: getattr(array, "shape", ()) for name, array in feeds.items()}
    graph = model if isinstance(model, ModelProto) else read_graph(model)
    axes = find_batch_axes(graph, shapes)
    return next((shapes[name][axis] for name, axis in axes.items() if axis is not None), 1)


def why_not_proved(model: str | Path) -> str:
    """Which operator of a model mixes samples along the first axis of its inputs; "" where it is proved that none does.

    Raises:
        ModelError: the model cannot be read.
    """
    proto = read_graph(model)
    proof = prove(proto, {spec.name: 0 for spec in model_inputs(proto)})
    if not proof.holds:
        return f"samples are not proved independent: {proof.reason}"
    for name, place in proof.outputs.items():
        if place is None or place.axis or not place.plain:
            return f"output {name} has its samples not one by one along its first axis"
    return ""


def why_alone(model: str | Path, session: "InferenceSession", known: Mapping[str, Sequence[int]], count: int) -> str:
    """Why samples of a model must not share a run, proved and tried with random ones; "" where they may.

    Args:
        model: its file.
        session: of the model; it runs each sample, and all of them.
        known: input name -> a whole shape that it runs on, whatever its first size.
        count: number of samples, 2 or more.
    """
    if why := no_batch_axis(session) or why_not_proved(model):
        return why
    specs = model_inputs(session)
    try:
        samples = random_feeds(specs, count, 1, _shapes(specs, known, count))
        others = random_feeds(specs, count, 2, _shapes(specs, known, count))
    except UsageError as error:
        return f"samples to try a batch with cannot be made up: {error}"[:300]
    return why_runs_differ(session, samples, others)


def why_alone_on(model: str | Path, session: "InferenceSession", samples: Mapping[str, Array]) -> str:
    """As `why_alone`, tried with samples that are given.

    Args:
        model: its file.
        session: of the model; it runs each sample, and all of them.
        samples: input name -> `(n, ...)`, with `n` of 2 or more, no two samples alike.
    """
    if why := no_batch_axis(session) or why_not_proved(model):
        return why
    return why_runs_differ(session, samples, {name: array[::-1] for name, array in samples.items()})


def no_batch_axis(session: "InferenceSession") -> str:
    """Which input or output has a first axis that is no batch by its size, or none at all; "" where all may be."""
    for what, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for value in values:
            if not value.shape or isinstance(value.shape[0], int):
                dims = ", ".join("?" if dim is None else str(dim) for dim in value.shape)
                return f"{what} {value.name} ({dims}) has no dynamic first dimension"
    return ""


def _shapes(specs: Sequence[InputSpec], known: Mapping[str, Sequence[int]], count: int) -> dict[str, tuple[int, ...]]:
    """Whole shapes of `count` samples."""
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


def _neighbours(samples: Mapping[str, Array], others: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """The same batch with the first sample as it was, and all others larger, smaller, and of other whole numbers."""
    for magnitude in MAGNITUDES:
        batch = {}
        for name, array in samples.items():
            scaled = array * np.asarray(magnitude, array.dtype) if array.dtype.kind == "f" else others[name]
            batch[name] = np.concatenate([array[:1], scaled[1:]])
        yield batch


def why_runs_differ(session: "InferenceSession", samples: Mapping[str, Array], others: Mapping[str, Array]) -> str:
    """How samples answer otherwise in a batch than alone, or beside others; "" where they do not.

    Args:
        session: the model; it runs each sample, and all of them.
        samples: input name -> `(n, ...)`, with `n` of 2 or more, no two samples alike.
        others: whole numbers and booleans to put beside the first sample, of the same shapes.
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
        return f"it does not run on these samples, so that a batch cannot be tried: {error}"[:300]
    for place, (value, whole) in enumerate(zip(session.get_outputs(), together, strict=True)):
        if not isinstance(whole, np.ndarray):
            return f"output {value.name} is no tensor"
        if whole.ndim == 0 or len(whole) != count:
            return f"output {value.name} has shape {whole.shape} for {count} samples"
        apart = all(_same(parts[place], whole[at : at + 1]) for at, parts in enumerate(alone))
        if not apart or not all(_same(whole[:1], batch[place][:1]) for batch in beside):
            return f"rows of output {value.name} depend on the other rows of their batch"
    return ""


def _same(alone: Array, together: Array) -> bool:
    """Whether a sample `(1, ...)` is the same in both runs."""
    if alone.shape != together.shape:
        return False
    if alone.dtype.kind != "f":
        return bool((alone == together).all())
    finite = np.abs(alone[np.isfinite(alone)].astype(np.float64))
    atol = TOLERANCE[alone.itemsize] * float(finite.max(initial=0.0)) + 1e-12
    return bool(np.allclose(together.astype(np.float64), alone.astype(np.float64), rtol=0, atol=atol, equal_nan=True))
