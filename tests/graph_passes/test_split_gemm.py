import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_checks import (
    assert_same_at_full_rank,
    assert_sound,
    best_of_rank,
    error,
    graph,
    numbers,
    ops,
    run,
    truncated,
)

from graph_passes import split
from graph_passes.split_gemm import SplitGemmPass

BIAS_SHAPES = [None, (), (1,), (4,), (1, 4), (3, 1), (1, 1), (3, 4)]


def gemm(
    *, weight_input: str, trans_a: int, trans_b: int, alpha: float, beta: float, bias: tuple[int, ...] | None, opset=17
):
    """Y (3, 4) = alpha A' (3, 6) B' (6, 4) + beta C, with a constant B or A; returns the model and the data."""
    a, b = (6, 3) if trans_a else (3, 6), (4, 6) if trans_b else (6, 4)
    data, weight = (a, b) if weight_input == "B" else (b, a)
    inputs = "x, w" if weight_input == "B" else "w, x"
    constants = {"w": numbers(*weight)} | ({} if bias is None else {"c": numbers(*bias, seed=1)})
    body = (
        f"y = Gemm<alpha={alpha:f}, beta={beta:f}, transA={trans_a}, transB={trans_b}>"
        f"({inputs}{'' if bias is None else ', c'})"
    )
    signature = f"(float[{data[0]},{data[1]}] x) => (float[3,4] y)"
    return graph(body, signature=signature, opset=opset, **constants), numbers(*data, seed=2)


@given(
    weight_input=st.sampled_from("AB"),
    trans_a=st.integers(0, 1),
    trans_b=st.integers(0, 1),
    alpha=st.sampled_from([1.0, 0.5, -2.0]),
    beta=st.sampled_from([1.0, 0.25, -3.0]),
    bias=st.sampled_from(BIAS_SHAPES),
)
@settings(max_examples=30, deadline=None)
def test_any_gemm_at_full_rank(**attributes):
    model, x = gemm(**attributes)
    (record,) = assert_same_at_full_rank(model, 1e-5, x=x)
    out, into = (4, 6) if attributes["weight_input"] == "B" else (3, 6)
    assert (record.out_features, record.in_features, record.form) == (out, into, "gemm")
    assert ops(model) == {"MatMul": 1, "Gemm": 1}


@pytest.mark.parametrize("weight_input", "AB")
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_inner_shape_is_what_inference_says(weight_input, trans_a, trans_b):
    model, _ = gemm(weight_input=weight_input, trans_a=trans_a, trans_b=trans_b, alpha=1, beta=1, bias=(4,))
    split(model, best_of_rank(2))
    assert_sound(model)  # full_check compares the shape we wrote with the inferred one
    assert 2 in list(model.graph[0].outputs[0].shape)


def test_second_node_keeps_alpha_beta_and_bias():
    model, _ = gemm(weight_input="B", trans_a=0, trans_b=1, alpha=0.5, beta=-3.0, bias=(4,))
    SplitGemmPass(best_of_rank(2))(model)
    second = model.graph[1]
    assert (second.attributes["alpha"].as_float(), second.attributes["beta"].as_float()) == (0.5, -3.0)
    assert second.inputs[2].name == "c"
    assert "transB" not in second.attributes
    assert sorted(model.graph.initializers) == ["c", "w.left", "w.right"]


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_the_truncated_weight(rank):
    x, w, c = numbers(5, 6), numbers(4, 6), numbers(4)
    model = graph("y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, c)", w=w, c=c)
    split(model, best_of_rank(rank))
    expected = (0.5 * x @ truncated(w, rank).T + 2.0 * c).astype(np.float32)
    assert error(run(model, x=x), expected) <= 1e-6
    assert error(2 * run(model, x=x), expected) > 0.9
    assert error(run(model, x=x), (0.5 * x @ truncated(w, rank).T + c).astype(np.float32)) > 1e-2
    assert_sound(model)


@pytest.mark.parametrize("trans_a", [0, 1])
def test_oldest_opset(trans_a):
    model, x = gemm(weight_input="B", trans_a=trans_a, trans_b=1, alpha=1, beta=1, bias=(4,), opset=7)
    assert_same_at_full_rank(model, 1e-6, x=x)
