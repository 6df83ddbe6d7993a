"""Compare the outputs of two models. Three errors are kept apart, as each has another cause and another remedy.

    exporter       torch        against dense ONNX       caused by the exporter (or, for a file, the opset converter)
    surgery        dense ONNX   against full-rank split  a defect of this project if it is above rounding
    approximation  dense ONNX   against compressed       caused by the rank: reported, and limited only on request

The surgery check splits the same nodes with full-rank factors: a rotated identity `P` and `P^T W`. The product is
exactly `W`, and since `P` is not symmetric, a forgotten transpose changes the outputs. The pivoted form has all its
nodes only below full rank, so it is compared with the plain form of the same low-rank factors.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pydantic

import graph_passes as gp
from graph_passes.constants import stored_array
from graph_passes.forms import FOLDED
from graph_passes.records import AnyForm
from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.core.types import Array, Feeds, Floats
from rsi_deploy.io.external_data import DataFile
from rsi_deploy.io.onnx_file import release_weights_
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.runtime.feeds.values import Value, arrays_of_output, is_text
from rsi_deploy.runtime.probe_runs import run_probe
from rsi_deploy.runtime.sessions import make_session

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
    _check_equal(model, name, expected, run_probe(session, feeds, name))


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
        _check_equal(model, name, *(run_probe(session, feeds, name) for _ in range(2)))
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
    graph: Callable[[], ir.Model] | None = None,
) -> OutputComparison:
    """Split the `weights` of the model at `dense` at full rank and compare the outputs with `expected`.

    There, pivoted splits are plain ones, and all hidden units and values of heads are kept, in another order. If there
    are any of these forms, a model with low-rank pivoted splits, half of the units and half of the values is compared
    with one whose splits are plain and have the same factors.

    Args:
        dense: dense ONNX model.
        weights: names of the weights to split, with the form of each split.
        feeds: probe inputs.
        expected: outputs of the dense model.
        joint: groups of those weights that share one right factor.
        bias: whether every split also changes its bias (at full rank by zero).
        graph: returns a graph of the dense model to change; None reads it from the file.

    Returns:
        The worse of the two comparisons.

    Raises:
        GateError: The outputs differ by more than rounding, which is a defect of the surgery.
    """
    forms: dict[str, AnyForm] = {name: "first" if form == "pivoted" else form for name, form in weights.items()}
    folded = [name for name, form in weights.items() if form in {"pivoted", *FOLDED}]

    def full_rank(site: gp.Site) -> gp.SplitFactors:
        return rotated_identity(site, forms.get(site.weight, "first"), bias=bias)

    def low_rank(site: gp.Site, *, is_plain: bool) -> gp.SplitFactors:
        form = weights.get(site.weight)
        if form not in site.forms or site.weight not in folded:
            return full_rank(site)
        if form in FOLDED:
            return half_of_units(site, is_plain=is_plain, bias=bias)
        return drawn_pivots(site, "first" if is_plain else "pivoted", folded.index(site.weight), bias=bias)

    def run(factors: Callable[[gp.Site], gp.SplitFactors], what: str) -> list[Value]:
        def answer(site: gp.Site) -> gp.SplitFactors | gp.Dense:
            is_split = site.members in joint if site.members else site.weight in weights
            return factors(site) if is_split else gp.Dense(reason="not split")

        model = load_model(dense) if graph is None else graph()
        return _outputs_of_split(model, answer, dense.parent, feeds, what, is_joint=bool(joint))

    def compare(first: Sequence[Value], second: Sequence[Value], what: str) -> OutputComparison:
        tolerance = tolerance_for(expected, SURGERY_TOLERANCE)
        return compare_outputs(first, second, what=f"surgery gate ({what})", tolerance=tolerance)

    result = compare(expected, run(full_rank, "the full-rank split"), "full-rank split against dense")
    if not folded:
        return result
    plain = run(lambda site: low_rank(site, is_plain=True), "the plain split")
    outputs = run(lambda site: low_rank(site, is_plain=False), "the folded split")
    again = compare(plain, outputs, "folded split against a plain one of the same factors")
    return max(result, again, key=lambda each: each.relative_l2)


def _outputs_of_split(
    model: ir.Model, factors: gp.FactorSource, parent: Path, feeds: Feeds, what: str, *, is_joint: bool
) -> list[Value]:
    """Split a model and return its outputs. Its weights stay out of memory, in a temporary folder in `parent`."""
    with tempfile.TemporaryDirectory(prefix=".surgery-", dir=parent) as folder:
        path = Path(folder) / "split.onnx"
        with DataFile(path.with_name(f"{path.name}.data")) as data:
            gp.split(model, factors, keep=data.append, joint=is_joint)
            gp.fold_splits(model, replace=data.replace)
            data.store_initializers_(model)
        ir.save(model, path)
        release_weights_(model)
        session = make_session(path, optimize="disabled", prepack=False)
        outputs = run_probe(session, feeds, what)
        del session
    return outputs


def rotated_identity(site: gp.Site, form: AnyForm = "first", *, bias: bool = False) -> gp.SplitFactors:
    """Return exact full-rank factors of a site's weight: `P` and `P^T W`, or `W P` and `P^T`, whichever is smaller."""
    weight = site.load(form)
    rows, columns = site.shape(form)
    size = min(rows, columns)
    eye = np.roll(np.eye(size, dtype=weight.dtype), 1, axis=0)[None].repeat(site.groups, axis=0)
    if site.units is not None and form in FOLDED:  # all units in another order
        order = _rotated_units(site.units)
        right, bias_change = np.eye(columns, dtype=weight.dtype)[order], np.zeros(site.bias_size, weight.dtype)
        left = np.ascontiguousarray(weight[..., order])
        return gp.SplitFactors(left=left, right=right[None], form=form, bias=bias_change if bias else None)
    change = np.zeros(site.bias_size, weight.dtype) if bias and not site.both_ways else None
    if size == rows:  # eye @ x moves row i to row i+1
        return gp.SplitFactors(left=eye, right=_rolled(weight, 1, site.op_type), form=form, bias=change)
    right = np.ascontiguousarray(eye.swapaxes(1, 2))
    return gp.SplitFactors(left=_rolled(weight, 2, site.op_type), right=right, form=form, bias=change)


def _rotated_units(units: gp.Units) -> Array:
    """Return the inputs with all units in another order; in the form "heads", another one in every head."""
    places = np.arange(units.count * units.run)
    if units.form == "units":
        return np.roll(places, units.run)
    heads = places.reshape(units.run, units.count)
    return np.concatenate([np.roll(own, 1 + number % (units.count - 1)) for number, own in enumerate(heads)])


def drawn_pivots(site: gp.Site, form: AnyForm, index: int, *, bias: bool = False) -> gp.SplitFactors:
    """Return factors with rows of a site's weight as pivots and random coefficients of the other rows.

    The rank is half of the full rank. The product is the same in every form.

    Args:
        site: a site that can take the pivoted form.
        form: "pivoted" or "first".
        index: random seed. The pivots are the first rows or the last ones for one in five each, else random rows.
        bias: whether the factors come with a bias, which is not zero.
    """
    weight, rng = site.load("pivoted"), np.random.default_rng(index)
    rows, rank = site.out_features, max(site.full_rank // 2, 1)
    start = {1: 0, 3: rows - rank}.get(index % 5)
    drawn = [rng.permutation(rows) if start is None else np.arange(start, rows) for _ in range(site.groups)]
    pivots = np.stack(drawn)[:, :rank]
    left = (rng.random((site.groups, rows, rank), np.float32) * 2 - 1) * (3 / rank) ** 0.5  # rows of length 1
    np.put_along_axis(left, pivots[..., None], np.eye(rank, dtype=left.dtype), axis=1)
    right = np.take_along_axis(weight, pivots[..., None], axis=1)
    return gp.SplitFactors(
        left=left.astype(weight.dtype),
        right=right,
        form=form,
        bias=np.resize(right[:, 0], site.bias_size) if bias else None,
        pivots=pivots if form == "pivoted" else None,
    )


def half_of_units(site: gp.Site, *, is_plain: bool, bias: bool = False) -> gp.SplitFactors:
    """Return factors that keep half of what a site reads: every other hidden unit, the later half first.

    Of the values of heads, they keep random sums, others for each head.

    Args:
        site: a site that reads hidden units, or values of heads.
        is_plain: whether the form is one that leaves the first node.
        bias: whether the factors come with a bias, which is not zero.
    """
    units = site.units
    assert units is not None
    form: AnyForm = units.form if not is_plain else "input" if "input" in site.forms else "first"
    weight = site.load(units.form)
    if units.form == "units":
        kept = np.arange(0, units.count, 2)
        places = (np.roll(kept, len(kept) // 2)[:, None] * units.run + np.arange(units.run)).reshape(-1)
        right = np.eye(weight.shape[-1], dtype=weight.dtype)[places]
        left = np.ascontiguousarray(weight[..., places])
    else:
        drawn = np.random.default_rng(0).standard_normal((units.run, units.count, (units.count + 1) // 2))
        right = _block_diagonal(np.linalg.qr(drawn)[0].swapaxes(1, 2)).astype(weight.dtype)
        left = (weight.astype(np.float32) @ right.T.astype(np.float32)).astype(weight.dtype)
    change = np.resize(left[0, :, 0], site.bias_size) if bias else None
    return gp.SplitFactors(left=left, right=right[None], form=form, bias=change)


def _block_diagonal(blocks: Array) -> Array:
    """Return blocks `(count, rows, columns)` along the diagonal of a matrix."""
    count, rows, columns = blocks.shape
    whole = np.zeros((count, rows, count, columns), blocks.dtype)
    whole[np.arange(count), :, np.arange(count)] = blocks
    return whole.reshape(count * rows, count * columns)


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
