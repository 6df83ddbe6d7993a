import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import SIZES, mlp_onnx, run_onnx
from onnx import helper, numpy_helper

from rsi_deploy.errors import ModelError
from rsi_deploy.trace import node_macs, traced_run


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "macs"),
    [
        ("Conv", [(2, 6, 8, 8), (10, 6, 3, 3), (10,)], [(2, 10, 4, 4)], 2 * 10 * 16 * 6 * 9),
        ("Conv", [(1, 6, 8, 8), (12, 2, 3, 3)], [(1, 12, 8, 8)], 12 * 64 * 2 * 9),  # three groups
        ("Conv", [(1, 6, 8, 8), (6, 1, 3, 3)], [(1, 6, 8, 8)], 6 * 64 * 9),  # depthwise
        ("Conv", [(1, 4, 20), (8, 4, 5)], [(1, 8, 16)], 8 * 16 * 4 * 5),
        ("ConvTranspose", [(1, 4, 5, 5), (4, 3, 2, 2)], [(1, 3, 10, 10)], 4 * 25 * 3 * 4),
        ("MatMul", [(7, 12), (12, 5)], [(7, 5)], 7 * 5 * 12),
        ("MatMul", [(2, 3, 7, 12), (2, 3, 12, 5)], [(2, 3, 7, 5)], 6 * 7 * 5 * 12),
        ("MatMul", [(12,), (12, 5)], [(5,)], 5 * 12),
        ("Gemm", [(7, 12), (5, 12), (5,)], [(7, 5)], 7 * 5 * 12),
        ("Gemm", [(12, 7), (12, 5)], [(7, 5)], 7 * 5 * 12),  # transA
        ("Attention", [(2, 3, 10, 8), (2, 3, 11, 8), (2, 3, 11, 4)], [(2, 3, 10, 4)], 2 * 3 * 10 * 11 * (8 + 4)),
        ("Attention", [(2, 10, 24), (2, 11, 24), (2, 11, 12)], [(2, 10, 12)], 2 * 10 * 11 * (24 + 12)),
        ("Relu", [(7, 12)], [(7, 12)], 0),
        ("Add", [(7, 12), (12,)], [(7, 12)], 0),
    ],
)
def test_macs_of_a_node_by_hand(op, inputs, outputs, macs):
    assert node_macs(op, inputs, outputs) == macs


def test_a_run_gives_the_outputs_and_counts_what_was_executed(tmp_path):
    path = mlp_onnx(tmp_path / "m.onnx")
    a, b, c, d = SIZES
    x = np.random.default_rng(0).standard_normal((5, a)).astype(np.float32)
    trace = traced_run(path, {"input": x})
    assert trace.macs == {"fc1": 5 * a * b, "fc2": 5 * b * c, "head": 5 * c * d}
    # unoptimized against optimized kernels: float32 rounding
    np.testing.assert_allclose(trace.outputs[0], run_onnx(path, x)[0], rtol=1e-5, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]  # no profile is left


def test_external_weights(tmp_path):
    path = mlp_onnx(tmp_path / "m.onnx")
    ir.save(ir.load(path), tmp_path / "e.onnx", external_data="e.data")
    x = {"input": np.ones((2, SIZES[0]), np.float32)}
    a, b = traced_run(path, x), traced_run(tmp_path / "e.onnx", x)
    assert a.macs == b.macs
    np.testing.assert_array_equal(a.outputs[0], b.outputs[0])


def test_a_node_in_a_loop_counts_every_time(tmp_path):
    """x @ w, three times."""
    square = numpy_helper.from_array(np.eye(4, dtype=np.float32) * 2, "w")
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("MatMul", ["v", "w"], ["next"], "product"), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [info("i", 7, []), info("go", 9, []), info("v", 1, ["n", 4])],
        [info("on", 9, []), info("next", 1, ["n", 4])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["times", "", "x"], ["y"], "loop", body=body)],
        "g",
        [info("x", 1, ["n", 4])],
        [info("y", 1, ["n", 4])],
        [square, numpy_helper.from_array(np.array(3), "times")],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    trace = traced_run(tmp_path / "m.onnx", {"x": np.ones((2, 4), np.float32)})
    assert trace.macs == {"product": 3 * 2 * 4 * 4}
    np.testing.assert_array_equal(trace.outputs[0], np.full((2, 4), 8, np.float32))


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    path = mlp_onnx(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"m\.onnx: the run failed"):
        traced_run(path, {"input": np.ones((2, SIZES[0] + 1), np.float32)})
