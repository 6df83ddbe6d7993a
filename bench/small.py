"""Small ONNX models with random weights, for the benchmarks of the measuring itself."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def trivial(path: Path) -> Path:
    """`y = relu(x)` on `(N, 4)`: almost no work."""
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


def thin_detector(path: Path) -> Path:
    """A single-shot detector of 57 thin Convs on `(1, 3, 64, 192)`: 0.7 MB, 8.5 MMACs, 24 of the Convs depthwise.

    Four stages of depthwise and pointwise Convs, and behind each two 3x3 heads: `scores` and `boxes`.
    """
    net = _Detector()
    value, width, taps = net.conv("input", 3, 8, 3, stride=2), 8, []
    for out, blocks in ((16, 2), (32, 4), (64, 8), (96, 10)):
        for block in range(blocks):
            value = net.conv(value, width, width, 3, stride=1 if block else 2, group=width)
            value, width = net.conv(value, width, out, 1), out
        taps.append((value, width))
    for name, numbers in (("scores", 2), ("boxes", 4)):
        net.heads(name, numbers, taps)
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 64, 192])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, n]) for name, n in net.outputs.items()]
    graph = helper.make_graph(net.nodes, "detector", inputs, outputs, net.weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class _Detector:
    """The nodes and weights of a detector; weights are random with falling singular values, like trained ones."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.outputs: dict[str, int] = {}
        self._rng = np.random.default_rng(0)

    def conv(self, value: str, into: int, out: int, kernel: int, *, stride: int = 1, group: int = 1) -> str:
        """Add a Conv and a ReLU and return the name of their output."""
        name = self._conv(value, into, out, kernel, stride, group, gain=2.0)
        self.nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"]))
        return f"{name}.relu"

    def heads(self, name: str, numbers: int, taps: list[tuple[str, int]]) -> None:
        """Add an output of three anchors with `numbers` values at every position of the taps."""
        self.weights.append(numpy_helper.from_array(np.array([1, -1, numbers], np.int64), f"{name}.shape"))
        parts = []
        for value, width in taps:
            made = self._conv(value, width, 3 * numbers, 3, 1, 1, gain=0.3)
            self.nodes.append(helper.make_node("Transpose", [made], [f"{made}.last"], perm=[0, 2, 3, 1]))
            self.nodes.append(helper.make_node("Reshape", [f"{made}.last", f"{name}.shape"], [f"{made}.flat"]))
            parts.append(f"{made}.flat")
        self.nodes.append(helper.make_node("Concat", parts, [name], axis=1))
        self.outputs[name] = numbers

    def _conv(self, value: str, into: int, out: int, kernel: int, stride: int, group: int, *, gain: float) -> str:
        name, shape = f"conv{len(self.weights)}", (out, into // group, kernel, kernel)
        flat = self._rng.standard_normal((out, int(np.prod(shape[1:]))))
        u, _, v = np.linalg.svd(flat, full_matrices=False)
        flat = (u * np.exp(-4 * np.arange(len(v)) / len(v))) @ v
        weight = (flat * np.sqrt(gain * out) / np.linalg.norm(flat)).reshape(shape).astype(np.float32)
        bias = (0.1 * self._rng.standard_normal(out)).astype(np.float32)
        self.weights += [
            numpy_helper.from_array(weight, f"{name}.weight"),
            numpy_helper.from_array(bias, f"{name}.bias"),
        ]
        options = {"strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": group}
        self.nodes.append(helper.make_node("Conv", [value, f"{name}.weight", f"{name}.bias"], [name], name, **options))
        return name


def smooth_images(
    count: int, shape: tuple[int, ...], seed: int = 1
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Random images `(count, *shape)` whose neighbouring pixels are alike, of variance 1."""
    images = np.random.default_rng(seed).standard_normal((count, *shape))
    for axis in (-2, -1):
        for _ in range(3):
            images = (images + np.roll(images, 1, axis) + np.roll(images, -1, axis)) / 3
    return (images / images.std()).astype(np.float32)


def _write(path: Path, nodes: list[onnx.NodeProto], width: int, weights: list[onnx.TensorProto]) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "small", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
