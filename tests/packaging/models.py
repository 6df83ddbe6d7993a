"""Small models with the properties that matter to an engine."""

from pathlib import Path

import numpy as np
import onnx
from nets import SIZES, mlp_onnx
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import export


def bundle_of(path, folder, **options):
    """Export the ONNX file with rank 4 and return the bundle's folder."""
    export(str(path), folder, **{"rank": 4, "measure": False, **options})
    return folder


def mlp_bundle(root, name="mlp", sizes=SIZES, **options):
    """Export a perceptron `(batch, 12) -> (batch, 10)`."""
    root.mkdir(parents=True, exist_ok=True)
    return bundle_of(mlp_onnx(root / f"{name}.onnx", sizes=sizes), root / name, **options)


def graph(path, nodes, inputs, outputs, weights=()):
    """Write a model; inputs and outputs are (name, type, dims)."""
    values = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    made = helper.make_graph(nodes, "g", *values, list(weights))
    onnx.save(helper.make_model(made, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return Path(path)


def weight(rows, columns, name="w", seed=0):
    values = np.random.default_rng(seed).standard_normal((rows, columns)) / rows**0.5
    return numpy_helper.from_array(values.astype(np.float32), name)


def mixing(path):
    """Write a model `x W - mean over the batch`: its shapes allow a batch, its values do not."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("ReduceMean", ["p", "axes"], ["m"], keepdims=1),
        helper.make_node("Sub", ["p", "m"], ["y"]),
    ]
    axes = numpy_helper.from_array(np.array([0]), "axes")
    return graph(
        path,
        nodes,
        [("x", TensorProto.FLOAT, ["n", 32])],
        [("y", TensorProto.FLOAT, ["n", 32])],
        [weight(32, 32), axes],
    )


def pooled(path):
    """Write a model with one output a batch: the sum of `x W`."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("ReduceSum", ["p"], ["y"], keepdims=0),
    ]
    return graph(path, nodes, [("x", TensorProto.FLOAT, ["n", 32])], [("y", TensorProto.FLOAT, [])], [weight(32, 32)])


def tokens(path):
    """Write a model from ids and a mask `(batch, length)` to a vector and a score `(batch,)`, and the ids again."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["weights"]),
        helper.make_node("Mul", ["rows", "weights"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "first"], ["sum"], keepdims=0),
        helper.make_node("MatMul", ["sum", "w"], ["vector"]),
        helper.make_node("ReduceMax", ["vector", "first"], ["score"], keepdims=0),
        helper.make_node("Identity", ["ids"], ["same"]),
    ]
    tensors = [
        weight(50, 32, "table", 1),
        weight(32, 32, "w"),
        numpy_helper.from_array(np.array([1]), "first"),
        numpy_helper.from_array(np.array([-1]), "last"),
    ]
    inputs = [(name, TensorProto.INT64, ["batch", "length"]) for name in ("ids", "mask")]
    outputs = [
        ("vector", TensorProto.FLOAT, ["batch", 32]),
        ("score", TensorProto.FLOAT, ["batch"]),
        ("same", TensorProto.INT64, ["batch", "length"]),
    ]
    return graph(path, nodes, inputs, outputs, tensors)


def scalars(path):
    """Write a model `x W * k if flag else 0`, whose scalars `k`, `flag` and `not flag` belong to the whole run."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Mul", ["p", "k"], ["scaled"]),
        helper.make_node("Where", ["flag", "scaled", "zero"], ["y"]),
        helper.make_node("Not", ["flag"], ["not"]),
    ]
    inputs = [("x", TensorProto.FLOAT, [2, 32]), ("k", TensorProto.FLOAT, []), ("flag", TensorProto.BOOL, [])]
    outputs = [("y", TensorProto.FLOAT, [2, 32]), ("not", TensorProto.BOOL, [])]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    return graph(path, nodes, inputs, outputs, [weight(32, 32), zero])


def words(path):
    """Write a model that returns `x W` and its texts."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Identity", ["s"], ["same"])]
    inputs = [("x", TensorProto.FLOAT, [2, 32]), ("s", TensorProto.STRING, [2])]
    outputs = [("y", TensorProto.FLOAT, [2, 32]), ("same", TensorProto.STRING, [2])]
    return graph(path, nodes, inputs, outputs, [weight(32, 32)])
