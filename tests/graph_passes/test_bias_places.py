"""Bias corrections in subgraphs, functions, old files, other dtypes and joint splits; and wrong ones."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bias_checks import assert_corrected, biased, delta_of
from split_checks import assert_sound, error, full_rank, graph, model, numbers, ops, run, splits

from graph_passes import find_sites, split


def test_in_an_if_branch():
    body = """
        z = ReduceSum<keepdims=0>(x)  o = Constant<value_float=0.0>()  p = Greater(z, o)
        y = If (p) <
            then_branch = then_g () => (float[N,4] t) { t = MatMul(x, w) },
            else_branch = else_g () => (float[N,4] e) { f = MatMul(x, v)  e = Add(f, c) }
        >
    """
    a_model = graph(body, w=numbers(6, 4, seed=3), v=numbers(6, 4, seed=4), c=numbers(4))
    x = np.abs(numbers(3, 6))
    other = run(a_model, x=-x) + delta_of(4)
    assert_corrected(a_model, delta_of(4), x=x)
    assert error(run(a_model, x=-x), other) <= 1e-5
    assert ops(a_model)["Add"] == 2


def test_in_a_loop_body():
    body = """
        n = Constant<value_int=3>()  c = Constant<value = bool {1}>()
        y = Loop (n, c, x) <body = body_g (int64 i, bool c_in, float[N,6] s) => (bool c_out, float[N,6] t) {
            c_out = Identity(c_in)  t = MatMul(s, w)
        }>
    """
    w, x = numbers(6, 6) / np.float32(3), numbers(3, 6)
    a_model = graph(body, signature="(float[N,6] x) => (float[N,6] y)", w=w)
    split(a_model, biased)
    expected = x
    for _ in range(3):
        expected = expected @ w + delta_of(6)
    assert error(run(a_model, x=x), expected) <= 1e-5
    assert_sound(a_model)


@pytest.mark.parametrize(
    "inner", ["c = MatMul(a, k)", "m = MatMul(a, k)  c = Add(m, j)", "c = Gemm(a, k, j)", "c = Gemm(a, k)"]
)
def test_in_a_function(inner):
    def constant(name, *shape):
        values = ",".join(map(str, numbers(*shape).ravel()))
        return f"{name} = Constant<value = float[{','.join(map(str, shape))}] {{{values}}}>()"

    a_model = model(
        '<ir_version: 9, opset_import: ["" : 17, "local" : 1]> g (float[N,6] x) => (float[N,4] y) { y = local.f(x) }'
        '<opset_import: ["" : 17], domain: "local"> f (a) => (c)'
        f"{{ {constant('k', 6, 4)} {constant('j', 4)} {inner} }}"
    )
    assert_corrected(a_model, delta_of(4), x=numbers(3, 6))
    (function,) = a_model.functions.values()
    assert sum(node.op_type == "Add" for node in function) == ("MatMul" in inner)
    assert not a_model.graph.initializers


def test_on_the_left_in_a_function_the_data_may_be_a_vector():
    values = ",".join(map(str, numbers(24)))
    a_model = model(
        '<ir_version: 9, opset_import: ["" : 17, "local" : 1]> g (float[6] x) => (float[4] y) { y = local.f(x) }'
        '<opset_import: ["" : 17], domain: "local"> f (a) => (c)'
        f"{{ k = Constant<value = float[4,6] {{{values}}}>()  c = MatMul(k, a) }}"
    )
    before = ir.to_proto(a_model).SerializeToString()
    (skip,) = split(a_model, biased)
    assert skip.reason == "a bias of a weight on the left needs the data's shape: infer shapes first"
    assert ir.to_proto(a_model).SerializeToString() == before
    assert len(splits(split(a_model, full_rank))) == 1


def test_ir_version_3():
    a_model, x = (
        graph("h = MatMul(x, w)  y = Gemm(h, v, c)", opset=8, w=numbers(6, 5), v=numbers(5, 4), c=numbers(4)),
        numbers(3, 6),
    )
    a_model.ir_version = 3
    a_model.graph.inputs.extend(a_model.graph.initializers[name] for name in "wvc")
    expected = (x @ numbers(6, 5) + delta_of(5)) @ numbers(5, 4) + numbers(4) + delta_of(4)
    split(a_model, biased)
    assert [value.name for value in a_model.graph.inputs] == ["x"]
    assert error(run(a_model, x=x), expected) <= 1e-5
    assert_sound(a_model)


@pytest.mark.parametrize("overridable", [False, True])
def test_a_bias_that_is_a_graph_input(overridable):
    a_model, x, c = graph("y = Gemm(x, w, c)", w=numbers(6, 4), c=numbers(4)), numbers(3, 6), numbers(4, seed=5)
    a_model.graph.inputs.append(a_model.graph.initializers["c"])
    split(a_model, biased, overridable=overridable)
    assert [value.name for value in a_model.graph.inputs] == (["x"] if overridable else ["x", "c"])
    feeds, old = ({}, numbers(4)) if overridable else ({"c": c}, c)
    assert error(run(a_model, x=x, **feeds), x @ numbers(6, 4) + old + delta_of(4)) <= 1e-6
    assert_sound(a_model)


def test_opset_6_has_no_add_for_it():
    text = '<ir_version: 4, opset_import: ["" : 6]> g (float[N,6] x) => (float[N,4] y) { y = MatMul(x, w) }'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers(6, 4), "w"))
    a_model = ir.from_proto(proto)
    (skip,) = split(a_model, biased)
    assert skip.reason == "opset 6: older than 7, which a bias needs"
    assert len(splits(split(a_model, full_rank))) == 1


@pytest.mark.parametrize("body", ["y = MatMul(x, t)", "h = MatMul(x, t)  y = Add(h, s)", "y = Gemm(x, t, s)"])
def test_behind_a_cast(body):
    w, c, x = numbers(6, 4, dtype="float16"), numbers(4, dtype="float16"), numbers(3, 6)
    a_model = graph(f"t = Cast<to=1>(w)  s = Cast<to=1>(c)  {body}", w=w, c=c)
    delta = delta_of(4).astype(np.float16).astype(np.float32)
    assert_corrected(a_model, delta, tolerance=2e-3, x=x)
    assert all(value.dtype == ir.DataType.FLOAT16 for name, value in a_model.graph.initializers.items())


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes(dtype):
    name, tolerance = {"float16": ("float16", 5e-3), "float64": ("double", 1e-13)}[dtype]
    w, x = numbers(6, 4, dtype=dtype), numbers(3, 6, dtype=dtype)
    a_model = graph("y = MatMul(x, w)", signature=f"({name}[N,6] x) => ({name}[N,4] y)", w=w)
    expected = run(a_model, x=x) + delta_of(4).astype(dtype)
    split(a_model, biased)
    assert error(run(a_model, x=x), expected) <= tolerance
    assert_sound(a_model)


def test_joint_products_get_their_own_part():
    body = "q = MatMul(x, a)  k = Gemm<transB=1>(x, b, c)  v = MatMul(x, d)  s = Add(q, k)  y = Mul(s, v)"
    constants = {"a": numbers(6, 4), "b": numbers(4, 6, seed=1), "c": numbers(4), "d": numbers(6, 4, seed=2)}
    a_model, x = graph(body, **constants), numbers(3, 6)
    q, k, v = x @ constants["a"], x @ constants["b"].T + constants["c"], x @ constants["d"]
    dq, dk, dv = np.split(delta_of(12), 3)
    records = splits(split(a_model, biased, joint=True))
    assert {record.joint for record in records} == {("a", "b", "d")}
    assert error(run(a_model, x=x), (q + dq + k + dk) * (v + dv)) <= 1e-5
    assert error(run(a_model, x=x), (q + dk + k + dq) * (v + dk)) > 1e-2
    assert_sound(a_model)


def test_marks_and_metadata():
    a_model = graph("y = MatMul(x, w)", w=numbers(6, 4))
    a_model.graph[0].metadata_props["origin"] = "layer 3"
    split(a_model, biased)
    assert [node.metadata_props["rsi_deploy.split"] for node in a_model.graph] == ["right", "left", "bias"]
    assert [node.metadata_props["origin"] for node in a_model.graph] == ["layer 3"] * 3
    for node in a_model.graph:
        node.metadata_props.clear()
    assert not splits(split(a_model, biased))


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.ones(3, np.float32), r"MatMul 'y', weight 'w': expected a bias \(4,\), but got \(3,\)"),
        (np.full(4, np.nan, np.float32), "MatMul 'y', weight 'w': expected a finite bias, but got NaN or infinity"),
    ],
)
def test_wrong_biases_name_the_site(bias, message):
    a_model = graph("y = MatMul(x, w)", w=numbers(6, 4))
    before = ir.to_proto(a_model).SerializeToString()
    with pytest.raises(ValueError, match=message):
        split(a_model, lambda site: full_rank(site, bias=bias))
    assert ir.to_proto(a_model).SerializeToString() == before


def test_the_comparison_rejects_wrong_corrections():
    signature, x = "(float[N,2,5,5] x) => (float[N,6,5,5] y)", numbers(2, 2, 5, 5)

    def distance(change):
        a_model = graph("y = Conv<pads=[1,1,1,1]>(x, w, c)", signature=signature, w=numbers(6, 2, 3, 3), c=numbers(6))
        expected = run(a_model, x=x) + delta_of(6)[:, None, None]
        split(a_model, lambda site: full_rank(site, "input", change(delta_of(6))))
        return error(run(a_model, x=x), expected)

    assert distance(lambda d: d) <= 1e-6
    assert distance(lambda d: -d) > 1e-1
    assert distance(lambda d: d[::-1]) > 1e-1
    assert distance(lambda d: 0 * d) > 1e-1


def test_every_site_says_how_many_numbers_its_bias_has():
    a_model = graph("h = MatMul(x, w)  y = Gemm(h, v)", w=numbers(6, 5), v=numbers(5, 4))
    assert [site.bias_size for site in find_sites(a_model)] == [5, 4]
