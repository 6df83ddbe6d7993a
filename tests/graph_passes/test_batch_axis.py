"""The batch axis, proved operator by operator: what keeps samples apart, what mixes them, and runs that agree."""

# ruff: noqa: E501 (tables of models in text form)

import numpy as np
import onnx
import onnxruntime
import pytest
from batch_oracle import depends, parsed
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graph_passes.axis_rules.values import BatchPlace
from graph_passes.batch_axis import find_batch_axes, prove

NUMBER = "s = Shape(x)\n n = Gather(s, c0)\n "  # of samples, [n]
COUNT = NUMBER + "count = Squeeze(n)\n each = Range(s0, count, s1)\n "  # 0 to n - 1

# Every sample stays for itself: what it shows, body, opset
OLD_RUNTIME = onnxruntime.__version__.startswith("1.23.")  # cannot run all of these
KEEP = [
    ("element by element", "a = Relu(x) b = Mul(a, x) y = Tanh(b)", 18),
    ("broadcast", "y = Add(x, six)", 18),
    ("matrix product", "y = MatMul(x, w)", 18),
    ("product of samples", "t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(x, t)", 18),
    ("fused product", "y = com.microsoft.FusedMatMul<transB = 1, alpha = 0.5>(x, x)", 18),
    ("Gemm", "r = Reshape(x, rows) y = Gemm(r, w)", 18),
    ("Gemm of columns", "h = ReduceSum<keepdims = 0>(x, c1) t = Transpose(h) y = Gemm<transA = 1>(t, w)", 18),
    ("Einsum", 'y = Einsum<equation = "bij,bkj->bik">(x, x)', 18),
    ("convolution", "y = Conv<pads = [1, 1]>(x, kernel)", 18),
    ("softmax over the last axis", "y = Softmax<axis = -1>(x)", 18),
    ("softmax of opset 11, from axis 1 on", "y = Softmax(x)", 11),
    ("reduction over another axis", "m = ReduceMax(x, c2) y = Sub(x, m)", 18),
    ("reduction over nothing", "y = ReduceMean<noop_with_empty_axes = 1>(x)", 18),
    ("norm", "y = LpNormalization<axis = 1>(x)", 18),
    ("BatchNorm of stored statistics", "t = Transpose<perm = [0, 2, 1]>(x) y = BatchNormalization(t, six, six, six, six)", 18),
    ("sorting along another axis", "y, i = TopK<axis = 1>(x, c2)", 18),
    ("the best index", "m = ArgMax<axis = 2>(x) y = Cast<to = 1>(m)", 18),
    ("running sum along another axis", "y = CumSum(x, s1)", 18),
    ("flatten", "y = Flatten(x)", 18),
    ("shape arithmetic", NUMBER + "t = Concat<axis = 0>(n, minus) y = Reshape(x, t)", 18),
    ("tokens as rows and back", "r = Reshape(x, rows) z = Softmax(r) s = Shape(x) y = Reshape(z, s)", 18),
    ("time in front and back", "t = Transpose<perm = [1, 0, 2]>(x) r = Reshape(t, rows) z = Softmax(r)"
     " b = Reshape(z, time) y = Transpose<perm = [1, 0, 2]>(b)", 18),
    ("all of an axis", "y = Slice(x, c0, far, c0)", 18),
    ("as much of an axis as it has", NUMBER + "y = Slice(x, c0, n, c0)", 18),
    ("cut along another axis", "y = Slice(x, c1, c3, c1)", 18),
    ("join along another axis", "y = Concat<axis = 1>(x, x)", 18),
    ("a constant for every sample", NUMBER + "t = Concat<axis = 0>(n, c46) e = Expand(six, t) y = Concat<axis = 2>(e, x)", 18),
    ("zeros for every sample", NUMBER + "t = Concat<axis = 0>(n, c16) e = ConstantOfShape(t) y = Concat<axis = 1>(e, x)", 18),
    ("entries picked by each sample", "m = ArgMax<axis = 2, keepdims = 1>(x) y = GatherElements<axis = 2>(x, m)", 18),
    ("each picks from itself", COUNT + "i = Reshape(each, column) m = ReduceSum<keepdims = 0>(x, c2)"
     " j = ArgMax<axis = 1, keepdims = 1>(m) p = Concat<axis = 1>(i, j) y = GatherND(x, p)", 18),
    ("each picks from itself, flat", COUNT + "f = Reshape(x, minus) a = Mul(each, s24) b = Add(a, s4) y = Gather(f, b)", 18),
    ("padding of other axes", "y = Pad(x, pads)", 18),
    ("a stored scale", "q = QuantizeLinear(x, tenth, zero_point) y = DequantizeLinear(q, tenth, zero_point)", 18),
    ("one-hot", "a = ArgMax<axis = 2, keepdims = 0>(x) y = OneHot(a, s6, off_on)", 18),
    ("a loop over time", "h = ReduceSum<keepdims = 0>(x, c1) last, y = Loop(s4, yes, h) <body = b (int64 i, bool go, float[n, 6] old)"
     " => (bool on, float[n, 6] new, float[n, 6] out) { on = Identity(go) now = Gather<axis = 1>(x, i) sum = Add(old, now)"
     " new = Tanh(sum) out = Identity(new) }>", 18),
    ("a scan over time", "t = Transpose<perm = [1, 0, 2]>(x) h = ReduceSum<keepdims = 0>(x, c1) y, all = Scan(h, t)"
     " <num_scan_inputs = 1, body = b (float[n, 6] old, float[n, 6] now) => (float[n, 6] new, float[n, 6] out)"
     " { sum = Add(old, now) new = Tanh(sum) out = Identity(new) }>", 18),
    ("a branch that a constant chooses", "y = If(yes) <then_branch = a () => (float[n, 4, 6] u) { u = Neg(x) },"
     " else_branch = b () => (float v) { v = ReduceMax<keepdims = 0>(x) }>", 18),
    ("dropout that is off", "y = Dropout(x)", 18),
    ("what the outputs do not need", "m = ReduceMax(x) y = Neg(x)", 18),
]  # fmt: skip

# Samples meet: what it shows, body, opset, what the reason names
MIX = [
    ("reduction over everything", "m = ReduceMax<keepdims = 0>(x) y = Sub(x, m)", 18, "ReduceMax 'm' reduces over"),
    ("centered over the batch", "m = ReduceMean(x, c0) y = Sub(x, m)", 18, "ReduceMean 'm' reduces over"),
    ("softmax over the batch", "y = Softmax<axis = 0>(x)", 18, "Softmax 'y' normalizes over"),
    ("softmax of opset 11, from axis 0 on", "y = Softmax<axis = 0>(x)", 11, "Softmax 'y' normalizes over"),
    ("time-major softmax of opset 11", "t = Transpose<perm = [1, 0, 2]>(x) z = Softmax(t) y = Transpose<perm = [1, 0, 2]>(z)",
     11, "Softmax 'z' normalizes over the batch axis (axis 1 of 't')"),
    ("training BatchNorm", "t = Transpose<perm = [0, 2, 1]>(x) y, a, b = BatchNormalization<training_mode = 1>(t, six, six, six, six)",
     18, "BatchNormalization 'y' is in training mode"),
    ("norm over the batch", "y = LpNormalization<axis = 0>(x)", 18, "LpNormalization 'y' normalizes over"),
    ("running sum over the batch", "y = CumSum(x, s0)", 18, "CumSum 'y' adds up along"),
    ("sorting the batch", "v, i = TopK<axis = 0>(x, c1) y = Sub(x, v)", 18, "TopK 'v' sorts along"),
    ("the best sample", "m = ArgMax<axis = 0>(x) c = Cast<to = 1>(m) y = Add(x, c)", 18, "ArgMax 'm' reduces over"),
    ("x^T x", "f = Flatten(x) t = Transpose(f) g = MatMul(t, f) y = MatMul(f, g)", 18, "MatMul 'g' sums products over"),
    ("x x^T", "f = Flatten(x) t = Transpose(f) y = MatMul(f, t)", 18, "MatMul 'y' brings samples together"),
    ("Einsum over the batch", 'y = Einsum<equation = "bij,cij->bc">(x, x)', 18, "Einsum 'y' brings samples together"),
    ("attention over the batch", "t = Transpose<perm = [1, 0, 2]>(x) u = Transpose<perm = [1, 2, 0]>(x) s = MatMul(t, u)"
     " p = Softmax(s) o = MatMul(p, t) y = Transpose<perm = [1, 0, 2]>(o)", 18, "MatMul 's' brings samples together"),
    ("softmax over batch and tokens", "r = Reshape(x, rows) z = Softmax<axis = 0>(r) s = Shape(x) y = Reshape(z, s)", 18,
     "Softmax 'z' normalizes over the batch axis (axis 0 of 'r')"),
    ("the batch cut in pieces", "r = Reshape(x, time) z = Softmax<axis = 1>(r) s = Shape(x) y = Reshape(z, s)", 18,
     "Reshape 'r' cuts the batch axis"),
    ("the first sample for all", "g = Gather<axis = 0>(x, c0) y = Sub(x, g)", 18, "Gather 'g' picks entries along"),
    ("the first sample, sliced", "g = Slice(x, c0, c1, c0) y = Sub(x, g)", 18, "Slice 'g' cuts pieces out of"),
    ("the batch in reverse", "y = Slice(x, minus, back, c0, minus)", 18, "Slice 'y' cuts pieces out of"),
    ("joined along the batch", "y = Concat<axis = 0>(x, x)", 18, "Concat 'y' joins along"),
    ("divided by the number of samples", NUMBER + "f = Cast<to = 1>(n) y = Div(x, f)", 18, "Div 'y' computes with the size of the batch"),
    ("repeated by the number of samples", NUMBER + "t = Concat<axis = 0>(c1, c1, n) e = Expand(ones, c16) y = Tile(x, t)", 18, "Tile 'y'"),
    ("as many tokens as samples", NUMBER + "c = Slice(x, c0, n, c1) m = ReduceMax(c, c1) y = Sub(x, m)", 18, "Slice 'c' cuts axis 1"),
    ("the number of a sample", COUNT + "f = Cast<to = 1>(each) q = Reshape(f, long) y = Add(x, q)", 18, "the number that a sample has"),
    ("the next sample", COUNT + "a = Add(each, s1) b = Mod(a, count) y = Gather(x, b)", 18, "Mod 'b' computes with the size of the batch"),
    ("an entry of the next sample", COUNT + "f = Reshape(x, minus) a = Mul(each, s24) b = Mod(a, s4) y = Gather(f, b)", 18,
     "picks from one sample for another"),
    ("dynamic quantization", "q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z)", 18, "DynamicQuantizeLinear 'q'"),
    ("a loop as often as there are samples", COUNT + "h = ReduceSum<keepdims = 0>(x, c1) y, all = Loop(count, yes, h) <body = b (int64 i,"
     " bool go, float[n, 6] old) => (bool on, float[n, 6] new, float[n, 6] out) { on = Identity(go) new = Tanh(old) out = Identity(new) }>",
     18, "Loop 'y' runs as often as"),
    ("a running state over the batch", "f = ReduceSum<keepdims = 0>(x, c1) last, y = Scan(six, f) <num_scan_inputs = 1,"
     " body = b (float[6] old, float[6] now) => (float[6] new, float[6] out) { new = Add(old, now) out = Identity(new) }>", 18,
     "Scan 'last' runs along the batch axis"),
    ("a branch that samples choose", "m = ReduceMax<keepdims = 0>(x, c12) q = Squeeze(m, c0) g = Greater(q, tenth) y = If(g) <then_branch = a ()"
     " => (float[n, 4, 6] u) { u = Neg(x) }, else_branch = b () => (float[n, 4, 6] v) { v = Abs(x) }>", 18, "Squeeze 'q' removes"),
    ("a branch that the number of samples chooses", COUNT + "g = Greater(count, s1) y = If(g) <then_branch = a ()"
     " => (float[n, 4, 6] u) { u = Neg(x) }, else_branch = b () => (float[n, 4, 6] v) { v = Abs(x) }>", 18, "If 'y' takes one branch"),
    ("the batch as time of a convolution", "u = Transpose<perm = [2, 1, 0]>(x) y = Conv<pads = [1, 1]>(u, kernel)", 18,
     "Conv 'y' moves a window along"),
    ("all axes of size 1 removed", "z = Squeeze(x) y = Neg(z)", 18, "Squeeze 'z' removes every axis"),
    ("random numbers", "r = RandomNormalLike(x) y = Add(x, r)", 18, "RandomNormalLike 'r' draws"),
    ("which are not zero", "i = NonZero(x) y = Cast<to = 1>(i)", 18, "NonZero 'i'"),
    ("an operator of the batch inside a function", "y = local.center(x)", 18, "ReduceMean 'm' reduces over"),
]  # fmt: skip
FUNCTIONS = """
<domain: "local", opset_import: ["": 18]> center (a) => (b) { z = Constant<value_ints = [0]>() m = ReduceMean(a, z) b = Sub(a, m) }
"""


@pytest.mark.parametrize(("body", "opset"), [case[1:] for case in KEEP], ids=[case[0] for case in KEEP])
def test_samples_that_stay_apart(body, opset):
    model = parsed(body, opset=opset)
    proof = prove(model, {"x": 0})
    assert proof.holds, proof.reason
    place = proof.outputs["y"]
    if place.plain:
        found = depends(model, {"y": place.axis})
        assert found == "" or (OLD_RUNTIME and "does not run" in found)


@pytest.mark.parametrize(("body", "opset", "named"), [case[1:] for case in MIX], ids=[case[0] for case in MIX])
def test_samples_that_meet(body, opset, named):
    model = parsed(body, opset=opset, functions=FUNCTIONS if "local." in body else "")
    proof = prove(model, {"x": 0})
    assert named in proof.reason
    assert depends(model) != ""  # the oracle sees it too


def test_blocks_of_a_sample_are_told():
    flat = parsed("y = Reshape(x, rows)")
    assert prove(flat, {"x": 0}).outputs == {"y": BatchPlace(0, 1, 4)}
    time_major = parsed("t = Transpose<perm = [1, 0, 2]>(x) y = Reshape(t, rows)")
    assert prove(time_major, {"x": 0}).outputs == {"y": BatchPlace(0, 4, 1)}
    assert prove(parsed("z = Neg(six) y = Relu(z)"), {"x": 0}).outputs == {"y": None}


def recurrent(operator, **attributes):
    """A recurrent layer of `x (5, n, 4)` with its states `(1, n, 3)`; time comes first."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    weights = [
        onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal((1, gates * 3, size), np.float32), name)
        for name, size in (("W", 4), ("R", 3))
    ]
    node = helper.make_node(operator, ["x", "W", "R", "", "", "h"], ["y", "last"], "r", hidden_size=3, **attributes)
    given = (
        {"x": ["n", "t", 4], "h": ["n", 1, 3]} if attributes.get("layout") else {"x": ["t", "n", 4], "h": [1, "n", 3]}
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in given.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "last")]
    graph = helper.make_graph([node], "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_take_their_batch_from_axis_1(operator):
    model = recurrent(operator)
    proof = prove(model, {"x": 1, "h": 1})
    assert proof.outputs == {"y": BatchPlace(2), "last": BatchPlace(1)}
    assert depends(model, {"y": 2, "last": 1}, axis=1) == ""
    refused = prove(model, {"x": 0, "h": None})
    assert "steps through time along the batch axis" in refused.reason
    assert refused.feature
    first = prove(recurrent(operator, layout=1), {"x": 0, "h": 0})
    assert first.outputs == {"y": BatchPlace(0), "last": BatchPlace(0)}


@pytest.mark.parametrize(
    ("body", "inputs", "shapes", "axes"),
    [
        ("y = MatMul(x, w)", "float[n, 4, 6] x", {"x": (3, 4, 6)}, {"x": 0}),
        ("y = MatMul(x, w)", "float[time, batch, 6] x", {"x": (5, 3, 6)}, {"x": 1}),
        ("y = MatMul(x, w)", "float[6] x", {"x": (6,)}, {"x": None}),
        ("y = MatMul(x, w)", "float[3, 6] x", {"x": (3, 6)}, {"x": 0}),
        ("y = Neg(x)", "float x", {"x": ()}, {"x": None}),
        ("z = MatMul(x, w) y = Mul(z, scale)", "float[n, 6] x, float scale", {"x": (2, 6), "scale": ()}, {"x": 0, "scale": None}),
        ("y = Add(x, h)", "float[batch, 6] x, float[1, batch, 6] h", {"x": (3, 6), "h": (1, 3, 6)}, {"x": 0, "h": 1}),
        ("y = Add(x, h)", "float[a, 6] x, float[b, 6] h", {"x": (3, 6), "h": (3, 6)}, {"x": 0, "h": 0}),
        ("p = Softmax<axis = 0>(x) y = MatMul(p, w)", "float[5, 1, 6] x", {"x": (5, 1, 6)}, {"x": 1}),
        ("m = ReduceMax(x) y = Sub(x, m)", "float[8, 6] x", {"x": (8, 6)}, {"x": 0}),  # they mix: the first axis it is
        ("y = com.microsoft.BifurcationDetector(x)", "float[n, 6] x", {"x": (8, 6)}, {"x": 0}),  # nothing is known
        ("y = MatMul(x, w)", "float[n, 6] x, float[0, 6] none", {"x": (2, 6), "none": (0, 6)}, {"x": 0, "none": None}),
    ],
)  # fmt: skip
def test_the_batch_axis_is_found(body, inputs, shapes, axes):
    model = parsed(body, inputs)
    assert find_batch_axes(model, shapes) == axes


STEPS = [
    "{y} = Tanh({x})",
    "{y} = Softmax<axis = {a}>({x})",
    "{y} = LpNormalization<axis = {a}>({x})",
    "{y} = CumSum({x}, s{a})",
    "{y}m = ReduceMax({x}, c{a}) {y} = Sub({x}, {y}m)",
    "{y}m = ArgMax<axis = {a}>({x}) {y}c = Cast<to = 1>({y}m) {y} = Add({x}, {y}c)",
    "{y}m, {y}i = TopK<axis = {a}>({x}, c1) {y} = Sub({x}, {y}m)",
    "{y} = Transpose<perm = [1, 0, 2]>({x})",
    "{y} = Transpose<perm = [0, 2, 1]>({x})",
    "{y}s = Shape({x}) {y}r = Reshape({x}, flat) {y}z = Softmax<axis = {b}>({y}r) {y} = Reshape({y}z, {y}s)",
    "{y}s = Shape({x}) {y}r = Flatten<axis = {a}>({x}) {y}z = LpNormalization<axis = {b}>({y}r) {y} = Reshape({y}z, {y}s)",
    "{y}s = Shape({x}) {y}n = Gather({y}s, c{a}) {y}f = Cast<to = 1>({y}n) {y} = Div({x}, {y}f)",
    "{y}s = Shape({x}) {y}o = ConstantOfShape<value = float[1] {{2}}>({y}s) {y} = Mul({x}, {y}o)",
    "{y}g = Gather<axis = {a}>({x}, c0) {y} = Sub({x}, {y}g)",
    "{y}a = Slice({x}, c1, far, c{a}) {y}b = Slice({x}, c0, c1, c{a}) {y} = Concat<axis = {a}>({y}a, {y}b)",
    "{y}t = Transpose<perm = [0, 2, 1]>({x}) {y}m = MatMul({x}, {y}t) {y}z = Softmax({y}m) {y} = MatMul({y}z, {x})",
    "{y}s = Shape({x}) {y}n = Gather({y}s, s{a}) {y}r = Range(s0, {y}n, s1) {y} = Gather<axis = {b}>({x}, {y}r)",
    "{y}e = Unsqueeze({x}, c{a}) {y} = ReduceSum<keepdims = 0>({y}e, c{a})",
    "{y}s = Shape({x}) {y}r = Reshape({x}, minus) {y}z = Tanh({y}r) {y} = Reshape({y}z, {y}s)",
    "{y}q, {y}s, {y}p = DynamicQuantizeLinear({x}) {y} = DequantizeLinear({y}q, {y}s, {y}p)",
]
"""Steps that keep the shape, or swap axes."""


@st.composite
def chains(draw):
    """A model of random steps on `(n, 4, 6)`; some mix samples, some do not."""
    lines, value = [], "x"
    for number in range(draw(st.integers(1, 5))):
        step, name = draw(st.sampled_from(STEPS)), f"v{number}"
        lines.append(step.format(x=value, y=name, a=draw(st.integers(0, 2)), b=draw(st.integers(0, 1))))
        value = name
    return parsed("\n".join([*lines, f"y = Identity({value})"]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(chains())
def test_what_is_proved_is_so(model):
    proof = prove(model, {"x": 0})
    if proof.holds:
        shown = depends(model, {"y": proof.outputs["y"].axis})
        assert not shown or "does not run" in shown


def test_random_models_are_proved_and_refused():
    """Or else the test above shows nothing."""
    found = {prove(parsed(step.format(x="x", y="y", a=a, b=1)), {"x": 0}).holds for step in STEPS for a in range(3)}
    assert found == {True, False}
