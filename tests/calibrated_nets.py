"""Tiny ONNX models and unlabelled data for the tests of calibration, written by hand from a seed."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

IMAGE = (3, 8, 8)


def weight(rng, *shape, gain=1.0):
    return (gain * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def saved(path, nodes, weights, inputs, outputs, opset=20):
    """Write a model; `inputs` and `outputs` are name -> (ONNX type, shape)."""
    infos = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in values.items()]
        for values in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", *infos, tensors)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return Path(path)


def conv_net(path, *, seed=0, padded=True):
    """Write conv1 3x3, conv2 3x3 of stride 2, grouped 3x3, mean and head; without padding the sizes are odd."""
    rng = np.random.default_rng(seed)
    weights = {
        "conv1.weight": weight(rng, 24, 3, 3, 3),
        "conv2.weight": weight(rng, 32, 24, 3, 3, gain=2),
        "grouped.weight": weight(rng, 32, 16, 3, 3, gain=2),
        "head.weight": weight(rng, 10, 32, gain=4),
    }
    biases = {
        f"{name.split('.')[0]}.bias": 0.1 * rng.standard_normal(len(w)).astype(np.float32)
        for name, w in weights.items()
    }
    nodes, value = [], "input"
    for name, more in (("conv1", {}), ("conv2", {"strides": [2, 2]}), ("grouped", {"group": 2})):
        pads = [1, 1, 1, 1] if padded or name == "grouped" else [0, 0, 0, 0]
        nodes.append(
            helper.make_node("Conv", [value, f"{name}.weight", f"{name}.bias"], [f"{name}.y"], name, pads=pads, **more)
        )
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.r"], f"{name}.relu"))
        value = f"{name}.r"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["mean"], "mean"))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"], "flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["output"], "head", transB=1))
    return saved(
        path,
        nodes,
        weights | biases,
        {"input": (TensorProto.FLOAT, ["N", *IMAGE])},
        {"output": (TensorProto.FLOAT, ["N", 10])},
    )


def text_net(path, *, seed=0, tokens=6, width=16):
    """Write: ids and a mask -> embedding -> two products over tokens -> masked mean -> unit vector."""
    rng = np.random.default_rng(seed)
    weights = {
        "table": weight(rng, 20, width, gain=4),
        "grow.weight": weight(rng, 40, width, gain=2).T.copy(),
        "shrink.weight": weight(rng, width, 40, gain=2).T.copy(),
        "axis": np.array([1]),
        "last": np.array([-1]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], "embed"),
        helper.make_node("MatMul", ["x", "grow.weight"], ["grow.y"], "grow"),
        helper.make_node("Relu", ["grow.y"], ["grow.r"], "relu"),
        helper.make_node("MatMul", ["grow.r", "shrink.weight"], ["shrink.y"], "shrink"),
        helper.make_node("Cast", ["attention_mask"], ["m"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["m3"], "unsqueeze"),
        helper.make_node("Mul", ["shrink.y", "m3"], ["masked"], "mask"),
        helper.make_node("ReduceSum", ["masked", "axis"], ["total"], "sum", keepdims=0),
        helper.make_node("LpNormalization", ["total"], ["embedding"], "norm", axis=-1, p=2),
    ]
    ids = {name: (TensorProto.INT64, ["N", tokens]) for name in ("ids", "attention_mask")}
    return saved(path, nodes, weights, ids, {"embedding": (TensorProto.FLOAT, ["N", width])})


def texts(path, *, count=200, tokens=6, seed=1):
    """Write ids and masks of texts of 2 to `tokens` tokens, padded with 0."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, tokens + 1, count)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    np.savez(path, ids=rng.integers(1, 20, (count, tokens)) * mask, attention_mask=mask)
    return Path(path)


def branch_net(path, *, seed=0):
    """Write a Gemm, then one of two others depending on whether the inputs sum to more than zero, then a head."""
    rng = np.random.default_rng(seed)
    shapes = {"fc": (24, 16), "yes": (24, 24), "no": (24, 24), "head": (10, 24)}
    weights = {f"{name}.weight": weight(rng, *shape) for name, shape in shapes.items()}

    def branch(name):
        node = helper.make_node("Gemm", ["fc.y", f"{name}.weight"], [f"{name}.y"], name, transB=1)
        value = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [value])

    nodes = [
        helper.make_node("Gemm", ["input", "fc.weight"], ["fc.y"], "fc", transB=1),
        helper.make_node("ReduceSum", ["input"], ["sum"], "sum", keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"], "greater"),
        helper.make_node("If", ["positive"], ["y"], "if", then_branch=branch("yes"), else_branch=branch("no")),
        helper.make_node("Gemm", ["y", "head.weight"], ["output"], "head", transB=1),
    ]
    return saved(
        path,
        nodes,
        weights | {"zero": np.float32(0)},
        {"input": (TensorProto.FLOAT, ["N", 16])},
        {"output": (TensorProto.FLOAT, ["N", 10])},
    )


def logarithm_net(path, *, seed=0):
    """Write Gemm, Log, Gemm, whose outputs are NaN where the first Gemm is negative."""
    rng = np.random.default_rng(seed)
    weights = {"fc1.weight": weight(rng, 24, 16), "fc2.weight": weight(rng, 10, 24)}
    nodes = [
        helper.make_node("Gemm", ["input", "fc1.weight"], ["fc1.y"], "fc1", transB=1),
        helper.make_node("Log", ["fc1.y"], ["log"], "log"),
        helper.make_node("Gemm", ["log", "fc2.weight"], ["output"], "fc2", transB=1),
    ]
    return saved(
        path,
        nodes,
        weights,
        {"input": (TensorProto.FLOAT, ["N", 16])},
        {"output": (TensorProto.FLOAT, ["N", 10])},
    )


def inputs(path, *shape, count=200, seed=1, low_rank=0):
    """Write inputs `x (count, *shape)`; with `low_rank` they vary in so many directions, and a little in the others."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    x = rng.standard_normal((count, size))
    if low_rank:
        basis = np.random.default_rng(99).standard_normal((low_rank, size))
        x = 0.05 * x + x[:, :low_rank] @ basis / np.sqrt(low_rank)
    x = x.reshape(count, *shape).astype(np.float32)
    np.savez(path, x=x)
    return Path(path)
