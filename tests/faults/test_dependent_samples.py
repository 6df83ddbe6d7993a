"""Samples that depend on each other for some inputs are not batched; MACs are counted a sample on any batch axis."""

# ruff: noqa: E501 (tables of models in text form)

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import export, package, verify
from rsi_deploy.packaging.servable import read_servable
from rsi_deploy.serving.bundles import open_bundle
from rsi_deploy.serving.engine.model import LoadedModel

STORED = """
int64[1] c0 = {0}, int64[1] c1 = {1}, int64 s0 = {0}, int64 s1 = {1},
int64[2] halves = {-1, 8}, float limit = {50}
"""

# z computed from x (n, 16), and the node in the reason. z changes y only where |x| is above 50.
MIXING = {
    "level of the whole tensor": ("m = ReduceMax<keepdims = 0>(x) z = Sub(x, m)", "ReduceMax 'm'"),
    "mean over the batch": ("m = ReduceMean(x, c0) z = Sub(x, m)", "ReduceMean 'm'"),
    "softmax over the batch": ("z = Softmax<axis = 0>(x)", "Softmax 'z'"),
    "training BatchNorm": ("z, a, b = BatchNormalization<training_mode = 1>(x, ones, ones, ones, ones)",
                           "BatchNormalization 'z'"),
    "running sum": ("z = CumSum(x, s0)", "CumSum 'z'"),
    "largest of the batch": ("v, i = TopK<axis = 0>(x, c1) z = Sub(x, v)", "TopK 'v'"),
    "x^T x": ("t = Transpose(x) g = MatMul(t, x) z = MatMul(x, g)", "MatMul 'g'"),
    "attention over the batch": ("t = Transpose(x) s = MatMul(x, t) p = Softmax(s) z = MatMul(p, x)", "MatMul 's'"),
    "half rows joined": ("r = Reshape(x, halves) p = Softmax<axis = 0>(r) s = Shape(x) z = Reshape(p, s)", "Softmax 'p'"),
    "first row for all": ("z = Gather<axis = 0>(x, c0)", "Gather 'z'"),
    "divided by the number of rows": ("s = Shape(x) n = Gather(s, s0) f = Cast<to = 1>(n) z = Div(x, f)", "Div 'z'"),
    "numbered rows": ("s = Shape(x) n = Gather(s, s0) r = Range(s0, n, s1) f = Cast<to = 1>(r) u = Unsqueeze(f, c1) z = Add(x, u)",
                      "Add 'z'"),
    "random numbers": ("r = RandomNormalLike(x) z = Add(x, r)", "RandomNormalLike 'r'"),
    "state over the rows": ("u = Unsqueeze(x, c0) o = Identity(u) h = Squeeze(o, c0) c = CumSum(h, s0) z = Tanh(c)", "CumSum 'c'"),
    "the batch as time": ("q = Transpose(x) u = Unsqueeze(q, c0) k = Conv<pads = [1, 1]>(u, kernel) e = Squeeze(k, c0) t = Transpose(e)"
                          " z = Mul(x, t)", "Conv 'k'"),
}  # fmt: skip


def gated(path, body):
    """Write `y = x W + z * relu(|x| - 50)`: rows depend on each other, but not for standard normal numbers."""
    text = f"""<ir_version: 8, opset_import: ["": 18]> g (float[n, 16] x) => (float[n, 16] y) <{STORED}> {{
        {body}
        size = Abs(x) over = Sub(size, limit) gate = Relu(over) leak = Mul(z, gate) prod = MatMul(x, w) y = Add(prod, leak) }}"""
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    stored = {"w": weight, "kernel": np.ones((16, 16, 3), np.float32), "ones": np.ones(16, np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_depend_on_each_other_for_large_inputs_are_not_joined(tmp_path, name):
    body, named = MIXING[name]
    alone = LoadedModel(open_bundle(gated(tmp_path / "m.onnx", body))).alone
    assert named in alone, alone


def test_independent_rows_are_joined(tmp_path):
    assert LoadedModel(open_bundle(gated(tmp_path / "m.onnx", "z = Softmax<axis = 1>(x)"))).alone == ""


@pytest.mark.parametrize("target", ["triton", "kserve"])
def test_packages_of_such_models_do_not_batch(tmp_path, target):
    path = gated(tmp_path / "m.onnx", MIXING["level of the whole tensor"][0])
    export(str(path), tmp_path / "b", rank=4, always_split=True, measure=False)
    assert "ReduceMax 'm' reduces over the batch axis" in read_servable(tmp_path / "b").unbatchable
    uri = "pvc://m/m" if target == "kserve" else None
    result = package(tmp_path / "b", tmp_path / "p", target=target, name="m", storage_uri=uri)
    configs = list((tmp_path / "p").rglob("config.pbtxt"))
    assert all("dynamic_batching" not in config.read_text() for config in configs)
    assert result.batched is False
    assert "ReduceMax 'm'" in " ".join(result.notes)


def test_given_samples_do_not_replace_the_proof(tmp_path):
    path = gated(tmp_path / "m.onnx", MIXING["mean over the batch"][0])
    export(str(path), tmp_path / "b", rank=4, always_split=True, measure=False)
    rows = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    assert "ReduceMean 'm'" in read_servable(tmp_path / "b", {"x": rows}).unbatchable


def product(path, dims, data_first=True, before=()):
    """Write `y = x @ w` on the last axis, after nodes that make `h` from `x`."""
    weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    nodes = [
        *before,
        helper.make_node("MatMul", ["h" if before else "x", "w"] if data_first else ["w", "x"], ["y"], "p"),
    ]
    x, y = (helper.make_tensor_value_info(*v) for v in (("x", TensorProto.FLOAT, dims), ("y", TensorProto.FLOAT, None)))
    stored = [numpy_helper.from_array(weight if data_first else weight.T.copy(), "w")]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


@pytest.mark.parametrize(
    ("dims", "options", "samples_in_run"),
    [
        ([64], {}, 1),  # a vector: no batch
        ([3, 64], {}, 3),
        ([7, 1, 64], {"before": [helper.make_node("Softmax", ["x"], ["h"], axis=0)]}, 1),  # time comes first
        (["time", "batch", 64], {}, 2),
        ([64, 5], {"data_first": False}, 5),  # samples are columns
    ],
    ids=["vector", "rows", "time first", "symbols", "columns"],
)
def test_macs_are_those_of_one_sample(tmp_path, dims, options, samples_in_run):
    path = product(tmp_path / "m.onnx", dims, **options)
    shape = [{"time": 7, "batch": 2}.get(size, size) for size in dims]
    feeds = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    report = export(path, tmp_path / "b", rank="50%", measure=False, feeds=feeds)
    rows = int(np.prod(shape)) // 64
    assert report.dense.macs == rows * 64 * 48 // samples_in_run
    assert report.compressed.macs == rows * 24 * (64 + 48) // samples_in_run


def test_verify_counts_like_export(tmp_path):
    export(product(tmp_path / "m.onnx", [64]), tmp_path / "b", rank="50%", measure=False)
    (claim,) = [claim for claim in verify(tmp_path / "b").claims if claim.name == "MACs"]
    assert claim.status == "holds"
    assert claim.detail.startswith("2,688")
