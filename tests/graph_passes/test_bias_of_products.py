"""Bias corrections of MatMul and FusedMatMul: into the Add behind, or into one of their own."""

import itertools

import numpy as np
import pytest
from bias_checks import assert_corrected, biased, delta_of
from split_checks import assert_sound, error, graph, numbers, ops, run
from test_split_fused import contrib

from graph_passes import Split, split

PRODUCTS = {
    "right": ("MatMul(x, w)", (6, 4), (3, 6), (4,)),
    "right, a vector": ("MatMul(x, w)", (6, 4), (6,), (4,)),
    "right, batched": ("MatMul(x, w)", (5, 1, 6, 4), (2, 3, 6), (5, 1, 1, 4)),
    "right, a batch of one": ("MatMul(x, w)", (1, 6, 4), (3, 6), (4,)),
    "left": ("MatMul(w, x)", (4, 6), (6, 3), (4, 1)),
    "left, more axes": ("MatMul(w, x)", (4, 6), (2, 6, 3), (4, 1)),
    "left, a vector": ("MatMul(w, x)", (4, 6), (6,), (4,)),
    "left, batched": ("MatMul(w, x)", (2, 4, 6), (6, 3), (2, 4, 1)),
    "left, a batch of one": ("MatMul(w, x)", (1, 4, 6), (6, 3), (1, 4, 1)),
}


def product(case: str, then: str = "", **constants: np.ndarray):
    """A model of the product (and what stands behind), its data, and the shape of the product's correction."""
    text, weight, data, shape = PRODUCTS[case]
    x, w = numbers(*data, seed=1), numbers(*weight)
    out = (x @ w if "x, w" in text else w @ x).shape
    signature = f"(float[{','.join(map(str, data))}] x) => (float[{','.join(map(str, out))}] y)"
    body = f"h = {text}  {then}" if then else f"y = {text}"
    return graph(body, signature=signature, w=w, **constants), x, shape, out


@pytest.mark.parametrize("case", PRODUCTS)
def test_an_add_takes_over_the_output(case):
    a_model, x, shape, out = product(case)
    delta = delta_of(int(np.prod(shape))).reshape(shape)
    records = assert_corrected(a_model, np.broadcast_to(delta, out), x=x)
    *_, second, add = a_model.graph
    assert (second.name, add.name, add.op_type) == (records[0].second_node, "y/bias", "Add")
    assert a_model.graph.outputs[0] is add.outputs[0]
    assert (second.outputs[0].name, second.outputs[0].shape) == ("y/left", a_model.graph.outputs[0].shape)
    assert a_model.graph.initializers["w.bias"].shape == shape


@pytest.mark.parametrize("case", PRODUCTS)
def test_the_add_behind_takes_it(case):
    shape = PRODUCTS[case][3]
    a_model, x, _, out = product(case, "y = Add(h, c)", c=numbers(*shape, seed=3))
    delta = delta_of(int(np.prod(shape))).reshape(shape)
    assert_corrected(a_model, np.broadcast_to(delta, out), x=x)
    assert ops(a_model) == {"MatMul": 2, "Add": 1}
    assert sorted(a_model.graph.initializers) == ["c", "w.left", "w.right"]
    assert error(a_model.graph.initializers["c"].const_value.numpy(), numbers(*shape, seed=3) + delta) <= 1e-6


@pytest.mark.parametrize(("c", "adds"), [((), 1), ((1,), 1), ((3, 4), 1), ((1, 1, 4), 1), ((3, 1), 2)])
def test_the_add_behind_may_broadcast_but_not_grow(c, adds):
    out = "float[1,3,4]" if len(c) == 3 else "float[3,4]"
    a_model = graph(
        "h = MatMul(x, w)  y = Add(c, h)", signature=f"(float[3,6] x) => ({out} y)", w=numbers(6, 4), c=numbers(*c)
    )
    assert_corrected(a_model, delta_of(4), x=numbers(3, 6))
    assert ops(a_model)["Add"] == adds


NO_FOLD = {
    "the output is used twice": "h = MatMul(x, w)  a = Add(h, c)  y = Mul(a, h)",
    "Add of two computed": "h = MatMul(x, w)  n = Neg(c)  y = Add(h, n)",
    "Add with itself": "h = MatMul(x, w)  y = Add(h, h)",
    "Sub": "h = MatMul(x, w)  y = Sub(h, c)",
}


@pytest.mark.parametrize("case", NO_FOLD)
def test_an_add_of_its_own_where_the_one_behind_will_not_do(case):
    body = NO_FOLD[case]
    w, c, x = numbers(6, 4), numbers(4, seed=3), numbers(3, 6)
    a_model = graph(body, w=w, c=c)
    expected = run(
        graph(body.replace("h = MatMul(x, w)", "g = MatMul(x, w)  h = Add(g, d)"), w=w, c=c, d=delta_of(4)), x=x
    )
    before = ops(a_model)["Add"]
    split(a_model, biased)
    assert ops(a_model)["Add"] == before + 1
    assert error(run(a_model, x=x), expected) <= 1e-6
    assert_sound(a_model)


def test_an_output_that_is_used_too():
    signature = "(float[N,6] x) => (float[N,4] h, float[N,4] y)"
    a_model, x = (
        graph("h = MatMul(x, w)  y = Add(h, c)", signature=signature, w=numbers(6, 4), c=numbers(4)),
        numbers(3, 6),
    )
    expected = run(a_model, x=x) + delta_of(4)
    split(a_model, biased)
    assert [value.name for value in a_model.graph.outputs] == ["h", "y"]
    assert np.array_equal(a_model.graph.initializers["c"].const_value.numpy(), numbers(4))
    assert error(run(a_model, x=x), expected) <= 1e-6
    assert_sound(a_model)


def test_constants_of_others_stay_and_are_not_changed():
    body = "h = MatMul(x, w)  a = Add(h, c)  b = Gemm(x, v, c)  d = Add(a, b)  y = Mul(d, c)"
    w, v, c, x = numbers(6, 4), numbers(6, 4, seed=1), numbers(4, seed=2), numbers(3, 6)
    a_model = graph(body, w=w, v=v, c=c)
    split(a_model, biased)
    assert np.array_equal(a_model.graph.initializers["c"].const_value.numpy(), c)
    assert {"c", "c_1", "c_2"} <= set(a_model.graph.initializers)
    assert error(run(a_model, x=x), (x @ (w + v) + 2 * (c + delta_of(4))) * c) <= 1e-5
    assert_sound(a_model)


def test_nodes_that_share_weight_and_bias_share_what_comes_of_them():
    body = "a = Gemm(x, w, c)  r = Relu(a)  b = Gemm(r, w, c)  m = MatMul(b, w)  y = Add(m, c)"
    signature, w, c, x = "(float[N,4] x) => (float[N,4] y)", numbers(4, 4), numbers(4, seed=1), numbers(3, 4)
    a_model, seen = graph(body, signature=signature, w=w, c=c), []
    split(a_model, lambda site: seen.append(site.node) or biased(site))
    total = c + delta_of(4)
    assert seen == ["a"]
    assert len(a_model.graph.initializers) == 3
    assert error(run(a_model, x=x), (np.maximum(x @ w + total, 0) @ w + total) @ w + total) <= 1e-5
    assert_sound(a_model)


def test_a_shared_weight_with_two_biases():
    body = "a = Gemm(x, w, c)  r = Relu(a)  h = MatMul(r, w)  y = Add(h, d)"
    signature = "(float[N,4] x) => (float[N,4] y)"
    w, c, d, x = numbers(4, 4), numbers(4, seed=1), numbers(4, seed=2), numbers(3, 4)
    a_model = graph(body, signature=signature, w=w, c=c, d=d)
    split(a_model, biased)
    assert sorted(a_model.graph.initializers) == ["c", "d", "w.left", "w.right"]
    assert error(run(a_model, x=x), np.maximum(x @ w + c + delta_of(4), 0) @ w + d + delta_of(4)) <= 1e-5
    assert_sound(a_model)


def test_an_add_in_a_branch_is_left_alone():
    body = """
        h = MatMul(x, w)  p = Constant<value = bool {1}>()
        y = If (p) <
            then_branch = then_g () => (float[N,4] t) { s = Cast<to=1>(c)  t = Add(h, s) },
            else_branch = else_g () => (float[N,4] e) { e = Relu(x4) }
        >
    """
    w, c, x = numbers(6, 4), numbers(4, dtype="float16"), numbers(3, 6)
    a_model = graph(body, signature="(float[N,6] x, float[N,4] x4) => (float[N,4] y)", w=w, c=c)
    split(a_model, biased)
    assert ops(a_model)["Add"] == 2
    assert error(run(a_model, x=x, x4=numbers(3, 4)), x @ w + delta_of(4) + c.astype(np.float32)) <= 1e-6
    assert_sound(a_model)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize(("trans_batch", "operand"), list(itertools.product([0, 1], "AB")))
def test_fused_matmul(alpha, trans_batch, operand):
    x, w = numbers(2, 3, 6), numbers(2, 6, 4)
    if operand == "A":
        x, w = numbers(2, 6, 3), numbers(2, 4, 6)
    stored = np.ascontiguousarray(np.moveaxis(w, 1, 0)) if trans_batch else w
    data = np.ascontiguousarray(np.moveaxis(x, 1, 0)) if trans_batch else x
    attributes = f"alpha={alpha:f}, transBatchA={trans_batch}, transBatchB={trans_batch}"
    body = f"y = com.microsoft.FusedMatMul<{attributes}>({'w, x' if operand == 'A' else 'x, w'})"
    out = (2, 4, 3) if operand == "A" else (2, 3, 4)
    signature = f"(float[{','.join(map(str, data.shape))}] x) => (float[{','.join(map(str, out))}] y)"
    a_model = contrib(body, signature, w=stored)
    expected = run(a_model, x=data) + delta_of(8).reshape((2, 4, 1) if operand == "A" else (2, 1, 4))
    (record,) = split(a_model, biased)
    assert isinstance(record, Split)
    assert error(run(a_model, x=data), expected) <= 1e-5
    assert all("already split" in skip.reason for skip in split(a_model, biased))
