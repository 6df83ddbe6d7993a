import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_checks import (
    assert_same_at_full_rank,
    assert_sound,
    best_of_rank,
    error,
    full_rank,
    graph,
    numbers,
    ops,
    run,
    truncated,
)

from graph_passes import SplitFactors, find_sites, split
from graph_passes.split_matmul import SplitMatMulPass

ON_THE_RIGHT = "y = MatMul(x, w)"
ON_THE_LEFT = "y = MatMul(w, x)"


def test_constant_on_the_right_at_full_rank():
    model = graph(ON_THE_RIGHT, w=numbers(6, 4))
    (record,) = assert_same_at_full_rank(model, 1e-6, x=numbers(3, 6))
    assert (record.out_features, record.in_features, record.rank, record.form) == (4, 6, 4, "matmul")
    assert ops(model) == {"MatMul": 2}
    first, second = model.graph
    assert (first.name, second.name) == (record.first_node, record.second_node)
    assert list(model.graph.initializers) == ["w.right", "w.left"]
    assert model.graph.initializers["w.right"].shape == (6, 4)
    assert [str(dim) for dim in first.outputs[0].shape] == ["N", "4"]
    assert first.outputs[0].dtype == model.graph.outputs[0].dtype


def test_constant_on_the_left_at_full_rank():
    model = graph(ON_THE_LEFT, signature="(float[2,6,N] x) => (float[2,4,N] y)", w=numbers(4, 6))
    (record,) = assert_same_at_full_rank(model, 1e-6, x=numbers(2, 6, 3))
    assert (record.out_features, record.in_features) == (4, 6)
    first, _ = model.graph
    assert [str(dim) for dim in first.outputs[0].shape] == ["2", "4", "N"]


@pytest.mark.parametrize(
    ("body", "weight_shape", "signature"),
    [(ON_THE_RIGHT, (6, 4), "(float[6] x) => (float[4] y)"), (ON_THE_LEFT, (4, 6), "(float[6] x) => (float[4] y)")],
)
def test_data_is_a_vector(body, weight_shape, signature):
    model = graph(body, signature=signature, w=numbers(*weight_shape))
    assert_same_at_full_rank(model, 1e-6, x=numbers(6))
    assert list(model.graph[0].outputs[0].shape) == [4]


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    batch=st.lists(st.integers(1, 3), max_size=2),
    is_right=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_at_full_rank(rows, columns, batch, is_right):
    dims = ",".join(map(str, batch + ([2, columns] if is_right else [columns, 2])))
    out = ",".join(map(str, batch + ([2, rows] if is_right else [rows, 2])))
    weight = numbers(columns, rows) if is_right else numbers(rows, columns)
    body = ON_THE_RIGHT if is_right else ON_THE_LEFT
    model = graph(body, signature=f"(float[{dims}] x) => (float[{out}] y)", w=weight)
    assert_same_at_full_rank(model, 1e-5, x=numbers(*map(int, dims.split(","))))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_is_the_truncated_weight(rank):
    x, w = numbers(5, 6), numbers(6, 4)
    model = graph(ON_THE_RIGHT, w=w)
    (record,) = split(model, best_of_rank(rank))
    assert record.rank == rank
    assert error(run(model, x=x), x @ truncated(w, rank)) <= 1e-6
    assert_sound(model)


def test_comparison_rejects_wrong_models():
    x, w = numbers(3, 4), numbers(4, 4)

    def split_with(change):
        def source(site):
            factors = full_rank(site)
            return SplitFactors(**{"left": factors.left, "right": factors.right, **change(factors)})

        model = graph(ON_THE_RIGHT, signature="(float[N,4] x) => (float[N,4] y)", w=w)
        split(model, source)
        return error(run(model, x=x), x @ w)

    assert split_with(lambda f: {}) <= 1e-6
    assert split_with(lambda f: {"left": 2 * f.left}) > 0.9
    assert split_with(lambda f: {"left": f.left.swapaxes(1, 2)}) > 0.1
    assert split_with(lambda f: {"right": f.right.swapaxes(1, 2)}) > 0.1


def test_a_vector_is_refused():
    model = graph(ON_THE_RIGHT, signature="(float[2,3,6] x) => (float[2,3] y)", w=numbers(6))
    (skip,) = find_sites(model)
    assert (skip.node, skip.weight, skip.reason) == ("y", "w", "weight has 1 axes: only matrices are split")


@pytest.mark.parametrize(
    ("body", "weight", "data", "out"),
    [
        (ON_THE_RIGHT, (2, 6, 4), (2, 3, 6), (2, 3, 4)),
        (ON_THE_RIGHT, (2, 6, 4), (3, 6), (2, 3, 4)),
        (ON_THE_RIGHT, (5, 1, 6, 4), (2, 3, 6), (5, 2, 3, 4)),
        (ON_THE_RIGHT, (1, 6, 4), (7, 5, 3, 6), (7, 5, 3, 4)),
        (ON_THE_LEFT, (2, 4, 6), (2, 6, 3), (2, 4, 3)),
        (ON_THE_LEFT, (2, 4, 6), (6, 3), (2, 4, 3)),
        (ON_THE_LEFT, (5, 1, 4, 6), (2, 6, 3), (5, 2, 4, 3)),
    ],
)
def test_batched_weight_is_one_factorization_an_entry(body, weight, data, out):
    signature = f"(float[{','.join(map(str, data))}] x) => (float[{','.join(map(str, out))}] y)"
    x, w = numbers(*data, seed=1), numbers(*weight)
    model = graph(body, signature=signature, w=w)
    (site,) = find_sites(model)
    assert (site.groups, site.out_features, site.in_features) == (int(np.prod(weight[:-2])), 4, 6)
    assert_same_at_full_rank(model, 1e-6, x=x)
    model = graph(body, signature=signature, w=w)
    split(model, best_of_rank(2))
    expected = np.matmul(*((x, truncated(w, 2)) if body == ON_THE_RIGHT else (truncated(w, 2), x)))
    assert error(run(model, x=x), expected) <= 1e-6
    assert_sound(model)


@pytest.mark.parametrize(("body", "weight"), [(ON_THE_RIGHT, (2, 6, 4)), (ON_THE_LEFT, (2, 4, 6))])
def test_batched_weight_and_maybe_a_vector(body, weight):
    model = graph(body, signature="(float[6] x) => (float[2,4] y)", w=numbers(*weight))
    (skip,) = find_sites(model)
    assert skip.reason.startswith("weight is batched and the data is a vector")
    model.graph.inputs[0].shape = model.graph.outputs[0].shape = None
    (skip,) = find_sites(model)
    assert skip.reason == "weight is batched and the data's shape is unknown: infer shapes first"


def test_unknown_shape_of_the_data_and_known_shape_of_the_output():
    model = graph(ON_THE_RIGHT, signature="(float[3,6] x) => (float[2,3,4] y)", w=numbers(2, 6, 4))
    model.graph.inputs[0].shape = None
    assert len(split(model, full_rank)) == 1
    assert error(run(model, x=numbers(3, 6)), numbers(3, 6) @ numbers(2, 6, 4)) <= 1e-6


def test_attention_scores_leave_no_record():
    model = graph("t = Transpose(x)  y = MatMul(x, t)", signature="(float[N,6] x) => (float[N,N] y)")
    assert find_sites(model) == []


def test_two_constants_are_refused():
    model = graph(
        "z = MatMul(v, w)  y = Add(x, z)",
        signature="(float[3,4] x) => (float[3,4] y)",
        v=numbers(3, 6),
        w=numbers(6, 4),
    )
    (skip,) = find_sites(model)
    assert skip.reason == "both operands are constant: fold constants first"


def test_pass_alone_splits_its_family_and_returns_records():
    model = graph("h = MatMul(x, w)  y = Gemm(h, v)", w=numbers(6, 5), v=numbers(5, 4))
    result = SplitMatMulPass(full_rank)(model)
    assert result.modified
    assert [record.node for record in result.records] == ["h"]
    assert ops(model) == {"MatMul": 2, "Gemm": 1}
    assert not SplitMatMulPass(full_rank)(model).modified


def test_float64_accumulates_no_float32():
    model = graph(ON_THE_RIGHT, signature="(double[N,6] x) => (double[N,4] y)", w=numbers(6, 4, dtype="float64"))
    assert_same_at_full_rank(model, 1e-14, x=numbers(3, 6, dtype="float64"))


def test_float16():
    w = numbers(6, 4, dtype="float16")
    model = graph(ON_THE_RIGHT, signature="(float16[N,6] x) => (float16[N,4] y)", w=w)
    assert_same_at_full_rank(model, 5e-3, x=numbers(3, 6, dtype="float16"))
    assert model.graph.initializers["w.left"].const_value.numpy().dtype == np.float16
