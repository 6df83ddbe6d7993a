"""Weights inside model functions: Constants are split where they stand, arguments are not."""

import onnx
import onnx_ir as ir
import pytest
from split_checks import assert_same_at_full_rank, assert_sound, error, full_rank, model, numbers, run, splits

from graph_passes import find_sites, split

ARGUMENT = "inside the model function 'f', which takes the weight as an argument: inline functions first"
HEAD = '<ir_version: 9, opset_import: ["" : 17, "local" : 1]>'


def with_function(body, function, signature="(float[N,6] x) => (float[N,4] y)", **weights):
    text = f'{HEAD} g {signature} {{ {body} }} <opset_import: ["" : 17, "local" : 1], domain: "local"> {function}'
    return model(text, **weights)


def constant(name="k", shape=(6, 4), seed=0):
    numbers_ = ",".join(map(str, numbers(*shape, seed=seed).ravel()))
    return f"{name} = Constant<value = float[{','.join(map(str, shape))}] {{{numbers_}}}>()"


def test_constant_in_a_function_is_split_there():
    body = "a = local.f(x)  r = Relu(x)  b = local.f(r)  y = Add(a, b)"
    a_model = with_function(body, f"f (a) => (c) {{ {constant()}  c = MatMul(a, k) }}")
    x = numbers(3, 6)
    expected = run(a_model, x=x)
    (record,) = splits(split(a_model, full_rank))
    assert (record.weight, record.out_features) == ("k", 4)
    assert error(run(a_model, x=x), expected) <= 1e-6
    (function,) = a_model.functions.values()
    assert [node.op_type for node in function] == ["Constant", "Constant", "MatMul", "MatMul"]
    assert not a_model.graph.initializers
    assert_sound(a_model)


@pytest.mark.parametrize("ir_version", [8, 9, 10, 11])
def test_any_ir_version(ir_version):
    function = f"f (a) => (c) {{ {constant()}  t = Transpose(k)  c = Gemm<transB=1>(a, t) }}"
    a_model = with_function("y = local.f(x)", function)
    a_model.ir_version = ir_version
    assert_same_at_full_rank(a_model, 1e-6, x=numbers(3, 6))


def test_constant_in_an_if_in_a_function():
    function = f"""f (a) => (c) {{
        z = ReduceSum<keepdims=0>(a)  o = Constant<value = float {{0.0}}>()  p = Greater(z, o)  {constant("j", seed=1)}
        c = If (p) <
            then_branch = then_g () => (t) {{ {constant()}  t = MatMul(a, k) }},
            else_branch = else_g () => (e) {{ e = MatMul(a, j) }}
        >
    }}"""
    a_model = with_function("y = local.f(x)", function)
    x = numbers(3, 6)
    expected = run(a_model, x=-x)
    assert len(splits(assert_same_at_full_rank(a_model, 1e-6, x=x))) == 2
    assert error(run(a_model, x=-x), expected) <= 1e-6


def test_argument_is_refused():
    a_model = with_function("y = local.f(x, w)", "f (a, b) => (c) { c = MatMul(a, b) }", w=numbers(6, 4))
    (skip,) = find_sites(a_model)
    assert skip.reason == ARGUMENT


def test_argument_behind_a_transpose_and_two_functions_is_refused():
    text = f"""{HEAD} g (float[N,6] x) => (float[N,4] y) {{ y = local.h(x, w) }}
        <opset_import: ["" : 17, "local" : 1], domain: "local">
        h (a, b) => (c) {{ t = Transpose(b)  c = local.f(a, t) }}
        <opset_import: ["" : 17], domain: "local"> f (a, b) => (c) {{ c = MatMul(a, b) }}"""
    (skip,) = find_sites(model(text, w=numbers(4, 6)))
    assert skip.reason == ARGUMENT


def test_attention_scores_in_a_function_leave_no_record():
    a_model = with_function(
        "y = local.f(x, x)",
        "f (a, b) => (c) { t = Transpose(b)  c = MatMul(a, t) }",
        "(float[N,6] x) => (float[N,N] y)",
    )
    assert find_sites(a_model) == []


def test_attribute_of_a_function():
    function = "f <value> (a) => (c) { k = Constant<value : tensor = @value>()  c = MatMul(a, k) }"
    text = (
        f"{HEAD} g (float[N,6] x) => (float[N,4] y) {{ y = local.f<value = float[6,4] {{{','.join('1' * 24)}}}>(x) }}"
    )
    a_model = ir.from_proto(onnx.parser.parse_model(f'{text} <opset_import: ["" : 17], domain: "local"> {function}'))
    (skip,) = find_sites(a_model)
    assert skip.reason == "weight is an attribute of the model function: inline functions first"


@pytest.mark.parametrize(
    ("operator", "kind", "value"),
    [
        ("Gemm<transB: int = @t>(a, k)", "t", "1"),
        ("Gemm<beta: float = @t>(a, k)", "t", "0.5"),
        ("com.microsoft.FusedMatMul<alpha: float = @t>(a, k)", "t", "0.5"),
    ],
)
def test_operator_with_an_attribute_of_a_function(operator, kind, value):
    head = HEAD.replace('"local" : 1]', '"local" : 1, "com.microsoft" : 1]')
    function = f'<opset_import: ["" : 17, "com.microsoft" : 1], domain: "local"> f <{kind}> (a) => (c)'
    text = (
        f"{head} g (float[N,4] x) => (float[N,4] y) {{ y = local.f<{kind} = {value}>(x) }}"
        f"{function} {{ {constant(shape=(4, 4))}  c = {operator} }}"
    )
    (skip,) = find_sites(ir.from_proto(onnx.parser.parse_model(text)))
    assert (skip.weight, skip.reason) == (
        "k",
        "the node takes an attribute of the model function: inline functions first",
    )
