"""Compare the outputs of two models. Three errors are kept apart, as each has another cause and another remedy.

    exporter       torch        against dense ONNX       caused by the exporter (or, for a file, the opset converter)
    surgery        dense ONNX   against full-rank split  a defect of this project if it is above rounding
    approximation  dense ONNX   against compressed       caused by the rank: reported, and limited only on request

The surgery check splits the same nodes with full-rank factors: a rotated identity `P` and `P^T W`. The product is
exactly `W`, and since `P` is not symmetric, a forgotten transpose changes the outputs.
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import pydantic

import graph_passes as gp
from graph_passes.constants import stored_array
from graph_passes.forms import FOLDED
from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.core.types import Array, Feeds, Floats
from rsi_deploy.io.external_data import DataFile
from rsi_deploy.io.onnx_file import release_weights_
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.runtime.feeds.values import Value, arrays_of_output, is_text
from rsi_deploy.runtime.sessions import make_session, run_session

# Relative L2 by the width of the narrowest floating output: the most that rounding alone causes in a deep network.
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
    """The distance of one model's outputs from another's on the probe inputs.

    Attributes:
        relative_l2: `||a - b||_2 / ||a||_2` of the worst output over finite values; where `a` is all zero, 0 if `b` is
            too and 1 if not. For integers the share of different values if that is smaller, as ids are not sizes.
        max_abs: largest absolute difference.
        tolerance: largest allowed `relative_l2`; None for no limit.
        informative: False if the reference's outputs are all zero or NaN, so that equality proves little; outputs
            without any number are ignored.
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
    """Compare two models' outputs in order: sequences element by element, maps key by key.

    A text that differs counts as 0 in place of 1. Error messages begin with `what` and end with `remedy`.

    Raises:
        GateError: The number of outputs or elements differs, a shape differs, NaN or infinity is elsewhere than in the
            reference, or the error is above `tolerance`.
    """
    if len(reference) != len(candidate):
        raise GateError(f"{what}: {len(reference)} outputs expected, but got {len(candidate)}", hint="export again")
    worst, largest, informative = 0.0, 0.0, False
    for index, a, b in _pairs(reference, candidate, what):
        if a.shape != b.shape:
            raise GateError(f"{what}: output {index} has shape {b.shape}, expected {a.shape}")
        x, y = _as_floats(a, b)
        finite = np.isfinite(x)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
            raise GateError(
                f"{what}: output {index} has NaN or infinite values where the reference has none, or the reverse",
                hint=remedy,
            )
        difference = x[finite] - y[finite]
        norm, error = float(np.linalg.norm(x[finite])), float(np.linalg.norm(difference))
        informative |= norm > 0
        relative = error / norm if norm else float(error > 0)
        is_whole = a.size and a.dtype.kind in "iub" and b.dtype.kind in "iub"
        worst = max(worst, min(relative, float((a != b).mean())) if is_whole else relative)
        largest = max(largest, float(np.abs(difference).max(initial=0.0)))
    if tolerance is not None and not worst <= tolerance:
        raise GateError(f"{what}: relative error {worst:.2e} is above the tolerance {tolerance:.0e}", hint=remedy)
    is_empty = not any(array.size for value in reference for array in arrays_of_output("", value).values())
    return OutputComparison(
        relative_l2=worst, max_abs=largest, tolerance=tolerance, informative=informative or is_empty
    )


def check_repeatable(model: Path, feeds: Feeds, name: str, expected: Sequence[Value]) -> None:
    """Refuse a model whose outputs differ between two sessions on the same inputs.

    Args:
        model: ONNX file that runs.
        feeds: input name -> array.
        name: model name for the error.
        expected: outputs from the first run of a session.

    Raises:
        ModelError: The outputs differ by more than rounding.
    """
    session = make_session(model, optimize="disabled", prepack=False)
    _check_equal(model, name, expected, run_session(session, feeds, name))


@contextmanager
def explain_random_models(model: Path, feeds: Feeds, name: str) -> Iterator[None]:
    """Replace a GateError in the block by a ModelError if the outputs of `model` differ in every run.

    Raises:
        ModelError: In place of the GateError.
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
            f"{name} gives other outputs in every run on the same inputs{listed}, so nothing can be compared with it",
            hint="export it in evaluation mode (torch: model.eval()), without random operators",
        ) from error


def random_nodes(model: ir.Model) -> list[str]:
    """Describe the nodes of a model that draw random numbers, each as `Dropout 'name' with training_mode`."""
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
    """Return the tolerance for the narrowest floating output."""
    arrays = [array for output in outputs for array in arrays_of_output("", output).values()]
    return table[min((a.dtype.itemsize for a in arrays if a.dtype.kind not in "iubOU"), default=4)]


def _pairs(reference: Sequence[Value], candidate: Sequence[Value], what: str) -> Iterator[tuple[str, Array, Array]]:
    """Yield the arrays of the outputs in pairs, each with its place."""
    for index, (a, b) in enumerate(zip(reference, candidate, strict=True)):
        expected, actual = arrays_of_output(str(index), a), arrays_of_output(str(index), b)
        if expected.keys() != actual.keys():
            raise GateError(
                f"{what}: output {index} has {len(actual)} elements, or other keys, expected the {len(expected)} of "
                "the "
                "reference"
            )
        yield from ((place, array, actual[place]) for place, array in expected.items())


def _as_floats(a: Array, b: Array) -> tuple[Floats, Floats]:
    """Convert both to float64; texts to ones, and to 0 where they differ."""
    if is_text(a.dtype) and is_text(b.dtype):
        return np.ones(a.shape), np.asarray(a == b, np.float64)
    return a.astype(np.float64), b.astype(np.float64)


def surgery_check(
    dense: Path,
    weights: Mapping[str, gp.Form],
    feeds: Feeds,
    expected: Sequence[Value],
    *,
    joint: Collection[tuple[str, ...]] = (),
    bias: bool = False,
    graph: ir.Model | None = None,
) -> OutputComparison:
    """Split the `weights` of the model at `dense` at full rank and compare the outputs with `expected`.

    Args:
        dense: dense ONNX model.
        weights: names of the weights to split, with the form of each split.
        feeds: probe inputs.
        expected: outputs of the dense model.
        joint: groups of those weights that share one right factor.
        bias: whether every split also changes its bias (by zero).
        graph: the dense model's graph, which is used up; None reads it from the file.

    Raises:
        GateError: The outputs differ by more than rounding, which is a defect of the surgery.
    """
    model = load_model(dense) if graph is None else graph

    def full_rank(site: gp.Site) -> gp.SplitFactors | gp.Dense:
        is_split = site.members in joint if site.members else site.weight in weights
        form = weights.get(site.weight, site.forms[0])
        return rotated_identity(site, form, bias=bias) if is_split else gp.Dense(reason="not split")

    with tempfile.TemporaryDirectory(prefix=".surgery-", dir=dense.parent) as folder:
        path = Path(folder) / "full_rank.onnx"
        with DataFile(
            path.with_name(f"{path.name}.data")
        ) as data:  # as large as the dense model, so kept out of memory
            gp.split(model, full_rank, keep=data.append, joint=bool(joint))
            gp.fold_splits(model, replace=data.replace)
            data.store_initializers_(model)
        ir.save(model, path)
        release_weights_(model)
        session = make_session(path, optimize="disabled", prepack=False)
        outputs = run_session(session, feeds, "the full-rank split")
        del session
    tolerance = tolerance_for(expected, SURGERY_TOLERANCE)
    return compare_outputs(expected, outputs, what="surgery gate (full-rank split against dense)", tolerance=tolerance)


def rotated_identity(
    site: gp.Site, form: gp.Form | Literal["first"] = "first", *, bias: bool = False
) -> gp.SplitFactors:
    """Return exact full-rank factors of a site's weight: `P` and `P^T W`, or `W P` and `P^T`, whichever is smaller.

    The pivoted form always takes `P` and `P^T W`.
    """
    weight = site.load(form)
    rows, columns = site.shape(form)
    size = rows if form == "pivoted" else min(rows, columns)
    eye = np.roll(np.eye(size, dtype=weight.dtype), 1, axis=0)[None].repeat(site.groups, axis=0)
    if site.units is not None and form in FOLDED:  # all units in another order
        order = _rotated_units(site.units)
        right, bias_change = np.eye(columns, dtype=weight.dtype)[order], np.zeros(site.bias_size, weight.dtype)
        left = np.ascontiguousarray(weight[..., order])
        return gp.SplitFactors(left=left, right=right[None], form=form, bias=bias_change if bias else None)
    change = np.zeros(site.bias_size, weight.dtype) if bias and not site.both_ways else None
    if size == rows:  # eye @ x moves row i to row i+1
        pivots = np.roll(np.arange(rows), -1)[None].repeat(site.groups, axis=0) if form == "pivoted" else None
        right = _rolled(weight, 1, site.op_type)
        return gp.SplitFactors(left=eye, right=right, form=form, bias=change, pivots=pivots)
    right = np.ascontiguousarray(eye.swapaxes(1, 2))
    return gp.SplitFactors(left=_rolled(weight, 2, site.op_type), right=right, form=form, bias=change)


def _rotated_units(units: gp.Units) -> Array:
    """Return the inputs with all units in another order; in the form "heads", another one in every head."""
    places = np.arange(units.count * units.run)
    if units.form == "units":
        return np.roll(places, units.run)
    heads = places.reshape(units.run, units.count)
    return np.concatenate([np.roll(own, 1 + number % (units.count - 1)) for number, own in enumerate(heads)])


def _rolled(weight: Array, axis: int, op_type: str) -> Array:
    """Move the weight's first row or column to the end, in the memory layout that the split stores, with one copy."""
    groups, rows, columns = weight.shape
    rolled: Array
    if op_type == "Conv":
        rolled = np.empty(weight.shape, weight.dtype)
    else:
        rolled = np.empty((groups, columns, rows), weight.dtype).swapaxes(1, 2)
    target, source = rolled.swapaxes(0, axis), weight.swapaxes(0, axis)
    target[:-1], target[-1] = source[1:], source[0]
    return rolled
