"""Whether samples that share a run mix: is the first axis a batch?

    several samples in one run == each of them alone?    within rounding, output by output, sample by sample

Names and sizes of dimensions say whether a batch fits in; that samples do not mix only a run shows. A time-major
recurrent net, a softmax over the batch or a quantizer that looks at the whole batch fail it. A server that joins
strangers' requests (`serve`), and a config that has an engine do so (`package`), ask here.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.measure.inputs import model_inputs, random_feeds
from rsi_deploy.measure.sessions import run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = npt.NDArray[Any]

OPEN_SIZE = 16
"""Of a dimension that is dynamic and whose size nothing tells."""
TOLERANCE = {2: 5e-3, 4: 1e-4, 8: 1e-6}
"""Item size of a floating output -> how far a sample may move in a batch, as a share of its largest value."""


def why_alone(session: "InferenceSession", known: Mapping[str, Sequence[int]], count: int) -> str:
    """Why samples of a model must not share a run, tried with random ones; "" where they may.

    Args:
        session: the model; it runs each sample, and all of them.
        known: input name -> a whole shape that it runs on, whatever its first size.
        count: of samples, 2 or more.
    """
    if why := no_batch_axis(session):
        return why
    specs = model_inputs(session)
    shapes = {}
    for spec in specs:
        told = known.get(spec.name, ())
        fits = len(told) == len(spec.shape)
        rest = (
            dim if isinstance(dim, int) else told[axis] if fits else OPEN_SIZE
            for axis, dim in enumerate(spec.shape)
            if axis
        )
        shapes[spec.name] = (count, *rest)
    try:
        samples = random_feeds(specs, count, 1, shapes)
    except UsageError as error:
        return f"samples to try a batch with cannot be made up: {str(error).partition(';')[0]}"[:300]
    return why_alone_on(session, samples)


def why_alone_on(session: "InferenceSession", samples: Mapping[str, Array]) -> str:
    """As `why_alone`, tried with samples that are given.

    Args:
        session: the model; it runs each sample, and all of them.
        samples: input name -> `(n, ...)`, with `n` of 2 or more, no two samples alike.
    """
    if why := no_batch_axis(session):
        return why
    count = len(next(iter(samples.values())))
    try:
        together = run_session(session, samples, "a batch")
        alone = [
            run_session(session, {name: array[at : at + 1] for name, array in samples.items()}, "a sample")
            for at in range(count)
        ]
    except ModelError as error:
        return f"it does not run on these samples, so that a batch cannot be tried: {error}"[:300]
    for place, (value, whole) in enumerate(zip(session.get_outputs(), together, strict=True)):
        if not isinstance(whole, np.ndarray):
            return f"output {value.name} is no tensor"
        if whole.ndim == 0 or len(whole) != count:
            return f"output {value.name} has shape {whole.shape} for {count} samples"
        if not all(_same(parts[place], whole[at : at + 1]) for at, parts in enumerate(alone)):
            return f"rows of output {value.name} depend on the other rows of their batch"
    return ""


def no_batch_axis(session: "InferenceSession") -> str:
    """Which input or output has a first axis that is no batch by its size, or none at all; "" where all may be."""
    for what, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for value in values:
            if not value.shape or isinstance(value.shape[0], int):
                dims = ", ".join("?" if dim is None else str(dim) for dim in value.shape)
                return f"{what} {value.name} ({dims}) has no dynamic first dimension"
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
