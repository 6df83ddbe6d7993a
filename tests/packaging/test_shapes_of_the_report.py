"""A package is made with the shapes of its report, and with a substitute for shapes that Triton does not have."""

import numpy as np
import onnx
import pytest
from models import bundle_of, graph, weight
from onnx import TensorProto, helper

from rsi_deploy.core.errors import ModelError
from rsi_deploy.packaging.packing import package
from rsi_deploy.packaging.servable import read_servable

FLOAT, NODE = TensorProto.FLOAT, helper.make_node
STORAGE = {"kserve": {"storage_uri": "s3://models/m"}}
TARGETS = ["triton", "ort", "kserve", "ray-serve"]


def stateful(path):
    """Write a model with a state of two layers, whose first axis is no batch, as in Silero VAD."""
    axes = onnx.numpy_helper.from_array(np.array([0]), "axes")
    nodes = [
        NODE("MatMul", ["x", "w"], ["a"]),
        NODE("ReduceSum", ["state", "axes"], ["s"], keepdims=0),
        NODE("Add", ["a", "s"], ["y"]),
    ]
    inputs = [("x", FLOAT, ["batch", "length"]), ("state", FLOAT, [2, "batch", 32])]
    return graph(path, nodes, inputs, [("y", FLOAT, ["batch", 32])], [weight(48, 32), axes])


def time_major(path):
    """Write a time-major model: the first axes of its inputs are dynamic and have different sizes (steps, layers)."""
    nodes = [
        NODE("MatMul", ["x", "w"], ["a"]),
        NODE("Add", ["a", "h"], ["y"]),
    ]
    inputs = [("x", FLOAT, ["time", "batch", 48]), ("h", FLOAT, ["layers", "batch", 32])]
    return graph(path, nodes, inputs, [("y", FLOAT, ["time", "batch", 32])], [weight(48, 32)])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (stateful, ["x=1x48"]),
        (stateful, ["x=1x48", "state=2x1x32"]),
        (time_major, ["x=5x2x48", "h=1x2x32"]),
    ],
)
def test_every_target_takes_the_shapes_of_the_report(tmp_path, target, make, shapes):
    bundle = bundle_of(make(tmp_path / "m.onnx"), tmp_path / "b", input_shape=shapes)
    package(bundle, tmp_path / "p", target=target, name="m", **STORAGE.get(target, {}))
    found = {name: list(array.shape) for name, array in read_servable(bundle).feeds.items()}
    assert [f"{name}={'x'.join(map(str, found[name]))}" for name in found][: len(shapes)] == shapes


def config_of(tmp_path, path, backend, feeds=None):
    bundle = bundle_of(path, tmp_path / "b", feeds=feeds)
    package(bundle, tmp_path / backend, target="triton", backend=backend, name="m", feeds=feeds)
    return (tmp_path / backend / "models" / "m" / "config.pbtxt").read_text(), (
        tmp_path / backend / "README.md"
    ).read_text()


def scaled(path, rows="n", kind=FLOAT, text=False):
    """Write a model `k x W` with a scalar `k`, which it also returns; `k` may be a text."""
    nodes = [NODE("MatMul", ["x", "w"], ["a"])]
    nodes += (
        [NODE("Identity", ["k"], ["same"]), NODE("Cast", ["k"], ["f"], to=FLOAT)]
        if not text
        else [NODE("Identity", ["k"], ["same"])]
    )
    nodes += [NODE("Mul", ["a", "f"], ["y"])] if not text else [NODE("Identity", ["a"], ["y"])]
    return graph(
        path,
        nodes,
        [("x", FLOAT, [rows, 48]), ("k", kind, [])],
        [("y", FLOAT, [rows, 32]), ("same", kind, [])],
        [weight(48, 32)],
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [(FLOAT, 1), (FLOAT, "n"), (TensorProto.BOOL, 1), (TensorProto.INT64, 2), (TensorProto.STRING, 2)],
)
def test_scalars_of_a_model_that_is_not_batched_have_no_reshape(tmp_path, backend, kind, rows):
    """Triton refuses an empty reshape with max_batch_size 0; its backends make a scalar from `dims: [1]`."""
    text = kind == TensorProto.STRING
    feeds = {"x": np.ones((2, 48), np.float32), "k": np.array("a")} if text else None
    config, readme = config_of(tmp_path, scaled(tmp_path / "m.onnx", rows, kind, text), backend, feeds)
    assert "max_batch_size: 0" in config
    assert "reshape" not in config
    for name in ("k", "same"):
        where = config.index(f'name: "{name}"')
        assert "dims: [1]" in config[where : config.index("}", where)]
    example = 'np.full((1,), b"", object)' if text else "np.zeros((1,), "
    assert f'"k": {example}' in readme


def test_a_scalar_of_a_sample_is_reshaped_in_a_batched_model(tmp_path):
    nodes = [
        NODE("MatMul", ["x", "w"], ["a"]),
        NODE("Mul", ["a", "column"], ["y"]),
        NODE("Unsqueeze", ["k", "one"], ["column"]),
    ]
    nodes = [nodes[0], nodes[2], nodes[1]]
    one = onnx.numpy_helper.from_array(np.array([1]), "one")
    path = graph(
        tmp_path / "m.onnx",
        nodes,
        [("x", FLOAT, ["n", 48]), ("k", FLOAT, ["n"])],
        [("y", FLOAT, ["n", 32])],
        [weight(48, 32), one],
    )
    config, readme = config_of(tmp_path, path, "onnxruntime")
    assert "max_batch_size: 8" in config
    where = config.index('name: "k"')
    assert config[where : config.index("name", where + 9)].split()[2:8] == [
        "data_type:",
        "TYPE_FP32",
        "dims:",
        "[1]",
        "reshape",
        "{",
    ]
    assert '"k": np.zeros((2, 1), ' in readme


def unranked(path):
    """Write a model whose output has no rank before it runs."""
    nodes = [NODE("MatMul", ["x", "w"], ["a"]), NODE("Shape", ["x"], ["size"]), NODE("NonZero", ["size"], ["z"])]
    nodes += [NODE("Squeeze", ["z"], ["q"]), NODE("Squeeze", ["a", "q2"], ["y"]), NODE("Sub", ["q", "q"], ["zeros"])]
    nodes += [NODE("ReduceMin", ["zeros"], ["least"], keepdims=0), NODE("Reshape", ["least", "flat"], ["q2"])]
    order = ["a", "size", "z", "q", "zeros", "least", "q2", "y"]
    nodes.sort(key=lambda node: order.index(node.output[0]))
    flat = onnx.numpy_helper.from_array(np.array([-1]), "flat")
    made = graph(path, nodes, [("x", FLOAT, [1, 48])], [("y", FLOAT, None)], [weight(48, 32), flat])
    model = onnx.load(made)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, made)
    return made


def test_an_output_without_a_rank(tmp_path):
    """Triton's onnxruntime backend treats it as a scalar, and refuses any dims but 1."""
    bundle = bundle_of(unranked(tmp_path / "m.onnx"), tmp_path / "b")
    (output,) = read_servable(bundle).outputs
    assert (output.shape, output.ranked) == ((None,), False)
    package(bundle, tmp_path / "python", target="triton", backend="python", name="m")
    config = (tmp_path / "python" / "models" / "m" / "config.pbtxt").read_text()
    assert "dims: [-1]" in config[config.index("output") :]
    with pytest.raises(ModelError, match="does not declare the dimensions of output y"):
        package(bundle, tmp_path / "o", target="triton", name="m")
