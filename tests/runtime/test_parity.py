import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import initializers, mlp_onnx, run_onnx
from onnx import helper, numpy_helper

import graph_passes as gp
from graph_passes import fold_permutations, hidden_units, split_conv, split_gemm, split_matmul
from graph_passes.marks import CONCAT, MARK, PERMUTATION
from rsi_deploy.core.errors import GateError
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.parity import (
    SURGERY_TOLERANCE,
    compare_outputs,
    drawn_pivots,
    rotated_identity,
    surgery_check,
    tolerance_for,
)

RNG = np.random.default_rng(0)
A = RNG.standard_normal((4, 10)).astype(np.float32)


# -- the comparator, and wrong models that it must reject


def test_equal_outputs_differ_by_nothing():
    result = compare_outputs([A, A[:, :3]], [A.copy(), A[:, :3].copy()], what="t", tolerance=0.0)
    assert (result.relative_l2, result.max_abs, result.tolerance, result.informative) == (0.0, 0.0, 0.0, True)


def test_the_error_is_the_relative_one_of_the_worst_output():
    b = A + 0.01 * np.linalg.norm(A) / np.sqrt(A.size)
    result = compare_outputs([A, A], [A, b], what="t")
    np.testing.assert_allclose(result.relative_l2, 0.01, rtol=1e-5)
    np.testing.assert_allclose(result.max_abs, np.abs(b - A).max(), rtol=1e-6)


@pytest.mark.parametrize("tolerance", [*SURGERY_TOLERANCE.values(), 0.5])
@pytest.mark.parametrize(
    "wrong", [2 * A, -A, np.zeros_like(A), A[:, ::-1], A + 1], ids=["doubled", "negated", "zero", "mirrored", "shifted"]
)
def test_wrong_outputs_are_rejected(wrong, tolerance):
    with pytest.raises(GateError, match=r"^the gate: relative error .* is above the tolerance"):
        compare_outputs([A], [wrong], what="the gate", tolerance=tolerance)


def test_one_wrong_output_of_two_is_enough():
    with pytest.raises(GateError):
        compare_outputs([A, A], [A, 2 * A], what="t", tolerance=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tolerance", [None, 1e9])
def test_values_that_are_not_finite_are_rejected_for_any_tolerance(bad, tolerance):
    b = A.copy()
    b[1, 2] = bad
    with pytest.raises(GateError, match="output 0 has NaN or infinite values"):
        compare_outputs([A], [b], what="t", tolerance=tolerance)
    with pytest.raises(GateError, match="NaN"):
        compare_outputs([b], [A], what="t", tolerance=tolerance)


def test_infinities_that_the_reference_has_too_are_no_difference_and_hide_none():
    a, b = A.copy(), A.copy()
    a[0, 0] = b[0, 0] = -np.inf
    a[0, 1] = b[0, 1] = np.nan
    assert compare_outputs([a], [b], what="t", tolerance=0.0).relative_l2 == 0
    b[2:] *= 2
    with pytest.raises(GateError, match="relative error"):
        compare_outputs([a], [b], what="t", tolerance=0.1)


def test_another_number_of_outputs_or_another_shape_is_rejected():
    with pytest.raises(GateError, match="2 outputs expected, but got 1"):
        compare_outputs([A, A], [A], what="t")
    with pytest.raises(GateError, match=r"output 1 has shape \(10, 4\), expected \(4, 10\)"):
        compare_outputs([A, A], [A, A.T], what="t")


def test_a_reference_of_zeros_or_nan_shows_little_and_says_so():
    zero = np.zeros((2, 3), np.float32)
    assert not compare_outputs([zero], [zero], what="t", tolerance=1e-4).informative
    assert not compare_outputs([zero * np.nan], [zero * np.nan], what="t").informative
    assert compare_outputs([zero], [zero + 1], what="t").relative_l2 == 1
    with pytest.raises(GateError):
        compare_outputs([zero], [zero + 1e-9], what="t", tolerance=1e-2)


def test_the_tolerance_is_that_of_the_narrowest_floating_output():
    half, integers = np.zeros(1, np.float16), np.zeros(1, np.int64)
    assert tolerance_for([A, half], SURGERY_TOLERANCE) == SURGERY_TOLERANCE[2]
    assert tolerance_for([A, integers.astype(np.int8)], SURGERY_TOLERANCE) == SURGERY_TOLERANCE[4]
    assert tolerance_for([A.astype(float)], SURGERY_TOLERANCE) == SURGERY_TOLERANCE[8]
    assert tolerance_for([integers], SURGERY_TOLERANCE) == SURGERY_TOLERANCE[4]


# -- full-rank factors that hide nothing


def graph_of(op, shape, *, groups=1, dtype=np.float32):
    weight = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    attributes = {"group": groups} if op == "Conv" else {"transB": 1} if op == "Gemm" else {}
    node = helper.make_node(op, ["x", "w"], ["y"], op, **attributes)
    into = shape[1] * groups if op == "Conv" else shape[0] if op == "MatMul" else shape[1]
    x = helper.make_tensor_value_info("x", kind, ["n", into, *([6, 6] if op == "Conv" else [])])
    y = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


FORMS = [
    ("MatMul", (5, 9), 1),
    ("MatMul", (9, 5), 1),
    ("Gemm", (5, 9), 1),
    ("Gemm", (9, 5), 1),
    ("Conv", (6, 4, 3, 3), 1),
    ("Conv", (40, 3, 3, 3), 1),
    ("Conv", (8, 3, 2, 2), 2),
    ("Conv", (60, 3, 2, 2), 2),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize(("op", "shape", "groups"), FORMS)
def test_rotated_identity_gives_back_the_weight_bit_for_bit(op, shape, groups, dtype):
    (site,) = gp.find_sites(ir.from_proto(graph_of(op, shape, groups=groups, dtype=dtype)))
    factors = rotated_identity(site)
    np.testing.assert_array_equal(factors.left @ factors.right, site.load())
    assert factors.rank == site.full_rank
    square = factors.left if site.out_features <= site.in_features else factors.right
    assert not np.array_equal(square, square.swapaxes(1, 2))  # or a forgotten transpose would not show


# -- the gate: good surgery passes, every kind of bad surgery fails


def saved(tmp_path, proto):
    path = tmp_path / "dense.onnx"
    onnx.save(proto, path)
    return path


def check(path, weights=None):
    feeds = random_feeds(model_inputs(path), 2, 0)
    weights = set(initializers(path)) if weights is None else weights
    return surgery_check(path, dict.fromkeys(weights, "first"), feeds, run_onnx(path, feeds))


@pytest.mark.parametrize(("op", "shape", "groups"), FORMS)
def test_good_surgery_passes_and_leaves_nothing_behind(tmp_path, op, shape, groups):
    result = check(saved(tmp_path, graph_of(op, shape, groups=groups)))
    assert result.relative_l2 <= result.tolerance == SURGERY_TOLERANCE[4]
    assert result.informative
    assert [p.name for p in tmp_path.iterdir()] == ["dense.onnx"]


def test_only_the_named_weights_are_split(tmp_path, monkeypatch):
    seen = []

    def noted(site, *args, **options):
        seen.append(site.weight)
        return rotated_identity(site, *args, **options)

    monkeypatch.setattr("rsi_deploy.runtime.parity.rotated_identity", noted)
    check(mlp_onnx(tmp_path / "dense.onnx"), {"fc2.weight"})
    assert seen == ["fc2.weight"]


def turned(factors, side):
    """The factors with one of them mirrored: a wrong orientation that keeps every shape."""
    return dataclasses.replace(factors, **{side: np.ascontiguousarray(getattr(factors, side)[:, ::-1, ::-1])})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("op", "shape", "groups"), FORMS)
def test_wrongly_oriented_factors_fail(tmp_path, monkeypatch, op, shape, groups, side):
    splitter = {"MatMul": split_matmul.SplitMatMulPass, "Gemm": split_gemm.SplitGemmPass}.get(
        op, split_conv.SplitConvPass
    )
    rewrite = splitter.rewrite

    def sabotaged(found, parts):
        return rewrite(found, dataclasses.replace(parts, factors=turned(parts.factors, side)))

    monkeypatch.setattr(splitter, "rewrite", staticmethod(sabotaged))
    with pytest.raises(GateError, match="^surgery gate"):
        check(saved(tmp_path, graph_of(op, shape, groups=groups)))


def test_a_square_factor_left_unturned_fails(tmp_path, monkeypatch):
    """The classic: `W^T` where `W` belongs. At full rank both have the same shape, and only the rotation tells."""
    operand = split_matmul.SplitMatMulPass.rewrite.__globals__["Parts"].operand
    monkeypatch.setattr(
        "graph_passes.split_pass.Parts.operand",
        lambda self, side, shape, turned=False: operand(
            self, side, shape, turned=turned and side != "left" if shape[0] == shape[1] else turned
        ),
    )
    with pytest.raises(GateError, match="^surgery gate"):
        check(saved(tmp_path, graph_of("MatMul", (9, 5))))


def test_a_lost_bias_fails(tmp_path, monkeypatch):
    rewrite = split_gemm.SplitGemmPass.rewrite

    def sabotaged(found, parts):
        first = rewrite(found, parts)
        found.node.replace_input_with(2, None)
        return first

    monkeypatch.setattr(split_gemm.SplitGemmPass, "rewrite", staticmethod(sabotaged))
    with pytest.raises(GateError, match="^surgery gate"):
        check(mlp_onnx(tmp_path / "dense.onnx"), {"fc1.weight"})


@pytest.mark.parametrize("form", ["channel", "input", "separable"])
def test_surgery_is_checked_in_the_form_of_the_plan(tmp_path, monkeypatch, form):
    path = tmp_path / "conv.onnx"
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 4, 3, 3)).astype(np.float32)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="c", strides=[2, 1], pads=[1, 0, 1, 2])
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 4, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    feeds = random_feeds(model_inputs(path), 2, 0)
    good = run_onnx(path, feeds)
    assert surgery_check(path, {"w": form}, feeds, good, bias=True).relative_l2 < 1e-6
    right = rotated_identity
    seen = []

    def doctored(site, form, **options):
        seen.append(form)
        return turned(right(site, form, **options), "left")

    monkeypatch.setattr("rsi_deploy.runtime.parity.rotated_identity", doctored)
    with pytest.raises(GateError, match="^surgery gate"):
        surgery_check(path, {"w": form}, feeds, good, bias=True)
    assert seen == [form]


def test_weights_of_two_sites_exchanged_fail(tmp_path, monkeypatch):
    path = mlp_onnx(tmp_path / "dense.onnx", sizes=(12, 12, 12, 10))
    keep = {}

    def exchanged(site, *args, **options):
        return keep.setdefault("first", rotated_identity(site))

    monkeypatch.setattr("rsi_deploy.runtime.parity.rotated_identity", exchanged)
    with pytest.raises(GateError, match="^surgery gate"):
        check(path, {"fc1.weight", "fc2.weight"})


# -- the pivoted form, whose second node exists below full rank only


def reversed_rows(model):
    """Store the coefficients of the rows that are no pivots in reverse order."""
    for node in model.graph:
        if node.metadata_props.get(MARK) == "left":
            value, axis = node.inputs[1], 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) else 1
            value.const_value = ir.tensor(np.flip(value.const_value.numpy(), axis).copy(), name=value.name)


def without_order(model):
    for node in list(model.graph):
        if node.metadata_props.get(MARK) == PERMUTATION:
            node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)


def swapped_concat(model):
    for node in model.graph:
        if node.metadata_props.get(MARK) == CONCAT:
            first, second = node.inputs
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)


def wrong_bias(model):
    """Store ones in place of the bias of the rows that are no pivots."""
    for node in model.graph:
        if node.metadata_props.get(MARK) == "left":
            value = node.inputs[2]
            value.const_value = ir.tensor(np.ones_like(value.const_value.numpy()), name=value.name)


PIVOTED = [
    ("MatMul", (5, 9), 1),
    ("MatMul", (9, 6), 1),
    ("Gemm", (9, 5), 1),
    ("Conv", (6, 4, 3, 3), 1),
    ("Conv", (8, 3, 2, 2), 2),
]


def check_pivoted(path, *names, bias=True):
    feeds = random_feeds(model_inputs(path), 2, 0)
    return surgery_check(path, dict.fromkeys(names, "pivoted"), feeds, run_onnx(path, feeds), bias=bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("op", "shape", "groups"), PIVOTED)
def test_good_pivoted_surgery_passes_and_leaves_nothing_behind(tmp_path, op, shape, groups, bias):
    result = check_pivoted(saved(tmp_path, graph_of(op, shape, groups=groups)), "w", bias=bias)
    assert result.relative_l2 <= result.tolerance == SURGERY_TOLERANCE[4]
    assert [p.name for p in tmp_path.iterdir()] == ["dense.onnx"]


@pytest.mark.parametrize("fault", [reversed_rows, without_order, swapped_concat, wrong_bias])
@pytest.mark.parametrize(("op", "shape", "groups"), PIVOTED)
def test_faults_of_the_pivoted_form_fail(tmp_path, monkeypatch, op, shape, groups, fault):
    if fault is wrong_bias and op == "MatMul":
        pytest.skip("the bias of a MatMul is added behind the Concat")
    split = gp.split

    def sabotaged(model, *args, **options):
        split(model, *args, **options)
        if any(node.metadata_props.get(MARK) == CONCAT for node in model.graph):
            fault(model)

    monkeypatch.setattr(gp, "split", sabotaged)
    with pytest.raises(GateError, match="^surgery gate .folded split"):
        check_pivoted(saved(tmp_path, graph_of(op, shape, groups=groups)), "w")


@pytest.mark.parametrize("index", [1, 3])
@pytest.mark.parametrize(("op", "shape", "groups"), PIVOTED)
def test_pivots_in_a_run_are_drawn_too(op, shape, groups, index):
    (site,) = gp.find_sites(ir.from_proto(graph_of(op, shape, groups=groups)))
    pivots = drawn_pivots(site, "pivoted", index).pivots
    assert (np.diff(pivots) == 1).all()
    assert (pivots[:, 0] == 0).all() if index == 1 else (pivots[:, -1] == site.out_features - 1).all()


def test_a_permutation_that_is_folded_the_wrong_way_fails(tmp_path, monkeypatch):
    proto = onnx.load(mlp_onnx(tmp_path / "dense.onnx", sizes=(12, 16, 14, 10)))
    path = saved(tmp_path, onnx.shape_inference.infer_shapes(proto))
    assert check_pivoted(path, "fc1.weight", "fc2.weight").relative_l2 < SURGERY_TOLERANCE[4]
    permuted = fold_permutations._Permuted.__call__

    def sabotaged(self):
        return permuted(dataclasses.replace(self, order=np.argsort(self.order)))

    monkeypatch.setattr(fold_permutations._Permuted, "__call__", sabotaged)
    with pytest.raises(GateError, match="^surgery gate .folded split"):
        check_pivoted(path, "fc1.weight", "fc2.weight")


# -- hidden units, whose removal the full-rank check sees as a change of their order only


def unit_net(tmp_path):
    proto = onnx.load(mlp_onnx(tmp_path / "dense.onnx", sizes=(12, 16, 14, 10)))
    return saved(tmp_path, onnx.shape_inference.infer_shapes(proto))


def check_units(path, *names, bias=True):
    feeds = random_feeds(model_inputs(path), 2, 0)
    return surgery_check(path, dict.fromkeys(names, "units"), feeds, run_onnx(path, feeds), bias=bias)


def test_good_surgery_of_hidden_units_passes(tmp_path):
    path = unit_net(tmp_path)
    result = check_units(path, "fc2.weight", "fc3.weight")
    assert result.relative_l2 <= result.tolerance


@pytest.mark.parametrize("fault", ["other units", "no bias", "another order"])
def test_faults_in_the_removal_of_units_fail(tmp_path, monkeypatch, fault):
    path, keep = unit_net(tmp_path), hidden_units.HiddenUnits.keep_

    def sabotaged(self, right):
        if fault == "no bias":  # the maker's bias stays as long as before, cut at its end
            made = hidden_units._made
            monkeypatch.setattr(
                hidden_units,
                "_made",
                lambda tensor, axis, kept, make: made(
                    tensor, axis, kept, (lambda array, axis: array[:kept]) if tensor.shape.rank() == 1 else make
                ),
            )
        half = len(right) < self.count
        wrong = {"other units": right[:, ::-1], "another order": right[::-1]}.get(fault, right)
        keep(self, wrong if half else right)

    monkeypatch.setattr(hidden_units.HiddenUnits, "keep_", sabotaged)
    with pytest.raises(GateError, match="^surgery gate"):
        check_units(path, "fc2.weight")
