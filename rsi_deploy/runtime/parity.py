"""Three errors, kept apart, because each has another cause and another remedy.

    exporter       torch            against dense ONNX       the exporter's fault (or the opset converter's, for a file)
    surgery        dense ONNX       against full-rank split  ours, if it is above rounding
    approximation  dense ONNX       against compressed       the price of the rank: reported, gated only on request

The surgery check splits the same nodes with full-rank factors that cost nothing and hide nothing: a rotated identity
`P` and `P^T W`. The product is exactly `W`, and because `P` is not symmetric a forgotten transpose shows.
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pydantic

import graph_passes as gp
from graph_passes.constants import stored_array
from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.io.external_data import DataFile
from rsi_deploy.io.onnx_file import forget_weights_
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.runtime.feeds.values import Array, Value, arrays_of, is_text
from rsi_deploy.runtime.sessions import make_session, run_session

# Relative L2, by the width of the narrowest floating output: what rounding alone may do to a deep network.
EXPORTER_TOLERANCE = {2: 3e-2, 4: 1e-4, 8: 1e-6}
SURGERY_TOLERANCE = {2: 3e-2, 4: 2e-5, 8: 1e-10}
RANDOM_OPERATORS = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}

EXCLUDE = "find the site with --include and leave it out with --exclude"


class OutputComparison(pydantic.BaseModel, frozen=True, extra="forbid"):
    """How far one model's outputs are from another's on the probe inputs.

    Attributes:
        relative_l2: `||a - b||_2 / ||a||_2` of the worst output, over its finite values; where `a` is all zero, 0 if
            `b` is too and 1 if not. Of whole numbers the share that differs, where that is less: ids are no sizes.
        max_abs: largest absolute difference.
        tolerance: what `relative_l2` may be; None where nothing is demanded.
        informative: False where the reference's outputs are all zero or NaN, so that equality shows little; outputs
            without any number are not looked at.
    """

    relative_l2: float
    max_abs: float
    tolerance: float | None = None
    informative: bool = True


def compare_outputs(
    reference: Sequence[Value],
    candidate: Sequence[Value],
    *,
    what: str,
    tolerance: float | None = None,
    remedy: str = EXCLUDE,
) -> OutputComparison:
    """Compare two models' outputs, given in the same order: sequences element by element, maps key by key.

    A text is right or wrong: where it differs it counts as 0 in place of 1. The error's message ends with `remedy`, for
    the verb that compares.

    Raises:
        GateError: another number of outputs or of their elements, another shape, NaN or infinity elsewhere than in the
            reference, or an error above `tolerance`. The message begins with `what`.
    """
    if len(reference) != len(candidate):
        raise GateError(f"{what}: {len(reference)} outputs expected, but got {len(candidate)}; export again")
    worst, largest, informative = 0.0, 0.0, False
    for index, a, b in _pairs(reference, candidate, what):
        if a.shape != b.shape:
            raise GateError(f"{what}: output {index} has shape {b.shape}, expected {a.shape}")
        x, y = _as_floats(a, b)
        finite = np.isfinite(x)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
            raise GateError(
                f"{what}: output {index} holds NaN or infinite values elsewhere than the reference; {remedy}"
            )
        difference = x[finite] - y[finite]
        norm, error = float(np.linalg.norm(x[finite])), float(np.linalg.norm(difference))
        informative |= norm > 0
        relative = error / norm if norm else float(error > 0)
        is_whole = a.size and a.dtype.kind in "iub" and b.dtype.kind in "iub"
        worst = max(worst, min(relative, float((a != b).mean())) if is_whole else relative)
        largest = max(largest, float(np.abs(difference).max(initial=0.0)))
    if tolerance is not None and not worst <= tolerance:
        raise GateError(f"{what}: relative error {worst:.2e} is above the tolerance {tolerance:.0e}; {remedy}")
    is_empty = not any(array.size for value in reference for array in arrays_of("", value).values())
    return OutputComparison(
        relative_l2=worst, max_abs=largest, tolerance=tolerance, informative=informative or is_empty
    )


def check_repeatable(model: Path, feeds: Mapping[str, npt.NDArray[Any]], name: str, expected: Sequence[Value]) -> None:
    """Refuse a model that gives other outputs in another session on the same inputs.

    Args:
        model: an ONNX file that runs.
        feeds: input name -> array.
        name: of the model, for the error.
        expected: its outputs on them, from the first run of a session.

    Raises:
        ModelError: the outputs differ by more than rounding.
    """
    session = make_session(model, optimize="disabled", prepack=False)
    _check_equal(model, name, expected, run_session(session, feeds, name))


@contextmanager
def blames_random_models(model: Path, feeds: Mapping[str, npt.NDArray[Any]], name: str) -> Iterator[None]:
    """Where a gate fails and `model` gives other outputs in every run of a session, say that instead.

    Raises:
        ModelError: instead of the gate's error.
    """
    try:
        yield
    except GateError:
        session = make_session(model, optimize="disabled", prepack=False)
        _check_equal(model, name, *(run_session(session, feeds, name) for _ in range(2)))
        raise


def _check_equal(model: Path, name: str, first: Sequence[Value], second: Sequence[Value]) -> None:
    try:
        compare_outputs(first, second, what=name, tolerance=tolerance_for(first, SURGERY_TOLERANCE))
    except GateError as error:
        nodes = random_nodes(load_model(model))
        listed = f" ({', '.join(nodes[:3])}{', ...' * (len(nodes) > 3)})" if nodes else ""
        raise ModelError(
            f"{name} gives other outputs in every run on the same inputs{listed}, so that nothing can be held against "
            f"it; export it in evaluation mode (torch: model.eval()), without random operators"
        ) from error


def random_nodes(model: ir.Model) -> list[str]:
    """The nodes of a model that draw random numbers, each as `Dropout 'name' with training_mode`."""
    found = []
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (node for graph in graphs for node in graph.all_nodes()):
        if node.op_type in RANDOM_OPERATORS:
            found.append(f"{node.op_type} {node.name!r}")
        elif node.op_type == "Dropout" and len(node.inputs) > 2:
            mode = stored_array(node.inputs[2])
            if mode is None or mode.any():
                found.append(f"Dropout {node.name!r} with training_mode")
    return found


def tolerance_for(outputs: Sequence[Value], table: Mapping[int, float]) -> float:
    """The tolerance that fits the narrowest floating output."""
    arrays = [array for output in outputs for array in arrays_of("", output).values()]
    return table[min((a.dtype.itemsize for a in arrays if a.dtype.kind not in "iubOU"), default=4)]


def _pairs(reference: Sequence[Value], candidate: Sequence[Value], what: str) -> Iterator[tuple[str, Array, Array]]:
    """The arrays that the outputs consist of, side by side, each with its place."""
    for index, (a, b) in enumerate(zip(reference, candidate, strict=True)):
        expected, came = arrays_of(str(index), a), arrays_of(str(index), b)
        if expected.keys() != came.keys():
            raise GateError(
                f"{what}: output {index} has {len(came)} elements, or other keys, expected the {len(expected)} of the "
                "reference"
            )
        yield from ((place, array, came[place]) for place, array in expected.items())


def _as_floats(a: Array, b: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Both as float64; of texts, what `compare_outputs` says."""
    if is_text(a.dtype) and is_text(b.dtype):
        return np.ones(a.shape), np.asarray(a == b, np.float64)
    return a.astype(np.float64), b.astype(np.float64)


def surgery_check(
    dense: Path,
    weights: Mapping[str, gp.Form],
    feeds: Mapping[str, npt.NDArray[Any]],
    expected: Sequence[Value],
    *,
    joint: Collection[tuple[str, ...]] = (),
    bias: bool = False,
    graph: ir.Model | None = None,
) -> OutputComparison:
    """Split the same `weights` of the model at `dense` at full rank and compare with its own outputs `expected`.

    Args:
        dense: the dense model.
        weights: names of those to split, each with the form of its split.
        feeds: the probe inputs.
        expected: the dense model's outputs on them.
        joint: groups of those weights that share one right factor.
        bias: give every split a change of its bias too (of zero).
        graph: the dense model's graph, which is used up; None reads it from the file.

    Raises:
        GateError: the split model differs by more than rounding, which is a defect of the surgery.
    """
    model = load_model(dense) if graph is None else graph

    def full_rank(site: gp.Site) -> gp.Factors | gp.Dense:
        wanted = site.members in joint if site.members else site.weight in weights
        form = weights.get(site.weight, site.forms[0])
        return rotated_identity(site, form, bias=bias) if wanted else gp.Dense(reason="not split")

    with tempfile.TemporaryDirectory(prefix=".surgery-", dir=dense.parent) as folder:
        path = Path(folder) / "full_rank.onnx"
        with DataFile(path.with_name(f"{path.name}.data")) as data:  # as large as the dense model: never in memory
            gp.split(model, full_rank, keep=data.append, joint=bool(joint))
            data.take_(model)
        ir.save(model, path)
        forget_weights_(model)
        session = make_session(path, optimize="disabled", prepack=False)
        outputs = run_session(session, feeds, "the full-rank split")
        del session
    tolerance = tolerance_for(expected, SURGERY_TOLERANCE)
    return compare_outputs(expected, outputs, what="surgery gate (full-rank split against dense)", tolerance=tolerance)


def rotated_identity(site: gp.Site, form: gp.Form | Literal["first"] = "first", *, bias: bool = False) -> gp.Factors:
    """Exact full-rank factors of a site's weight: `P` and `P^T W`, or `W P` and `P^T`, whichever is smaller."""
    weight = site.load(form)
    rows, columns = site.shape(form)
    eye = np.roll(np.eye(min(rows, columns), dtype=weight.dtype), 1, axis=0)[None].repeat(site.groups, axis=0)
    change = np.zeros(site.bias_size, weight.dtype) if bias and not site.both_ways else None
    if rows <= columns:  # eye @ x moves row i to row i+1
        return gp.Factors(left=eye, right=_rolled(weight, 1, site.op_type), form=form, bias=change)
    right = np.ascontiguousarray(eye.swapaxes(1, 2))
    return gp.Factors(left=_rolled(weight, 2, site.op_type), right=right, form=form, bias=change)


def _rolled(weight: npt.NDArray[Any], axis: int, op_type: str) -> npt.NDArray[Any]:
    """The weight with its first row or column moved to the end, laid out as the split stores it: a single copy."""
    groups, rows, columns = weight.shape
    if op_type == "Conv":
        rolled = np.empty(weight.shape, weight.dtype)
    else:
        rolled = np.empty((groups, columns, rows), weight.dtype).swapaxes(1, 2)
    target, source = rolled.swapaxes(0, axis), weight.swapaxes(0, axis)
    target[:-1], target[-1] = source[1:], source[0]
    return rolled
