"""Weights that are graph inputs too: overridable since IR version 4, a formality before."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from split_checks import assert_same_at_full_rank, assert_sound, error, full_rank, graph, numbers, ops, run, splits

from graph_passes import Dense, FoldBatchNormPass, Site, find_sites, split
from graph_passes.split_matmul import SplitMatMulPass

REASON = "overridable: the weight is a graph input too, remove it from the inputs"


def overridable(body, **weights):
    model = graph(body, **weights)
    model.graph.inputs.extend(model.graph.initializers[name] for name in weights)
    return model


def test_skipped_unless_the_user_says_it_is_constant():
    model = overridable("y = MatMul(x, w)", w=numbers(6, 4))
    before = ir.to_proto(model).SerializeToString()
    (skip,) = split(model, full_rank)
    assert skip.reason == REASON
    assert (skip.weight, skip.out_features, skip.in_features) == ("w", 4, 6)
    assert ir.to_proto(model).SerializeToString() == before
    (site,) = find_sites(model, overridable=True)
    assert isinstance(site, Site)


def test_the_input_of_a_split_weight_goes_and_others_stay():
    model, x = overridable("a = MatMul(x, w)  y = MatMul(a, v)", w=numbers(6, 5), v=numbers(5, 4)), numbers(3, 6)
    expected = run(model, x=x)
    records = split(model, lambda site: full_rank(site) if site.weight == "w" else Dense(reason="no"), overridable=True)
    assert len(splits(records)) == 1
    assert [value.name for value in model.graph.inputs] == ["x", "v"]
    assert sorted(model.graph.initializers) == ["v", "w.left", "w.right"]
    assert error(run(model, x=x), expected) <= 1e-6
    assert_sound(model)


def test_a_shared_weight_goes_with_its_last_user():
    model = overridable("a = MatMul(x, w)  b = MatMul(x, w)  y = Add(a, b)", w=numbers(6, 4))
    assert SplitMatMulPass(full_rank, overridable=True)(model).modified
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert_sound(model)


def old_model(body, opset=8, **weights):
    model = graph(body, opset=opset, **weights)
    model.ir_version = 3
    model.graph.inputs.extend(model.graph.initializers[name] for name in weights)
    return model


def test_ir_version_3_keeps_factors_in_constant_nodes():
    model = old_model("h = MatMul(x, w)  y = Gemm(h, v, c)", w=numbers(6, 5), v=numbers(5, 4), c=numbers(4))
    assert len(splits(assert_same_at_full_rank(model, 1e-6, x=numbers(3, 6)))) == 2
    assert [value.name for value in model.graph.inputs] == ["x", "c"]
    assert list(model.graph.initializers) == ["c"]
    assert ops(model) == {"Constant": 4, "MatMul": 3, "Gemm": 1}
    assert model.ir_version == 3


def test_ir_version_3_with_constants_in_an_if_branch():
    weight = ",".join(map(str, numbers(24)))
    body = f"""
        z = ReduceSum<keepdims=0>(x)  o = Constant<value = float {{0.0}}>()  c = Greater(z, o)
        y = If (c) <
            then_branch = then_g () => (float[N,4] t) {{ t = MatMul(x, w) }},
            else_branch = else_g () => (float[N,4] e) {{
                k = Constant<value = float[6,4] {{{weight}}}>()
                e = MatMul(x, k)
            }}
        >
    """
    model = old_model(body, opset=9, w=numbers(6, 4))
    x = np.abs(numbers(3, 6))
    expected = run(model, x=x)
    assert len(splits(assert_same_at_full_rank(model, 1e-6, x=-x))) == 2
    assert error(run(model, x=x), expected) <= 1e-6


@pytest.mark.parametrize("ir_version", [3, 8])
def test_fold_batch_norm(ir_version):
    constants = {"w": numbers(4, 3, 3, 3)} | {name: np.abs(numbers(4, seed=i)) for i, name in enumerate("sbmv")}
    model = graph(
        "h = Conv(x, w)  y = BatchNormalization(h, s, b, m, v)",
        signature="(float[N,3,6,6] x) => (float[N,4,4,4] y)",
        opset=8,
        **constants,
    )
    model.graph.inputs.extend(model.graph.initializers[name] for name in constants)
    model.ir_version = ir_version
    x = numbers(2, 3, 6, 6)
    expected = run(model, x=x)
    if ir_version > 3:
        assert not FoldBatchNormPass()(model).modified
    assert FoldBatchNormPass(overridable=True)(model).modified
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert error(run(model, x=x), expected) <= 1e-6
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_same_at_full_rank(model, 1e-5, x=x)
