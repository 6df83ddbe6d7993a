"""What a bundle offers to an engine: its model, the tensors it takes and gives, and whether samples may share a run.

    bundle --manifest holds?--> model.onnx --onnxruntime--> names, types, shapes
                                     |---- samples proved independent on the graph, and
                                           several samples in one run == each alone? ----> may be batched

An engine that batches puts strangers' requests into one run. Names of dimensions say whether a batch fits in; that
samples do not mix is proved on the graph, and tried here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.io.manifest import check_manifest
from rsi_deploy.report.schema import Report, read_report
from rsi_deploy.runtime.batch_independence import no_batch_axis, why_not_batchable, why_not_batchable_on, why_not_proved
from rsi_deploy.runtime.feeds.batch_axes import Dim
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.probe import Feeds, probe_feeds
from rsi_deploy.runtime.feeds.user_feeds import check_feeds, read_feeds
from rsi_deploy.runtime.feeds.values import Value
from rsi_deploy.runtime.sessions import make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SAMPLES = 3  # in the run that shows whether samples mix: an odd number, no kernel's favourite


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output: its name, its type in onnxruntime's words, and its dimensions.

    Attributes:
        type: of a tensor that of its elements (`float`, `int64`, `string`); else the whole type (`seq(tensor(float))`).
        shape: each a number, a symbol (dynamic, named) or None (dynamic).
        ranked: whether onnxruntime itself knows how many dimensions there are; where not, a run has told.
    """

    name: str
    type: str
    shape: tuple[Dim, ...]
    ranked: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.type} ({', '.join('?' if dim is None else str(dim) for dim in self.shape)})"


@dataclass(frozen=True, kw_only=True)
class Servable:
    """A bundle's model as an engine sees it.

    Attributes:
        model: its file.
        report: of the bundle.
        inputs, outputs: in the model's order.
        feeds: inputs that the model runs on.
        feeds_given: whether the user gave them.
        unbatchable: why samples must not share a run; "" where they may.
        notes: what a reader must know.
    """

    model: Path
    report: Report
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    feeds: Feeds
    feeds_given: bool
    unbatchable: str
    notes: tuple[str, ...]


def read_servable(folder: str | Path, feeds: str | Path | Mapping[str, npt.NDArray[Any]] | None = None) -> Servable:
    """Look at the bundle in `folder` and run its model.

    Args:
        folder: a bundle.
        feeds: inputs to run it on, an `.npz` or name -> array; None draws the seeded ones of the report.

    Raises:
        UsageError: no bundle there; feeds that do not fit, or that must be given.
        GateError: a file of it is not what its manifest says.
        ModelError: the model cannot be run, or has tensors that no engine takes.
    """
    folder = Path(folder)
    report, check = read_report(folder), check_manifest(folder)
    if not check.ok:
        raise GateError(f"{folder} is not the bundle that was written: {check.summary}; export again, or get it again")
    model = folder / "model.onnx"
    session = make_session(model)
    arrays = _feeds(model, report, feeds)
    try:
        values = run_session(session, arrays, str(model))
    except ModelError as error:
        if feeds is None:
            raise UsageError(f"{error}; random inputs may make no sense to it: add --feeds FILE.npz") from error
        raise
    inputs, outputs = tensors(session, values)
    return Servable(
        model=model,
        report=report,
        inputs=inputs,
        outputs=outputs,
        feeds=arrays,
        feeds_given=feeds is not None,
        unbatchable=_why_unbatchable(model, session, arrays, given=feeds is not None),
        notes=() if check.present else (f"the bundle has {check.summary}",),
    )


def read_dense(path: Path, beside: Servable) -> Servable:
    """The dense model at `path`, to be served beside the compressed one.

    Raises:
        UsageError: it takes or gives something else.
        ModelError: it cannot be run.
    """
    session = make_session(path)
    _check_same("takes", path, beside.inputs, tuple(map(_tensor, session.get_inputs())))
    inputs, outputs = tensors(session, run_session(session, beside.feeds, str(path)))
    _check_same("gives", path, beside.outputs, outputs)
    why = _why_unbatchable(path, session, beside.feeds, given=beside.feeds_given)
    return replace(beside, model=path, inputs=inputs, outputs=outputs, unbatchable=why, notes=())


def tensors(session: "InferenceSession", values: Sequence[Value]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs as onnxruntime has inferred them.

    Args:
        session: of the model.
        values: outputs of a run: they tell the rank where the model does not, which onnxruntime calls () like a scalar.
    """
    outputs = []
    for tensor, value in zip(map(_tensor, session.get_outputs()), values, strict=True):
        unranked = isinstance(value, np.ndarray) and value.ndim > 0 and not tensor.shape
        outputs.append(replace(tensor, shape=(None,) * value.ndim, ranked=False) if unranked else tensor)
    return tuple(map(_tensor, session.get_inputs())), tuple(outputs)


def _check_same(what: str, path: Path, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Refuse a dense model that takes or gives something else than the bundle's."""
    if [_fixed(tensor) for tensor in ours] != [_fixed(tensor) for tensor in theirs]:
        listed = [", ".join(map(str, tensors_)) for tensors_ in (theirs, ours)]
        raise UsageError(
            f"--dense {path} {what} {listed[0]}, the bundle's model {listed[1]}; "
            "give the model that the bundle was made from"
        )


def _fixed(tensor: Tensor) -> tuple[str, str, list[int]]:
    """What must be equal: symbols may have other names."""
    return tensor.name, tensor.type, [dim if isinstance(dim, int) else -1 for dim in tensor.shape]


def _tensor(value: Any) -> Tensor:
    is_tensor = value.type.startswith("tensor(")
    return Tensor(
        name=value.name,
        type=value.type.removeprefix("tensor(").removesuffix(")") if is_tensor else value.type,
        shape=tuple(dim if isinstance(dim, int | str) else None for dim in value.shape),
    )


def _feeds(model: Path, report: Report, given: str | Path | Mapping[str, npt.NDArray[Any]] | None) -> Feeds:
    if given is None:
        return probe_feeds(model, report.settings.seed, report.probe_shapes)
    arrays = read_feeds(given) if isinstance(given, str | Path) else dict(given)
    check_feeds(model_inputs(model), arrays, str(model))
    return arrays


def _why_unbatchable(model: Path, session: "InferenceSession", feeds: Feeds, *, given: bool) -> str:
    """Why samples must not share a run, proved, and tried with `feeds` or others of their shapes; "" where they may."""
    shapes = {name: array.shape for name, array in feeds.items()}
    if not given:
        return why_not_batchable(model, session, shapes, SAMPLES)
    if why := no_batch_axis(session) or why_not_proved(model):
        return why
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(counts) > 1 or min(counts, default=0) < 2:
        return "one sample does not show whether samples mix: add --feeds FILE.npz with two or more"
    return why_not_batchable_on(model, session, feeds)
