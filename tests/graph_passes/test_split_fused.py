"""onnxruntime's own operators: FusedMatMul, FusedGemm, FusedConv, Attention."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_checks import best_of_rank, error, full_rank, numbers, ops, run, truncated

from graph_passes import Site, find_sites, split

HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'


def contrib(body, signature, **initializers):
    proto = onnx.parser.parse_model(f"{HEAD} g {signature} {{ {body} }}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in initializers.items())
    return ir.from_proto(proto)


def assert_same(model, tolerance, **feeds):
    """At full rank the outputs are equal, a second run changes nothing, and the checker is content."""
    expected = run(model, **feeds)
    (site,) = find_sites(model)
    assert isinstance(site, Site)
    (record,) = split(model, full_rank)
    assert error(run(model, **feeds), expected) <= tolerance
    assert error(1.001 * run(model, **feeds).astype(np.float64), expected.astype(np.float64)) > tolerance
    onnx.checker.check_model(ir.to_proto(model))
    before = ir.to_proto(model).SerializeToString()
    assert all("already split" in skip.reason for skip in split(model, full_rank))
    assert ir.to_proto(model).SerializeToString() == before
    return record


def turned(matrix, trans, trans_batch):
    """The operand that `FusedMatMul` turns into (*batch, rows, columns)."""
    if trans:
        matrix = matrix.swapaxes(-1, -2)
    return np.ascontiguousarray(np.moveaxis(matrix, -2, 0) if trans_batch else matrix)


def dims(array):
    return ",".join(map(str, array.shape))


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    trans_a=st.booleans(),
    trans_b=st.booleans(),
    batch_a=st.booleans(),
    batch_b=st.booleans(),
    weight_input=st.sampled_from("AB"),
    matrix=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_fused_matmul(batch, trans_a, trans_b, batch_a, batch_b, weight_input, matrix):
    if matrix or not batch:  # onnxruntime moves batch axes only where both operands have them
        batch_a = batch_b = False
    a, b = numbers(*batch, 3, 6), numbers(*batch, 6, 4, seed=1)
    expected = 0.5 * (a @ b)
    if matrix and weight_input == "B":
        b = numbers(6, 4, seed=1)
        expected = 0.5 * (a @ b)
    a, b = turned(a, trans_a, batch_a), turned(b, trans_b, batch_b)
    x, w = (a, b) if weight_input == "B" else (b, a)
    attributes = (
        f"alpha=0.5, transA={int(trans_a)}, transB={int(trans_b)}, "
        f"transBatchA={int(batch_a)}, transBatchB={int(batch_b)}"
    )
    inputs = "x, w" if weight_input == "B" else "w, x"
    signature = f"(float[{dims(x)}] x) => (float[{dims(expected)}] y)"
    model = contrib(f"y = com.microsoft.FusedMatMul<{attributes}>({inputs})", signature, w=w)
    assert error(run(model, x=x), expected.astype(np.float32)) <= 1e-6  # as we read the operator's definition
    record = assert_same(model, 1e-5, x=x)
    out, into = (4, 6) if weight_input == "B" else (3, 6)
    assert (record.out_features, record.in_features) == (out, into)


def test_fused_matmul_low_rank():
    x, w = numbers(5, 6), numbers(4, 6)
    model = contrib("y = com.microsoft.FusedMatMul<alpha=2.0, transB=1>(x, w)", "(float[5,6] x) => (float[5,4] y)", w=w)
    split(model, best_of_rank(2))
    assert error(run(model, x=x), 2 * x @ truncated(w, 2).T) <= 1e-6
    assert ops(model) == {"MatMul": 1, "FusedMatMul": 1}


@pytest.mark.parametrize("weight_input", "AB")
@pytest.mark.parametrize("trans", [0, 1])
def test_fused_gemm_keeps_its_activation_on_the_second(weight_input, trans):
    a, b = numbers(6, 3) if trans else numbers(3, 6), numbers(4, 6) if trans else numbers(6, 4)
    x, w = (a, b) if weight_input == "B" else (b, a)
    inputs = "x, w, c" if weight_input == "B" else "w, x, c"
    attributes = f'activation="LeakyRelu", activation_alpha=0.1, alpha=0.5, beta=2.0, transA={trans}, transB={trans}'
    body = f"y = com.microsoft.FusedGemm<{attributes}>({inputs})"
    model = contrib(body, f"(float[{dims(x)}] x) => (float[3,4] y)", w=w, c=numbers(4))
    assert_same(model, 1e-6, x=x)
    assert ops(model) == {"MatMul": 1, "FusedGemm": 1}
    assert model.graph[1].attributes["activation"].as_string() == "LeakyRelu"


@pytest.mark.parametrize("with_sum", [False, True])
def test_fused_conv_keeps_activation_and_sum_on_the_second(with_sum):
    body = (
        'y = com.microsoft.FusedConv<activation="Relu", group=2, kernel_shape=[3,3], pads=[1,1,1,1]>'
        f"(x, w, c{', z' if with_sum else ''})"
    )
    constants = {"w": numbers(6, 2, 3, 3), "c": numbers(6)} | ({"z": numbers(2, 6, 5, 5)} if with_sum else {})
    model = contrib(body, "(float[2,4,5,5] x) => (float[2,6,5,5] y)", **constants)
    assert_same(model, 1e-6, x=numbers(2, 4, 5, 5))
    first, second = model.graph
    assert (first.op_type, first.domain, second.op_type) == ("Conv", "", "FusedConv")
    assert "activation" not in first.attributes
    assert len(second.inputs) == (4 if with_sum else 3)


ATTENTION = {
    "plain": ("", "", "", {}),
    "key lengths": (", mask", "", ", int32[2] mask", {"mask": np.array([3, 5], np.int32)}),
    "mask": (", mask", "", ", int32[2,5] mask", {"mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)}),
    "causal": ("", ", unidirectional=1", "", {}),
    "scale": ("", ", scale=0.3", "", {}),
    "past": (", , past", ", unidirectional=1", ", float[2,2,4,3,4] past", {"past": numbers(2, 2, 4, 3, 4)}),
    "bias": (", , , bias", "", ", float[2,4,5,5] bias", {"bias": numbers(2, 4, 5, 5)}),
}


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 16, 8)])
def test_attention_stays_one_operator(case, sizes):
    if case == "past" and sizes[2] == 8:
        pytest.skip("past holds keys and values of one size")
    extra, attributes, signature, feeds = ATTENTION[case]
    outputs = "y, present" if case == "past" else "y"
    body = (
        f"{outputs} = com.microsoft.Attention<num_heads=4, qkv_hidden_sizes=[{','.join(map(str, sizes))}]{attributes}>"
        f"(x, w, b{extra})"
    )
    model = contrib(
        body,
        f"(float[2,5,12] x{signature}) => (float[2,5,{sizes[2]}] y)",
        w=numbers(12, sum(sizes)),
        b=numbers(sum(sizes)),
    )
    record = assert_same(model, 1e-5, x=numbers(2, 5, 12), **feeds)
    assert (record.out_features, record.in_features, record.rank) == (sum(sizes), 12, 12)
    assert ops(model) == {"MatMul": 1, "Attention": 1}


def test_attention_low_rank():
    def model(w):
        signature = "(float[2,5,12] x) => (float[2,5,16] y)"
        return contrib("y = com.microsoft.Attention<num_heads=4>(x, w, b)", signature, w=w, b=numbers(48))

    w, x = numbers(12, 48), numbers(2, 5, 12)
    came = model(w)
    split(came, best_of_rank(5))
    assert error(run(came, x=x), run(model(truncated(w, 5)), x=x)) <= 1e-5
    assert error(run(came, x=x), run(model(w), x=x)) > 1e-2


def test_no_opset_of_onnx_itself():
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["com.microsoft" : 1]> g (float[3,6] x) => (float[3,4] y)'
        " { y = com.microsoft.FusedMatMul(x, w) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers(6, 4), "w"))
    (skip,) = find_sites(ir.from_proto(proto))
    assert skip.reason == "the model imports no opset of ONNX itself"


@pytest.mark.parametrize(
    ("body", "weight", "reason"),
    [
        (
            "y = com.microsoft.MatMulNBits<K=32, N=4, bits=4, block_size=32>(x, w, s)",
            np.zeros((4, 1, 16), np.uint8),
            "weight is stored as uint8, not as a float",
        ),
        (
            "y = com.microsoft.DynamicQuantizeMatMul(x, w, s)",
            np.zeros((32, 4), np.int8),
            "weight is stored as int8, not as a float",
        ),
        ("y = com.microsoft.TransposeMatMul(x, w)", numbers(32, 4), "no pass splits TransposeMatMul"),
    ],
)
def test_operators_that_stay(body, weight, reason):
    model = contrib(body, "(float[3,32] x) => (float[3,4] y)", w=weight, s=np.ones(4, np.float32))
    (skip,) = find_sites(model)
    assert skip.reason == reason
