"""Small ONNX models for the benchmarks of the measuring itself: their weights are random, their times are not."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def trivial(path: Path) -> Path:
    """`y = relu(x)` on `(N, 4)`: as near to no work as a model comes."""
    return _write(path, [helper.make_node("Relu", ["x"], ["y"])], 4, [])


def perceptron(path: Path, width: int = 2048, layers: int = 6) -> Path:
    """`layers` square matrix products with ReLU on `(N, width)`; some ms at batch 1."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for layer in range(layers):
        name, after = f"w{layer}", "y" if layer == layers - 1 else f"h{layer}"
        weight = rng.standard_normal((width, width)).astype(np.float32) / np.sqrt(width, dtype=np.float32)
        weights.append(numpy_helper.from_array(weight, name))
        nodes += [
            helper.make_node("MatMul", [value, name], [f"m{layer}"]),
            helper.make_node("Relu", [f"m{layer}"], [after]),
        ]
        value = after
    return _write(path, nodes, width, weights)


def _write(path: Path, nodes: list[onnx.NodeProto], width: int, weights: list[onnx.TensorProto]) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "small", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
