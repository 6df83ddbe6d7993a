"""MACs of quantized models: they count products, whatever their type."""

import numpy as np
import onnx
import onnxruntime
import pytest
from calibrated_nets import saved, weight
from onnx import TensorProto, helper

from rsi_deploy.precision.lowering import CalibrationFeeds, Lowering, lower
from rsi_deploy.precision.quantizers import quantize
from rsi_deploy.precision.schemes import DYNAMIC, FLOAT16, WEIGHTS4, static
from rsi_deploy.runtime.shape_trace import trace_run

MAIN = {"conv", "gemm", "product"}
SCHEMES = {scheme.name: scheme for scheme in (static("minmax"), DYNAMIC, WEIGHTS4, FLOAT16)}


def random_net(path, seed):
    """Write a Conv, a Gemm, a MatMul and a product of two activations, of random sizes."""
    rng = np.random.default_rng(seed)
    channels, filters, size = (int(rng.integers(low, 9)) for low in (1, 2, 5))
    groups = int(np.gcd(channels, filters))
    stride, wide, out = int(rng.integers(1, 3)), int(rng.integers(17, 70)), int(rng.integers(33, 70))
    side = (size - 3) // stride + 1
    turned = bool(rng.integers(2))
    flat = filters * side * side
    gemm = weight(rng, wide, flat)
    weights = {
        "kernel": weight(rng, filters, channels // groups, 3, 3),
        "gemm.weight": gemm if turned else gemm.T.copy(),
        "bias": weight(rng, wide),
        "matrix": weight(rng, wide, out),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], "conv", group=groups, strides=[stride, stride]),
        helper.make_node("Flatten", ["c"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "gemm.weight", "bias"], ["g"], "gemm", transB=int(turned)),
        helper.make_node("MatMul", ["g", "matrix"], ["m"], "product"),
        helper.make_node("Transpose", ["m"], ["t"], "transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["m", "t"], ["y"], "scores"),
    ]
    kind = TensorProto.FLOAT
    saved(path, nodes, weights, {"x": (kind, ["N", channels, size, size])}, {"y": (kind, ["N", "N"])}, opset=21)
    return {"x": rng.standard_normal((6, channels, size, size)).astype(np.float32)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bits", [{}, dict.fromkeys(MAIN, 4)], ids=["scheme", "int4"])
def test_a_quantized_model_counts_as_its_float_model(tmp_path, name, bits, seed):
    feeds = random_net(tmp_path / "m.onnx", seed)
    batch = {"x": feeds["x"][:2]}
    scheme, data = SCHEMES[name], CalibrationFeeds(feeds=lambda: iter([feeds]), samples=6)
    expected = trace_run(tmp_path / "m.onnx", batch).macs
    assert len(expected) == 4
    lower(tmp_path / "m.onnx", tmp_path / "lowered.onnx", Lowering(scheme=scheme, bits=bits), data)
    quantize(tmp_path / "m.onnx", tmp_path / "quantized.onnx", scheme, data.feeds)
    for path in (tmp_path / "lowered.onnx", tmp_path / "quantized.onnx"):
        trace = trace_run(path, batch)
        assert sorted(trace.macs.values()) == sorted(expected.values())
        assert trace.uncounted == ()
    assert trace_run(tmp_path / "lowered.onnx", batch).macs.keys() == expected.keys(), "nodes keep their names"


@pytest.mark.parametrize("name", [static("minmax").name, DYNAMIC.name])
def test_fused_integer_kernels_count_as_their_float_kin(tmp_path, name):
    """QLinearConv, QGemm, QLinearMatMul, DynamicQuantizeMatMul: onnxruntime makes them of the others."""
    feeds = random_net(tmp_path / "m.onnx", 5)
    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", SCHEMES[name], lambda: iter([feeds]))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(tmp_path / "q.onnx", options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    fused = {"QLinearConv", "QGemm", "QLinearMatMul"} if "static" in name else {"DynamicQuantizeMatMul"}
    assert fused <= kinds
    expected = trace_run(tmp_path / "m.onnx", feeds).macs
    trace = trace_run(tmp_path / "fused.onnx", feeds)
    assert sorted(trace.macs.values()) == sorted(expected.values())
    assert trace.uncounted == ()


def test_a_quantized_table_counts_nothing(tmp_path):
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "embed"),
        helper.make_node("MatMul", ["rows", "w"], ["y"], "product"),
    ]
    weights = {"table": weight(rng, 200, 32), "w": weight(rng, 32, 40)}
    saved(
        tmp_path / "m.onnx",
        nodes,
        weights,
        {"ids": (TensorProto.INT64, ["N"])},
        {"y": (TensorProto.FLOAT, ["N", 40])},
        opset=21,
    )
    lower(tmp_path / "m.onnx", tmp_path / "q.onnx", Lowering(scheme=DYNAMIC, tables={"table": 4}), None)
    assert "GatherBlockQuantized" in {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    trace = trace_run(tmp_path / "q.onnx", {"ids": np.arange(7)})
    assert trace.macs == {"product": 7 * 32 * 40}
    assert trace.uncounted == ()
