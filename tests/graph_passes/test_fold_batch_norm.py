import numpy as np
import onnx
import onnx_ir as ir
import pytest
from split_checks import assert_same_at_full_rank, error, graph, numbers, ops, run

from graph_passes import Fold, FoldBatchNormPass, Skip

SIGNATURE = "(float[N,3,6,6] x) => (float[N,4,4,4] y)"


def statistics(dtype="float32", size=4):
    named = {name: numbers(size, seed=seed, dtype=dtype) for seed, name in enumerate(("s", "b", "m"), 1)}
    return named | {"v": np.abs(numbers(size, seed=9, dtype=dtype)) + np.asarray(0.5, dtype)}


def conv_bn(
    body="h = Conv(x, w)  y = BatchNormalization<epsilon=0.01>(h, s, b, m, v)", signature=SIGNATURE, **constants
):
    return graph(body, signature=signature, **({"w": numbers(4, 3, 3, 3)} | statistics() | constants))


@pytest.mark.parametrize("bias", [False, True])
def test_fold_keeps_outputs_and_names(bias):
    body = "h = Conv(x, w, c)  y = BatchNormalization(h, s, b, m, v)"
    model = conv_bn(body, c=numbers(4, seed=7)) if bias else conv_bn()
    x = numbers(2, 3, 6, 6)
    expected = run(model, x=x)
    result = FoldBatchNormPass()(model)
    name = "c" if bias else "b"
    assert result.modified
    assert result.records == (Fold(node="y", conv="y", weight="w", bias=name),)
    assert error(run(model, x=x), expected) <= 1e-6
    assert error(2 * run(model, x=x), expected) > 0.9
    assert ops(model) == {"Conv": 1}
    assert sorted(model.graph.initializers) == sorted(["w", name])
    assert model.graph.outputs[0].name == "y"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not FoldBatchNormPass()(model).modified
    assert_same_at_full_rank(model, 1e-5, x=x)


def test_folded_in_float64_and_stored_in_the_weights_dtype():
    constants = statistics("float16") | {"w": numbers(4, 3, 3, 3, dtype="float16")}
    model = conv_bn(signature=SIGNATURE.replace("float", "float16"), **constants)
    FoldBatchNormPass()(model)
    s = constants["s"].astype(np.float64) / np.sqrt(constants["v"].astype(np.float64) + np.float32(0.01))
    expected = (s.reshape(4, 1, 1, 1) * constants["w"].astype(np.float64)).astype(np.float16)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), expected)


def test_a_weight_that_another_conv_needs_as_it_is_stays():
    body = "h = Conv(x, w)  n = BatchNormalization(h, s, b, m, v)  k = Conv(x, w)  y = Add(n, k)"
    model, x = conv_bn(body), numbers(2, 3, 6, 6)
    expected = run(model, x=x)
    (record,) = FoldBatchNormPass()(model).records
    assert isinstance(record, Skip)
    assert "'k'" in record.reason
    assert sorted(model.graph.initializers) == sorted("bmsvw")
    assert error(run(model, x=x), expected) == 0


def test_a_weight_that_is_the_convs_input_too_stays():
    body = "h = Conv(w, w)  n = BatchNormalization(h, s, b, m, v)  y = Add(x, n)"
    model = conv_bn(body, signature="(float[4,4,1,1] x) => (float[4,4,1,1] y)", w=numbers(4, 4, 3, 3))
    x = numbers(4, 4, 1, 1)
    expected = run(model, x=x)
    (record,) = FoldBatchNormPass()(model).records
    assert isinstance(record, Skip)
    assert error(run(model, x=x), expected) == 0


def test_shared_statistics_stay():
    body = (
        "h = Conv(x, w)  n = BatchNormalization(h, s, b, m, v)"
        "  k = Conv(x, u)  o = BatchNormalization(k, s, b, m, v)  y = Add(n, o)"
    )
    model, x = conv_bn(body, u=numbers(4, 3, 3, 3, seed=5)), numbers(2, 3, 6, 6)
    expected = run(model, x=x)
    assert [record.bias for record in FoldBatchNormPass()(model).records] == ["b_1", "b"]
    assert error(run(model, x=x), expected) <= 1e-6
    assert sorted(model.graph.initializers) == ["b", "b_1", "u", "w"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = Relu(x)  z = BatchNormalization(h, s, b, m, v)  y = Conv(z, w)", "input does not come from a Conv"),
        (
            "h = Conv(x, w)  n = BatchNormalization(h, s, b, m, v)  y = Add(h, n)",
            "the output of Conv 'h' is also used elsewhere",
        ),
        (
            "h = Conv(x, w)  y, p, q = BatchNormalization<training_mode=1>(h, s, b, m, v)",
            "training mode: the statistics are computed from the batch",
        ),
        (
            "e = Exp(x)  k = ReduceMax<keepdims=0, axes=[0,2,3]>(e)  h = Conv(x, w)  z = Conv(x, u)"
            "  o = BatchNormalization(z, k, k, k, k)  y = Conv(o, w)",
            "statistics or bias are not constant vectors with one number an output channel",
        ),
    ],
)
def test_reasons(body, reason):
    constants = statistics(size=3) if "h = Relu" in body else {}
    signature = SIGNATURE if "z = Conv" not in body else "(float[N,3,8,8] x) => (float[N,4,4,4] y)"
    model = conv_bn(body, signature, **constants, u=numbers(3, 3, 3, 3))
    (skip,) = FoldBatchNormPass()(model).records
    assert isinstance(skip, Skip)
    assert skip.reason == reason


def test_a_weight_of_too_few_axes_is_a_reason():
    """Found by fuzzing: one vector for the weight of the Conv and for all of the statistics."""
    model = conv_bn()
    conv = next(node for node in model.graph if node.op_type == "Conv")
    conv.replace_input_with(1, model.graph.initializers["s"])
    (skip,) = FoldBatchNormPass()(model).records
    assert skip.reason == "the Conv's weight has too few axes"


def test_overflow_is_refused():
    constants = statistics("float16") | {"s": np.full(4, 6e4, np.float16), "w": numbers(4, 3, 3, 3, dtype="float16")}
    model = conv_bn(signature=SIGNATURE.replace("float", "float16"), **constants)
    (skip,) = FoldBatchNormPass()(model).records
    assert skip.reason == "the folded numbers do not fit float16"
    assert ops(model) == {"Conv": 1, "BatchNormalization": 1}


def test_overridable_statistics_are_refused():
    model = conv_bn()
    model.graph.inputs.append(model.graph.initializers["m"])
    (skip,) = FoldBatchNormPass()(model).records
    assert skip.reason == "overridable: the weight, the bias or a statistic is a graph input too"


@pytest.mark.parametrize(("is_test", "folds"), [(0, False), (1, True)])
def test_before_opset_7_an_attribute_says_whether_it_learns(is_test, folds):
    constants = {"w": numbers(4, 3, 3, 3)} | statistics()
    body = f"h = Conv(x, w)  y = BatchNormalization<is_test={is_test}>(h, s, b, m, v)"
    proto = onnx.parser.parse_model(f'<ir_version: 4, opset_import: ["" : 6]> g {SIGNATURE} {{ {body} }}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    assert FoldBatchNormPass()(ir.from_proto(proto)).modified == folds
