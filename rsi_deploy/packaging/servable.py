"""The model of a bundle for an engine: its inputs and outputs, and whether requests may share a run.

bundle --check the manifest--> model.onnx --onnxruntime--> names, types, shapes
|---- samples are independent, proved on the graph and
tested: several in one run equal each alone ----> may be batched
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.io.manifest import check_manifest
from rsi_deploy.report.bundle_facts import BundleFacts, read_bundle_facts
from rsi_deploy.runtime.batch_independence import no_batch_axis, why_not_batchable, why_not_batchable_on, why_not_proved
from rsi_deploy.runtime.feeds.batch_axes import Dim
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.probe import probe_feeds
from rsi_deploy.runtime.feeds.user_feeds import check_feeds, read_feeds
from rsi_deploy.runtime.feeds.values import Value
from rsi_deploy.runtime.sessions import make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SAMPLES = 3  # samples in the run that tests their independence: an odd number, which no kernel prefers


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output of a model.

    Attributes:
        name: its name.
        type: onnxruntime's name of the element type (`float`), or of the type of other values (`seq(tensor(float))`).
        shape: dimensions: numbers, names (dynamic) or None (dynamic and unnamed).
        ranked: whether the model has the number of dimensions; otherwise it is that of a run.
    """

    name: str
    type: str
    shape: tuple[Dim, ...]
    ranked: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.type} ({', '.join('?' if dim is None else str(dim) for dim in self.shape)})"


@dataclass(frozen=True, kw_only=True)
class Servable:
    """The model of a bundle and what an engine must know of it.

    Attributes:
        model: its file.
        facts: fields of the bundle's report.
        inputs, outputs: inputs and outputs in the model's order.
        feeds: inputs on which the model was run.
        feeds_given: whether the user gave them.
        unbatchable: reason why samples must not share a run, or "".
        notes: what a reader must know.
    """

    model: Path
    facts: BundleFacts
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    feeds: Feeds
    feeds_given: bool
    unbatchable: str
    notes: tuple[str, ...]


def read_servable(folder: str | Path, feeds: str | Path | Mapping[str, npt.NDArray[Any]] | None = None) -> Servable:
    """Check the bundle in `folder` and run its model.

    Args:
        folder: a bundle.
        feeds: inputs to run it on, an `.npz` or name -> array; None makes the probe inputs of the report.

    Raises:
        UsageError: `folder` is no bundle, or the feeds do not fit, or the model needs feeds.
        GateError: a file does not match the manifest.
        ModelError: the model cannot be run.
    """
    folder = Path(folder)
    facts, check = read_bundle_facts(folder), check_manifest(folder)
    if not check.ok:
        raise GateError(
            f"{folder} is not the bundle that was written: {check.summary}; export again, or fetch it again"
        )
    model = folder / "model.onnx"
    session = make_session(model)
    arrays = _feeds(model, facts, feeds)
    try:
        values = run_session(session, arrays, str(model))
    except ModelError as error:
        if feeds is None:
            raise UsageError(f"{error}; random inputs may be invalid for the model: add --feeds FILE.npz") from error
        raise
    inputs, outputs = tensors(session, values)
    return Servable(
        model=model,
        facts=facts,
        inputs=inputs,
        outputs=outputs,
        feeds=arrays,
        feeds_given=feeds is not None,
        unbatchable=_why_unbatchable(model, session, arrays, from_user=feeds is not None),
        notes=() if check.present else (f"the bundle has {check.summary}",),
    )


def read_dense(path: Path, compressed: Servable) -> Servable:
    """Return the dense model at `path`, to serve next to the compressed one.

    Raises:
        UsageError: its inputs or outputs differ from the compressed model's.
        ModelError: it cannot be run.
    """
    session = make_session(path)
    _check_same("takes", path, compressed.inputs, tuple(map(_tensor, session.get_inputs())))
    inputs, outputs = tensors(session, run_session(session, compressed.feeds, str(path)))
    _check_same("gives", path, compressed.outputs, outputs)
    why = _why_unbatchable(path, session, compressed.feeds, from_user=compressed.feeds_given)
    return replace(compressed, model=path, inputs=inputs, outputs=outputs, unbatchable=why, notes=())


def tensors(session: "InferenceSession", values: Sequence[Value]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the inputs and outputs that onnxruntime has inferred.

    Args:
        session: session of the model.
        values: outputs of a run, for the rank of outputs without one (onnxruntime reports () as for a scalar).
    """
    outputs = []
    for tensor, value in zip(map(_tensor, session.get_outputs()), values, strict=True):
        unranked = isinstance(value, np.ndarray) and value.ndim > 0 and not tensor.shape
        outputs.append(replace(tensor, shape=(None,) * value.ndim, ranked=False) if unranked else tensor)
    return tuple(map(_tensor, session.get_inputs())), tuple(outputs)


def _check_same(what: str, path: Path, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Check that the dense model has the inputs or outputs of the bundle's model."""
    if [_fixed(tensor) for tensor in ours] != [_fixed(tensor) for tensor in theirs]:
        listed = [", ".join(map(str, tensors_)) for tensors_ in (theirs, ours)]
        raise UsageError(
            f"--dense {path} {what} {listed[0]}, the bundle's model {listed[1]}; "
            "choose the model from which the bundle was made"
        )


def _fixed(tensor: Tensor) -> tuple[str, str, list[int]]:
    """Return what must be equal: dynamic dimensions may have other names."""
    return tensor.name, tensor.type, [dim if isinstance(dim, int) else -1 for dim in tensor.shape]


def _tensor(value: Any) -> Tensor:
    is_tensor = value.type.startswith("tensor(")
    return Tensor(
        name=value.name,
        type=value.type.removeprefix("tensor(").removesuffix(")") if is_tensor else value.type,
        shape=tuple(dim if isinstance(dim, int | str) else None for dim in value.shape),
    )


def _feeds(model: Path, facts: BundleFacts, feeds: str | Path | Mapping[str, npt.NDArray[Any]] | None) -> Feeds:
    if feeds is None:
        return probe_feeds(model, facts.settings.seed, facts.probe_shapes)
    arrays = read_feeds(feeds) if isinstance(feeds, str | Path) else dict(feeds)
    check_feeds(model_inputs(model), arrays, str(model))
    return arrays


def _why_unbatchable(model: Path, session: "InferenceSession", feeds: Feeds, *, from_user: bool) -> str:
    """Return why samples must not share a run, by proof and by a run on `feeds` or on inputs of their shapes; or ""."""
    shapes = {name: array.shape for name, array in feeds.items()}
    if not from_user:
        return why_not_batchable(model, session, shapes, SAMPLES)
    if why := no_batch_axis(session) or why_not_proved(model):
        return why
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(counts) > 1 or min(counts, default=0) < 2:
        return "one sample does not show whether samples are independent: add --feeds FILE.npz with two or more"
    return why_not_batchable_on(model, session, feeds)
