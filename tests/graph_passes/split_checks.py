"""What the tests of the passes share: models from ONNX text, factor sources with a known answer, and the comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper

from graph_passes import Record, Site, Split, SplitFactors, find_sites, split
from graph_passes.records import AnyForm


def numbers(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def model(text: str, **initializers: np.ndarray) -> ir.Model:
    """ONNX text plus initializers given as arrays; checked."""
    proto = onnx.parser.parse_model(text)
    for name, array in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def graph(
    body: str, *, opset: int = 17, signature: str = "(float[N,6] x) => (float[N,4] y)", **initializers: np.ndarray
) -> ir.Model:
    return model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {signature} {{ {body} }}', **initializers)


def orthogonal(size: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def full_rank(site: Site, form: AnyForm = "first", bias: np.ndarray | None = None) -> SplitFactors:
    """Exact factors from a random orthogonal matrix: not symmetric, so a missing transpose shows."""
    weight = site.load(form)
    dense = weight.astype(np.float64)
    if form == "pivoted":
        return pivoted_full_rank(dense, bias, weight.dtype)
    groups, rows, columns = dense.shape
    q = np.stack([orthogonal(min(rows, columns), seed) for seed in range(groups)])
    if rows <= columns:
        left, right = q, q.swapaxes(1, 2) @ dense
    else:
        left, right = dense @ q.swapaxes(1, 2), q
    bias = None if bias is None else bias.astype(weight.dtype)
    return SplitFactors(left=left.astype(weight.dtype), right=right.astype(weight.dtype), form=form, bias=bias)


def pivoted_full_rank(dense: np.ndarray, bias: np.ndarray | None, dtype: np.dtype) -> SplitFactors:
    """Exact factors with pivots in a mixed order: all rows, or as many as there are columns."""
    _, rows, columns = dense.shape
    rank = min(rows, columns)
    made = []
    for group, matrix in enumerate(dense):
        pivots = pivot_rows(matrix, rank)[np.random.default_rng(group).permutation(rank)]
        left = np.linalg.lstsq(matrix[pivots].T, matrix.T, rcond=None)[0].T if rows > rank else np.zeros((rows, rank))
        left[pivots] = np.eye(rank)
        made.append((left, matrix[pivots], pivots))
    left, right, pivots = (np.stack(each) for each in zip(*made, strict=True))
    bias = None if bias is None else bias.astype(dtype)
    return SplitFactors(left=left.astype(dtype), right=right.astype(dtype), form="pivoted", bias=bias, pivots=pivots)


def pivot_rows(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Rows of large volume, found one after another."""
    if rank == len(matrix):
        return np.arange(rank)
    left, rows = matrix.copy(), []
    for _ in range(rank):
        rows.append(int((left**2).sum(axis=1).argmax()))
        unit = left[rows[-1]] / max(np.linalg.norm(left[rows[-1]]), 1e-30)
        left = left - np.outer(left @ unit, unit)
        left[rows] = 0
    free = [row for row in range(len(matrix)) if row not in rows]
    return np.array(list(dict.fromkeys(rows)) + free)[:rank]


def best_of_rank(rank: int, form: AnyForm = "first") -> Callable[[Site], SplitFactors]:
    """The exact SVD, truncated."""

    def source(site: Site) -> SplitFactors:
        weight = site.load(form)
        u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        left, right = u[..., :rank] * s[:, None, :rank], vt[:, :rank]
        return SplitFactors(left=left.astype(weight.dtype), right=right.astype(weight.dtype), form=form)

    return source


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of that rank: the oracle of the low-rank tests. Leading axes are batch axes."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return ((u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]).astype(matrix.dtype)


def run(a_model: ir.Model, level: str = "ORT_ENABLE_ALL", **feeds: np.ndarray) -> np.ndarray:
    """First output in onnxruntime."""
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = ir.to_proto(a_model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def error(came: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 distance; infinite when the shapes or dtypes differ."""
    if came.shape != expected.shape or came.dtype != expected.dtype:
        return float("inf")
    came, expected = came.astype(np.float64), expected.astype(np.float64)
    distance, size = float(np.linalg.norm(came - expected)), float(np.linalg.norm(expected))
    return distance / size if size else float("inf") if distance else 0.0


def ops(a_model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in a_model.graph.all_nodes())


def splits(records: list[Record]) -> list[Split]:
    return [record for record in records if isinstance(record, Split)]


def assert_sound(a_model: ir.Model) -> None:
    """The checker, unique names, and a second run that finds nothing."""
    onnx.checker.check_model(ir.to_proto(a_model), full_check=True)
    produced = [value.name for node in a_model.graph.all_nodes() for value in node.outputs if value.name]
    for each in a_model.graphs():
        produced += [*each.initializers, *(value.name for value in each.inputs if value.name not in each.initializers)]
    assert len(produced) == len(set(produced))
    reloaded = ir.from_proto(ir.to_proto(a_model))
    before = ir.to_proto(reloaded).SerializeToString()
    again = split(reloaded, full_rank)
    assert not splits(again)
    assert ir.to_proto(reloaded).SerializeToString() == before


def assert_same_at_full_rank(
    a_model: ir.Model, tolerance: float, source: Callable[[Site], SplitFactors] = full_rank, **feeds: np.ndarray
) -> list[Record]:
    """Split everything with exact factors: same outputs, sound model. Returns the records."""
    names = [value.name for value in a_model.graph.outputs]
    values = list(a_model.graph.outputs)
    expected = run(a_model, **feeds)
    sites = [site for site in find_sites(a_model) if isinstance(site, Site)]
    records = split(a_model, source)
    assert [s.node for s in splits(records)] == [site.node for site in sites]
    assert sites
    assert error(run(a_model, **feeds), expected) <= tolerance
    assert error(run(a_model, "ORT_DISABLE_ALL", **feeds), expected) <= tolerance
    assert [value.name for value in a_model.graph.outputs] == names
    assert all(now is then for now, then in zip(a_model.graph.outputs, values, strict=True))
    assert_sound(a_model)
    return records
