"""Bias corrections that go into an input: of Conv, ConvTranspose, FusedConv, Attention, Gemm and FusedGemm."""

import numpy as np
import pytest
from bias_checks import assert_corrected, biased, delta_of
from split_checks import error, full_rank, graph, numbers, ops, run, splits
from test_split_fused import contrib
from test_split_gemm import BIAS_SHAPES

from graph_passes import split

CONVS = {
    "Conv": ("Conv<group=2", (6, 2, 3, 3), (5, 5), ("channel", "input", "separable")),
    "ConvTranspose": ("ConvTranspose<group=2", (4, 3, 3, 3), (9, 9), ("input",)),
}


@pytest.mark.parametrize("bias", ["constant", "missing", "computed", "zeros", "behind Identity"])
@pytest.mark.parametrize(("op", "form"), [(op, form) for op, case in CONVS.items() for form in case[3]])
def test_convolutions(op, form, bias):
    head, weight, size, _ = CONVS[op]
    bodies = {
        "constant": f"y = {head}>(x, w, c)",
        "missing": f"y = {head}>(x, w)",
        "computed": f"a = ReduceMean<keepdims=0, axes=[0,2,3]>(x)  d = ReduceSum<keepdims=0>(a)  b = Add(c, d)"
        f"  y = {head}>(x, w, b)",
        "zeros": f"z = Constant<value = float[1] {{0}}>()  k = Constant<value_ints=[6]>()  e = Expand(z, k)"
        f"  y = {head}>(x, w, e)",
        "behind Identity": f"e = Identity(c)  y = {head}>(x, w, e)",
    }
    constants = {"w": numbers(*weight)} | ({} if bias in ("missing", "zeros") else {"c": numbers(6)})
    signature = f"(float[N,4,7,7] x) => (float[N,6,{size[0]},{size[1]}] y)"
    a_model, x = graph(bodies[bias], signature=signature, **constants), numbers(2, 4, 7, 7)
    source = lambda site: full_rank(site, form, delta_of(6))  # noqa: E731
    (record,) = assert_corrected(a_model, delta_of(6)[:, None, None], source=source, x=x)
    assert record.form == form
    expected = {"constant": ["c"], "missing": ["w.bias"], "computed": ["c", "w.bias"], "zeros": ["w.bias"]}
    names = expected.get(bias, ["c"])
    assert sorted(a_model.graph.initializers) == sorted([*names, "w.left", "w.right"])
    assert ops(a_model)["Add"] == 2 * (bias == "computed")
    assert ops(a_model)["Identity"] == ops(a_model)["Expand"] == 0


@pytest.mark.parametrize("inputs", ["x, w, c", "x, w", "x, w, c, z"])
def test_fused_conv_in_front_of_its_activation(inputs):
    def fused_conv(inputs, **constants):
        body = f'y = com.microsoft.FusedConv<activation="Relu", group=2, kernel_shape=[3,3], pads=[1,1,1,1]>({inputs})'
        return contrib(body, "(float[2,4,5,5] x) => (float[2,6,5,5] y)", w=numbers(6, 2, 3, 3), **constants)

    x, z = numbers(2, 4, 5, 5), {"z": numbers(2, 6, 5, 5)} if "z" in inputs else {}
    old = {"c": numbers(6)} if "c" in inputs else {}
    total = old.get("c", 0) + delta_of(6)
    expected = run(fused_conv(inputs if "c" in inputs else "x, w, c", c=total, **z), x=x)
    came = fused_conv(inputs, **old, **z)
    assert error(run(came, x=x), expected) > 1e-2
    assert len(splits(split(came, biased))) == 1
    assert error(run(came, x=x), expected) <= 1e-6


@pytest.mark.parametrize("bias", ["constant", "computed", "missing"])
def test_attention_in_front_of_the_attention(bias):
    signature = "(float[2,5,12] x) => (float[2,5,16] y)"
    head, w, x = "y = com.microsoft.Attention<num_heads=4>", numbers(12, 48), numbers(2, 5, 12)
    bodies = {"constant": f"{head}(x, w, b)", "computed": f"c = Neg(b)  {head}(x, w, c)", "missing": f"{head}(x, w)"}
    old = {"constant": numbers(48), "computed": -numbers(48), "missing": np.zeros(48, np.float32)}[bias]
    constants = {"w": w} | ({} if bias == "missing" else {"b": numbers(48)})
    came, dense = contrib(bodies[bias], signature, **constants), contrib(bodies["constant"], signature, w=w, b=old)
    expected = contrib(bodies["constant"], signature, w=w, b=old + delta_of(48))
    split(came, biased)
    assert error(run(came, x=x), run(expected, x=x)) <= 1e-5
    assert error(run(came, x=x), run(dense, x=x)) > 1e-2


@pytest.mark.parametrize("shape", BIAS_SHAPES)
@pytest.mark.parametrize("beta", [1.0, 0.25, -3.0, 0.0])
@pytest.mark.parametrize("weight_is_b", [True, False])
@pytest.mark.parametrize("computed", [False, True])
def test_gemm(shape, beta, weight_is_b, computed):
    inputs, computed = "x, w" if weight_is_b else "w, x", computed and shape is not None
    if shape is not None:
        inputs += ", d" if computed else ", c"
    body = f"{'d = Neg(c)  ' if computed else ''}y = Gemm<alpha=0.5, beta={beta:f}>({inputs})"
    constants = {"w": numbers(6, 4) if weight_is_b else numbers(3, 6)}
    constants |= {} if shape is None else {"c": numbers(*shape, seed=1)}
    data = (3, 6) if weight_is_b else (6, 4)
    a_model = graph(body, signature=f"(float[{data[0]},{data[1]}] x) => (float[3,4] y)", **constants)
    correction = delta_of(4) if weight_is_b else delta_of(3)[:, None]
    assert_corrected(a_model, np.broadcast_to(correction, (3, 4)), x=numbers(*data))
    assert ops(a_model)["Gemm"] == 1
    assert ops(a_model)["Add"] == (computed and beta != 0)


def test_gemm_and_its_c_are_as_they_should_be():
    w, c = numbers(6, 4), numbers(4, seed=1)
    a_model = graph("y = Gemm<beta=2.0>(x, w, c)", w=w, c=c)
    split(a_model, biased)
    assert sorted(a_model.graph.initializers) == ["c", "w.left", "w.right"]
    assert error(a_model.graph.initializers["c"].const_value.numpy(), c + delta_of(4) / 2) <= 1e-6
    a_model = graph("y = Gemm<beta=2.0>(x, w)", w=w)
    split(a_model, biased)
    assert np.array_equal(a_model.graph.initializers["w.bias"].const_value.numpy(), delta_of(4))
    assert "beta" not in a_model.graph[1].attributes


def test_fused_gemm_in_front_of_its_activation():
    body = 'y = com.microsoft.FusedGemm<activation="Relu", alpha=0.5, beta=2.0>(x, w, c)'
    signature, w, c, x = "(float[3,6] x) => (float[3,4] y)", numbers(6, 4), numbers(4), numbers(3, 6)
    came = contrib(body, signature, w=w, c=c)
    split(came, biased)
    assert error(run(came, x=x), np.maximum(0.5 * x @ w + 2 * c + delta_of(4), 0)) <= 1e-6
