"""A Gather that permutes channels goes where its readers can take the permutation in, and stays as it is elsewhere."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from split_checks import error, numbers, ops, run

from graph_passes import FoldPermutationsPass, fold_permutations
from graph_passes.marks import MARK, PERMUTATION

ORDER = np.array([3, 0, 4, 1, 5, 2])  # no involution: the wrong direction is another order
ROWS = "(float[N,6] x) => (float[N,A] y)"
TOKENS = "(float[N,3,6] x) => (float[N,S,A] y)"
PICTURE = "(float[N,6,4,4] x) => (float[N,C,H,W] y)"
FLAT = "(float[N,6,4,4] x) => (float[N,A] y)"


def permuted(body, signature=ROWS, *, opset=17, dtype=None, **constants):
    """Return a model from ONNX text; every Gather by `p...` is marked, and shapes are inferred."""
    imports = f'"" : {opset}, "com.microsoft" : 1, "ai.onnx.ml" : 3'
    proto = onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{imports}]> g {signature} {{ {body} }}")
    for name, array in ({"p": ORDER} | constants if "p =" not in body else constants).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in proto.graph.node:
        if node.op_type == "Gather" and node.input[1].startswith("p"):
            node.metadata_props.add(key=MARK, value=PERMUTATION)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def feed(model, seed=5):
    (x,) = [value for value in model.graph.inputs if not value.is_initializer()]
    return {"x": numbers(*(dim if isinstance(dim, int) else 2 for dim in x.shape), seed=seed)}


def gathers(model):
    return [node for node in model.graph.all_nodes() if node.metadata_props.get(MARK) == PERMUTATION]


def stored(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def positive(*shape, seed=0):
    return np.abs(numbers(*shape, seed=seed)) + np.float32(0.5)


def rows(step, **constants):
    """Return a case in which a step stands between the Gather and a product."""
    return f"g = Gather<axis=1>(x, p)  {step}  y = MatMul(h, b)", ROWS, {"b": numbers(6, 4)} | constants


def tokens(step, **constants):
    return f"g = Gather<axis=2>(x, p)  {step}  y = MatMul(h, b)", TOKENS, {"b": numbers(6, 4)} | constants


def picture(step, **constants):
    return f"g = Gather<axis=1>(x, p)  {step}", PICTURE, constants


UNARY = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "HardSwish", "Elu", "Neg", "Softplus", "Selu")
W = {"w": numbers(5, 6, 3, 3)}
CASES = {
    **{f"unary {name}": rows(f"h = {name}(g)") for name in UNARY},
    "clip": rows("low = Constant<value_float=-0.5>()  h = Clip(g, low)"),
    "casts": rows("d = Cast<to=11>(g)  e = Exp(d)  h = Cast<to=1>(e)"),
    "dropout": rows("h = Dropout(g)"),
    "com.microsoft.Gelu": rows("h = com.microsoft.Gelu(g)"),
    "com.microsoft.FastGelu": rows("h = com.microsoft.FastGelu(g, c)", c=numbers(6)),
    "com.microsoft.QuickGelu": rows("h = com.microsoft.QuickGelu<alpha=1.7>(g)"),
    "vector": rows("h = Sub(c, g)", c=numbers(6)),
    "vector behind layout": rows("t = Reshape(c, s)  h = Mul(g, t)", c=numbers(3, 2), s=np.array([1, 6])),
    "scalar": rows("h = Mul(g, c)", c=numbers(1)),
    "matrix": tokens("h = Add(c, g)", c=numbers(3, 6)),
    "prelu": rows("h = PRelu(g, c)", c=numbers(6)),
    "max": rows("h = Max(g, c, g)", c=numbers(6)),
    "silu": rows("s = Sigmoid(g)  h = Mul(g, s)"),
    "gelu of parts": rows(
        "a = Div(g, r)  e = Erf(a)  o = Add(e, u)  m = Mul(g, o)  h = Mul(m, f)",
        r=np.float32([1.4142135]), u=np.float32([1]), f=np.float32([0.5]),
    ),
    "layer norm": tokens("h = LayerNormalization(g, s, c)", s=positive(6), c=numbers(6, seed=1)),
    "layer norm of two axes": tokens("h = LayerNormalization<axis=1>(g, s)", s=positive(3, 6)),
    "layer norm of parts": tokens(
        "m = ReduceMean<axes=[2]>(g)  d = Sub(g, m)  q = Mul(d, d)  v = ReduceMean<axes=[-1]>(q)  r = Sqrt(v)"
        "  n = Div(d, r)  h = Mul(n, s)",
        s=positive(6),
    ),
    "skip layer norm": tokens(
        "k = Tanh(g)  h = com.microsoft.SkipLayerNormalization(g, k, s, c)", s=positive(6), c=numbers(6, seed=1)
    ),
    "softmax": rows("h = Softmax(g)"),
    "concat": tokens("h = Concat<axis=1>(g, g)"),
    "transpose": (
        "g = Gather<axis=2>(x, p)  t = Transpose<perm=[0,2,1]>(g)  h = Add(t, c)  y = MatMul(b, h)",
        TOKENS, {"c": numbers(6, 1), "b": numbers(4, 6)},
    ),
    "squeeze": rows("a = Unsqueeze(g, i)  r = Relu(a)  h = Squeeze(r, i)", i=np.array([1])),
    "rows of a batch": (
        "g = Gather<axis=2>(x, p)  h = Reshape(g, s)  m = MatMul(h, b)  y = Reshape(m, s3)",
        TOKENS, {"b": numbers(6, 4), "s": np.array([-1, 6]), "s3": np.array([-1, 3, 4])},
    ),
    "reductions elsewhere": tokens("m = ReduceMean<axes=[1]>(g)  h = Add(g, m)"),
    "split elsewhere": tokens("m, n, o = Split<axis=1>(g)  q = Mul(m, o)  h = Sub(q, n)"),
    "slice": tokens("h = Slice(g, i, j, i)", i=np.array([1]), j=np.array([3])),
    "reductions of it": (
        "g = Gather<axis=1>(x, p)  e = Exp(g)  a = ReduceSum(e, i)  b = ReduceMax<axes=[1]>(g)  y = Add(a, b)",
        ROWS, {"i": np.array([1])},
    ),
    "gather of it": (
        "g = Gather<axis=-1>(x, p)  r = Relu(g)  y = Gather<axis=1>(r, i)", ROWS, {"i": np.array([5, 0, -6, 2])},
    ),
    "int32 indices": (
        "g = Gather<axis=1>(x, p)  y = MatMul(g, b)", ROWS, {"b": numbers(6, 4), "p": ORDER.astype("i4")},
    ),
    "shape of it": (
        "g = Gather<axis=1>(x, p)  s = Shape(g)  z = ConstantOfShape(s)  m = MatMul(g, b)  y = Add(m, k)"
        "  unused = Add(z, z)",
        ROWS, {"b": numbers(6, 4), "k": numbers(4)},
    ),
    "scores": (
        "g = Gather<axis=2>(x, p)  k = Tanh(g)  t = Transpose<perm=[0,2,1]>(k)  y = MatMul(g, t)", TOKENS, {},
    ),
    "gemm": ("g = Gather<axis=1>(x, p)  y = Gemm(g, b, c)", ROWS, {"b": numbers(6, 4), "c": numbers(4)}),
    "gemm transB": ("g = Gather<axis=1>(x, p)  y = Gemm<transB=1, alpha=2.0>(g, b)", ROWS, {"b": numbers(4, 6)}),
    "gemm transA": (
        "g = Gather<axis=1>(x, p)  t = Transpose(g)  y = Gemm<transA=1>(t, b)", ROWS, {"b": numbers(6, 4)},
    ),
    "gemm on the right": (
        "g = Gather<axis=1>(x, p)  h = Gemm<transB=1>(a, g)  y = Transpose(h)", ROWS, {"a": numbers(4, 6)},
    ),
    "addend of a gemm": (
        "g = Gather<axis=1>(x, p)  s = Gemm(x, b, g)  y = MatMul(s, d)", ROWS, {"b": numbers(6, 6), "d": numbers(6, 4)},
    ),
    "weight behind layout": (
        "g = Gather<axis=1>(x, p)  t = Transpose(b)  k = Cast<to=1>(t)  y = MatMul(g, k)",
        ROWS, {"b": numbers(4, 6, dtype="float16")},
    ),
    "fused matmul": (
        "g = Gather<axis=1>(x, p)  h = com.microsoft.FusedMatMul<transB=1>(g, b)  y = Relu(h)",
        ROWS, {"b": numbers(4, 6)},
    ),
    "batched weight": (
        "g = Gather<axis=2>(x, p)  y = MatMul(g, b)", "(float[2,3,6] x) => (float[2,3,4] y)", {"b": numbers(2, 6, 4)},
    ),
    "lstm": (
        "g = Gather<axis=2>(x, p)  t = Tanh(g)  y, h, c = LSTM<hidden_size=3>(t, w, r)",
        "(float[4,2,6] x) => (float[A,D,N,H] y)", {"w": numbers(1, 12, 6), "r": numbers(1, 12, 3)},
    ),
    "attention": (
        "g = Gather<axis=2>(x, p)  y = com.microsoft.Attention<num_heads=2>(g, w, b)",
        TOKENS, {"w": numbers(6, 12), "b": numbers(12)},
    ),
    "conv": picture("h = Relu(g)  y = Conv<pads=[1,1,1,1]>(h, w)", **W),
    "conv transpose": picture("y = ConvTranspose(g, w)", w=numbers(6, 5, 3, 3)),
    "depthwise conv": picture("h = Conv<group=6>(g, d, e)  y = Conv(h, w)", d=numbers(6, 1, 2, 2), e=numbers(6), **W),
    "depthwise conv of twice the channels": picture(
        "h = Conv<group=6>(g, d, e)  y = Conv(h, w)", d=numbers(12, 1, 2, 2), e=numbers(12), w=numbers(5, 12, 2, 2)
    ),
    "batch norm": picture(
        "h = BatchNormalization(g, s, c, m, v)  y = Conv(h, w)",
        s=positive(6), c=numbers(6), m=numbers(6, seed=2), v=positive(6, seed=3), **W,
    ),
    "instance norm": picture("h = InstanceNormalization(g, s, c)  y = Conv(h, w)", s=positive(6), c=numbers(6), **W),
    "pools": picture(
        "a = MaxPool<kernel_shape=[2,2]>(g)  c = AveragePool<kernel_shape=[2,2]>(a)  h = LpPool<kernel_shape=[1,1]>(c)"
        "  y = Conv(h, w)",
        w=numbers(5, 6, 2, 2),
    ),
    "global pools": picture(
        "a = GlobalAveragePool(g)  m = GlobalMaxPool(g)  h = Sub(a, m)  y = Conv(h, w)", w=numbers(5, 6, 1, 1)
    ),
    "pad and resize": picture(
        "h = Pad(g, q)  u = Resize(h, none, z)  y = Conv(u, w)",
        q=np.array([0, 0, 1, 0, 0, 0, 0, 1]), none=np.float32([]), z=np.float32([1, 1, 2, 2]), **W,
    ),
    "flatten": ("g = Gather<axis=1>(x, p)  h = Flatten(g)  y = Gemm(h, b)", FLAT, {"b": numbers(96, 4)}),
    "reshape to rows": (
        "g = Gather<axis=1>(x, p)  r = Relu(g)  h = Reshape(r, s)  y = MatMul(h, b)",
        FLAT, {"b": numbers(96, 4), "s": np.array([0, -1])},
    ),
    "channels last": (
        "g = Gather<axis=1>(x, p)  t = Transpose<perm=[0,2,3,1]>(g)  l = LayerNormalization(t, s)  y = MatMul(l, b)",
        PICTURE, {"b": numbers(6, 4), "s": positive(6)},
    ),
    "vgg": (
        "g = Gather<axis=1>(x, p)  a = Relu(g)  c = Conv<pads=[1,1,1,1]>(a, w)  q = Gather<axis=1>(c, p2)  e = Relu(q)"
        "  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e)  f = Flatten(m)  y = Gemm<transB=1>(f, b, d)",
        FLAT, {"w": numbers(5, 6, 3, 3), "p2": np.array([2, 4, 1, 0, 3]), "b": numbers(7, 20), "d": numbers(7)},
    ),
}  # fmt: skip


def case(name):
    body, signature, constants = CASES[name]
    return permuted(body, signature, **constants)


def wrong_way(monkeypatch):
    right = fold_permutations._Permuted
    monkeypatch.setattr(
        fold_permutations, "_Permuted", lambda weight, place, order: right(weight, place, np.argsort(order))
    )


@pytest.mark.parametrize("name", CASES)
def test_outputs_stay(name):
    model = case(name)
    x, size = feed(model), len(stored(model))
    expected = run(model, **x)
    result = FoldPermutationsPass()(model)
    assert result.kept == ()
    assert result.modified
    assert not gathers(model)
    onnx.checker.check_model(ir.to_proto(model))
    assert error(run(model, **x), expected) <= 2e-6
    assert len(stored(model)) < size
    assert not FoldPermutationsPass()(model).modified


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("reductions of it", "scores")])
def test_the_wrong_direction_is_noticed(name, monkeypatch):
    model = case(name)
    x = feed(model)
    expected = run(model, **x)
    wrong_way(monkeypatch)
    FoldPermutationsPass()(model)
    assert error(run(model, **x), expected) > 1e-2


B = {"b": numbers(6, 4)}
REFUSED = {
    "output": ("y = Gather<axis=1>(x, p)", ROWS, {}, "output"),
    "output behind a path": ("g = Gather<axis=1>(x, p)  y = Relu(g)", ROWS, {}, "output"),
    "residual": ("g = Gather<axis=1>(x, p)  h = Add(g, x)  y = MatMul(h, b)", ROWS, B, "'h' needs 'x'"),
    "one path of two": (
        "g = Gather<axis=1>(x, p)  h = MatMul(g, b)  k = Add(g, x)  m = MatMul(k, b2)  y = Add(h, m)",
        ROWS, B | {"b2": numbers(6, 4)}, "'k' needs 'x'",
    ),
    "unknown operator": ("g = Gather<axis=1>(x, p)  y = com.microsoft.Unknown(g)", ROWS, {}, "unknown operator"),
    "running sum": (
        "g = Gather<axis=1>(x, p)  h = CumSum(g, i)  y = MatMul(h, b)", ROWS, B | {"i": np.array(1)}, "CumSum",
    ),
    "largest place": ("g = Gather<axis=1>(x, p)  h = ArgMax<axis=1>(g)  y = Cast<to=1>(h)", ROWS, {}, "ArgMax"),
    "old hardmax": ("g = Gather<axis=1>(x, p)  h = Hardmax(g)  y = MatMul(h, b)", ROWS, B, "Hardmax"),
    "split of the channels": ("g = Gather<axis=1>(x, p)  h, k = Split<axis=1>(g)  y = Mul(h, k)", ROWS, {}, "Split"),
    "heads": (
        "g = Gather<axis=2>(x, p)  h = Reshape(g, s)  y = ReduceSum<keepdims=0>(h, i)",
        TOKENS, {"s": np.array([-1, 3, 2, 3]), "i": np.array([3])}, "Reshape",
    ),
    "other use of the weight": (
        "g = Gather<axis=1>(x, p)  h = MatMul(g, b)  k = MatMul(x, b)  y = Add(h, k)", ROWS, B, "'k' needs 'b'",
    ),
    "both ways": (
        "g = Gather<axis=1>(x, p)  h = Add(g, c)  t = Transpose(c2)  y = MatMul(h, c2)  z = Relu(c)",
        "(float[N,6] x) => (float[N,A] y, float[B] z)", {"c": numbers(6), "c2": numbers(6, 6)}, "'z' needs 'c'",
    ),
    "weight of two axes": (
        "g = Gather<axis=1>(x, p)  h = MatMul(g, b)  k = Gemm<transB=1>(g, b)  y = Add(h, k)",
        ROWS, {"b": numbers(6, 6)}, "needs 'b'",
    ),
    "product of a computed weight": (
        "g = Gather<axis=1>(x, p)  e = Exp(b)  y = MatMul(g, e)", ROWS, B, "needs 'e'",
    ),
    "positions beyond the axis": (
        "g = Gather<axis=1>(x, p)  y = Gather<axis=1>(g, i)", ROWS, {"i": np.array([6])}, "6 channels",
    ),
    "numbers of channels in attributes": (
        "g = Gather<axis=1>(x, p)  h = ai.onnx.ml.Scaler<offset=[0.0,1.0,2.0,3.0,4.0,5.0], scale=[1.0]>(g)"
        "  y = MatMul(h, b)",
        ROWS, B, "Scaler",
    ),
    "groups": ("g = Gather<axis=1>(x, p)  y = Conv<group=2>(g, w)", PICTURE, {"w": numbers(4, 3, 3, 3)}, "Conv"),
    "padded channels": (
        "g = Gather<axis=1>(x, p)  h = Pad(g, q)  y = MatMul(h, b)", ROWS,
        {"q": np.array([0, 1, 0, 0]), "b": numbers(7, 4)}, "Pad",
    ),
    "concat of the channels": (
        "g = Gather<axis=1>(x, p)  h = Concat<axis=1>(g, x)  y = MatMul(h, b)", ROWS, {"b": numbers(12, 4)}, "Concat",
    ),
    "no permutation": (
        "g = Gather<axis=1>(x, p)  y = MatMul(g, b)", ROWS, B | {"p": np.array([0, 1, 2, 3, 3, 5])}, "permutation",
    ),
    "part of the axis": (
        "g = Gather<axis=1>(x, p)  y = MatMul(g, b)", ROWS, {"p": np.array([1, 0]), "b": numbers(2, 4)}, "permute axis",
    ),
    "unknown shape": ("g = Gather<axis=1>(x, p)  y = MatMul(g, b)", "(float x) => (float y)", B, "shape"),
    "subgraph": (
        "g = Gather<axis=1>(x, p)  y = If(t) <then_branch = a () => (float[N,A] o) { o = MatMul(g, b) },"
        " else_branch = c () => (float[N,A] u) { u = MatMul(x, b) }>",
        ROWS, B | {"t": np.array(True)}, "subgraph",
    ),
    "pool with places": (
        "g = Gather<axis=1>(x, p)  h, i = MaxPool<kernel_shape=[2,2]>(g)  k = Cast<to=1>(i)  l = Add(h, k)"
        "  y = Conv(l, w)",
        PICTURE, {"w": numbers(5, 6, 2, 2)}, "MaxPool",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_change_nothing(name):
    body, signature, constants, reason = REFUSED[name]
    model = permuted(body, signature, **constants)
    before = stored(model)
    result = FoldPermutationsPass()(model)
    assert not result.modified
    (skip,) = result.kept
    assert skip.node == gathers(model)[0].outputs[0].name
    assert reason in skip.reason
    assert stored(model) == before


@pytest.mark.parametrize("name", ["b", "p"])
def test_overridable_constants_are_refused(name):
    model = permuted("g = Gather<axis=1>(x, p)  y = MatMul(g, b)", **B)
    model.graph.inputs.append(model.graph.initializers[name])
    before = stored(model)
    assert not FoldPermutationsPass()(model).modified
    assert stored(model) == before
    model.ir_version = 3  # every initializer is an input there
    assert FoldPermutationsPass()(model).modified == (name == "b")


def test_a_function_is_refused():
    model = permuted("g = Gather<axis=1>(x, p)  h = Relu(g)  y = MatMul(h, b)", **B)
    call = next(node for node in model.graph if node.op_type == "Relu")
    inner = ir.Node("", "CumSum", [ir.Value(name="a"), ir.Value(name="i")])
    graph = ir.Graph(inner.inputs, inner.outputs, nodes=[inner], opset_imports={"": 17})
    model.functions[call.op_identifier()] = ir.Function(call.domain, "Relu", graph=graph, attributes=[])
    (skip,) = FoldPermutationsPass()(model).kept
    assert "function" in skip.reason
    assert len(gathers(model)) == 1


def test_a_malformed_node_is_a_reason():
    model = permuted("g = Gather<axis=1>(x, p)  h = Transpose<perm=[1,0]>(g)  y = MatMul(b, h)", b=numbers(4, 6))
    node = next(node for node in model.graph if node.op_type == "Transpose")
    node.attributes["perm"] = ir.AttrFloat32s("perm", [0.5])
    (skip,) = FoldPermutationsPass()(model).kept
    assert "Transpose" in skip.reason


def test_equal_numbers_may_be_shared():
    body = "g = Gather<axis=1>(x, p)  h = Mul(g, c)  m = MatMul(h, b)  k = Mul(x, c)  n = MatMul(k, b2)  y = Add(m, n)"
    model = permuted(body, c=np.full(6, 2, np.float32), b2=numbers(6, 4, seed=1), **B)
    x = feed(model)
    expected = run(model, **x)
    assert FoldPermutationsPass()(model).modified
    assert error(run(model, **x), expected) <= 1e-6


def test_users_that_are_folded_together_may_share_a_weight():
    body = "g = Gather<axis=1>(x, p)  r = Relu(g)  h = MatMul(g, b)  k = MatMul(r, b)  s = Shape(b)  y = Sub(h, k)"
    model = permuted(body, **B)
    x = feed(model)
    expected = run(model, **x)
    assert FoldPermutationsPass()(model).modified
    assert error(run(model, **x), expected) <= 1e-6
    assert sorted(model.graph.initializers) == ["b"]


def test_constant_nodes_are_permuted():
    body = "b = Constant<value_floats=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]>()  p = Constant<value_ints=[3, 0, 4, 1, 5, 2]>()"
    model = permuted(f"{body}  g = Gather<axis=1>(x, p)  y = MatMul(g, b)", "(float[N,6] x) => (float[N] y)")
    x = feed(model)
    expected = run(model, **x)
    assert FoldPermutationsPass()(model).modified
    assert ops(model) == {"Constant": 1, "MatMul": 1}
    assert error(run(model, **x), expected) <= 1e-6


def test_an_identity_goes_whatever_reads_it():
    model = permuted("g = Gather<axis=1>(x, p)  h = Add(g, x)  y = CumSum(h, i)", p=np.arange(6), i=np.array(1))
    x = feed(model)
    expected = run(model, **x)
    assert FoldPermutationsPass()(model).folded
    assert ops(model) == {"Add": 1, "CumSum": 1}
    assert error(run(model, **x), expected) == 0


GATE = "u = Gather<axis=1>(a, p)  v = Gather<axis=1>(x, p2)  s = Sigmoid(u)"
GATE += "  t = Mul(u, s)  h = Mul(t, v)  y = MatMul(h, b)"


@pytest.mark.parametrize("is_equal", [False, True])
def test_of_two_permutations_of_a_gate_one_or_none_stays(is_equal):
    second = ORDER if is_equal else np.array([1, 5, 0, 2, 4, 3])
    model = permuted(f"a = MatMul(x, c)  {GATE}", p2=second, c=numbers(6, 6), **B)
    x = feed(model)
    expected = run(model, **x)
    FoldPermutationsPass()(model)
    assert len(gathers(model)) == (0 if is_equal else 1)
    assert error(run(model, **x), expected) <= 1e-6


def test_the_branch_of_a_residual_block_is_folded_and_its_stream_is_not():
    body = (
        "n = LayerNormalization(x, s)  u = MatMul(n, w)  g = Gather<axis=2>(u, p)  a = Add(g, c)"
        "  h = com.microsoft.Gelu(a)  d = MatMul(h, b)  k = Gather<axis=2>(d, p2)  y = Add(x, k)"
    )
    model = permuted(
        body, TOKENS, s=positive(6), w=numbers(6, 6), c=numbers(6), b=numbers(6, 6, seed=3), p2=ORDER[::-1].copy()
    )
    x = feed(model)
    expected = run(model, **x)
    result = FoldPermutationsPass()(model)
    assert (len(result.folded), len(result.kept)) == (1, 1)
    assert [node.outputs[0].name for node in gathers(model)] == ["k"]
    assert error(run(model, **x), expected) <= 1e-6


def test_an_mlp_with_many_permutations():
    body, constants = "h0 = Relu(x)", {}
    for layer in range(4):
        constants |= {f"w{layer}": numbers(6, 6, seed=layer), f"c{layer}": numbers(6, seed=layer)}
        constants[f"p{layer}"] = np.random.default_rng(layer).permutation(6)
        body += f"  m{layer} = MatMul(h{layer}, w{layer})  g{layer} = Gather<axis=1>(m{layer}, p{layer})"
        body += f"  a{layer} = Add(g{layer}, c{layer})  h{layer + 1} = Gelu(a{layer})"
    model = permuted(f"{body}  y = MatMul(h4, b)", opset=20, **constants, **B)
    x = feed(model)
    expected = run(model, **x)
    assert len(FoldPermutationsPass()(model).folded) == 4
    assert error(run(model, **x), expected) <= 2e-6


def test_weights_in_a_file_are_permuted_when_they_are_saved(tmp_path):
    model = permuted("g = Gather<axis=1>(x, p)  y = MatMul(g, b)", b=numbers(6, 300))
    x = feed(model)
    expected = run(model, **x)
    ir.save(model, tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=1024)
    read = ir.load(tmp_path / "model.onnx")
    assert FoldPermutationsPass()(read).modified
    assert isinstance(read.graph.initializers["b"].const_value, ir.LazyTensor)
    assert error(run(read, **x), expected) <= 1e-6
    ir.save(read, tmp_path / "folded.onnx", external_data="folded.data", size_threshold_bytes=1024)
    assert (tmp_path / "folded.data").stat().st_size == (tmp_path / "model.data").stat().st_size
    again = ir.load(tmp_path / "folded.onnx")
    ir.external_data.load_to_model(again)
    assert error(run(again, **x), expected) <= 1e-6


STEPS = (
    "Relu({})", "Sigmoid({})", "Mul({}, {})", "Max({}, {})", "Add({}, c)", "Mul(m, {})", "Sub({}, z)", "Softmax({})",
    "LayerNormalization({}, s, c)", "MatMul({}, w)", "MatMul({}, w2)", "Gather<axis=1>({}, p1)",
    "Gather<axis=1>({}, p2)", "Add({}, x)", "Unsqueeze({}, i)",
)  # fmt: skip


@st.composite
def bodies(draw):
    """Draw a graph that begins with a Gather; every step reads one or two of the last values."""
    body, values = ["v = Gather<axis=1>(x, p)"], ["v"]
    for number in range(draw(st.integers(1, 8))):
        step = draw(st.sampled_from(STEPS))
        one, two = (draw(st.sampled_from(values[-3:])) for _ in range(2))
        if "Unsqueeze" in step:
            body.append(f"u{number} = {step.format(one)}  v{number} = Squeeze(u{number}, i)")
        else:
            body.append(f"v{number} = {step.format(one, two)}")
        values.append(f"v{number}")
    return "  ".join([*body, f"y = MatMul({values[-1]}, b)"])


@settings(max_examples=50, deadline=None)
@given(bodies())
def test_random_graphs_keep_their_outputs(body):
    constants = {
        "c": numbers(6),
        "s": positive(6, seed=2),
        "m": numbers(6, seed=4),
        "z": numbers(1),
        "i": np.array([1]),
    }
    constants |= {"w": numbers(6, 6), "w2": numbers(6, 6, seed=1), "b": numbers(6, 4, seed=9)}
    constants |= {"p1": ORDER[::-1].copy(), "p2": np.array([1, 5, 0, 2, 4, 3])}
    model = permuted(body, **constants)
    x, before, count = feed(model), stored(model), len(gathers(model))
    expected = run(model, **x)
    result = FoldPermutationsPass()(model)
    assert len(gathers(model)) == count - len(result.folded)
    assert len(result.folded) + len(result.kept) == count
    assert error(run(model, **x), expected) <= 1e-5
    assert result.modified or stored(model) == before
    event(f"{len(result.folded)} of {count} folded")
