"""Empty tensors, such as the cache of a decoder's first step. Every dimension but the batch may be 0."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from served import Server

from rsi_deploy import evaluate, export
from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.cli import run
from rsi_deploy.core.errors import UsageError
from rsi_deploy.evaluation.predictor import floating_rows
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.feeds.shapes import parse_shape
from rsi_deploy.runtime.feeds.user_feeds import check_feeds
from rsi_deploy.runtime.parity import compare_outputs
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.tensors import checked_shape, dtype_of, from_binary, from_values, to_binary
from rsi_deploy.serving.transports.grpc_app import decode

RNG = np.random.default_rng(0)
SHAPES = ["--input-shape", "x=1x3x16", "--input-shape", "past=1x0x12"]


def decoder(path):
    """Write a model: present is past followed by x w, and y is its sum over the steps."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Concat", ["past", "a"], ["present"], axis=1),
        helper.make_node("ReduceSum", ["present", "one"], ["y"], keepdims=0),
        helper.make_node("Identity", ["past"], ["same"]),
    ]
    inputs = {"x": ["b", "s", 16], "past": ["b", "p", 12]}
    outputs = {"same": ["b", "p", 12], "y": ["b", 12], "present": ["b", "t", 12]}
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in v.items()] for v in (inputs, outputs)]
    weights = {"w": RNG.standard_normal((16, 12)).astype(np.float32) / 4, "one": np.array([1])}
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", *values, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decoder("m.onnx")
    x = RNG.standard_normal((40, 3, 16)).astype(np.float32)
    np.savez("d.npz", x=x, past=np.zeros((40, 0, 12), np.float32))
    np.savez("f.npz", x=x[:2], past=np.zeros((2, 0, 12), np.float32))
    return tmp_path


def test_shapes_with_a_size_of_0(here):
    assert parse_shape("past=1x0x12".partition("=")[2]) == (1, 0, 12)
    specs = model_inputs("m.onnx")
    feeds = random_feeds(specs, 2, 0, {"x": (2, 3, 16), "past": (2, 0, 12)})
    assert feeds["past"].shape == (2, 0, 12)
    outputs = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)
    assert [array.shape for array in outputs] == [(2, 0, 12), (2, 12), (2, 3, 12)]
    check_feeds(specs, feeds, "m.onnx")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            {"x": (0, 3, 16), "past": (0, 0, 12)},
            r"x: float32 .* batch at axis 0, which must be 1 or more.*\(0, 3, 16\)",
        ),
        ({"x": (1, 3, 0), "past": (1, 0, 12)}, "16 fixed at axis 2"),
        ({"x": (1, 3, 16), "past": (1, -1, 12)}, "sizes of 0 or more"),
    ],
)
def test_sizes_that_cannot_be_0(here, shapes, words):
    with pytest.raises(UsageError, match=words):
        random_feeds(model_inputs("m.onnx"), 1, 0, shapes)


def test_a_name_has_one_size_in_all_inputs():
    specs = [InputSpec(name=name, dtype=np.dtype(np.float32), shape=("b", "s", 4)) for name in "xy"]
    feeds = {"x": np.zeros((1, 0, 4), np.float32), "y": np.zeros((1, 2, 4), np.float32)}
    with pytest.raises(UsageError, match="s is 0 in x, but 2 in y"):
        check_feeds(specs, feeds, "m.onnx")
    check_feeds(specs, {"x": feeds["x"], "y": feeds["x"]}, "m.onnx")
    with pytest.raises(UsageError, match="batch at axis 0, which must be 1 or more"):
        check_feeds(specs, dict.fromkeys("xy", np.zeros((0, 2, 4), np.float32)), "m.onnx")


def test_an_empty_axis_before_the_batch():
    specs = [
        InputSpec(name="past", dtype=np.dtype(np.float32), shape=("p", "batch", 4)),
        InputSpec(name="x", dtype=np.dtype(np.float32), shape=("batch", 4)),
    ]
    assert random_feeds(specs, 2, 0, {"past": (0, 2, 4)})["past"].shape == (0, 2, 4)


def test_export_verify_and_bench_with_an_empty_cache(here, capsys):
    report = export(
        "m.onnx", "b", rank="50%", measure=False, input_shape=SHAPES[1::2], keep_dense=True, allow_larger=True
    )
    assert report.probe_shapes == {"x": (1, 3, 16), "past": (1, 0, 12)}
    assert report.dense.macs == 3 * 16 * 12
    assert report.verification.surgery.informative
    assert 0 < report.verification.approximation.relative_l2 < 1
    assert run(["verify", "b"]) == 0
    for shapes in (SHAPES, ["--feeds", "f.npz"]):
        assert run(["bench", "m.onnx", "b/model.onnx", "--seconds", "0.1", *shapes]) == 0
    assert (
        run(["bench", "m.onnx", "--seconds", "0.1", "--input-shape", "x=Nx3x16", "--input-shape", "past=Nx0x12"]) == 0
    )
    assert (
        run(["bench", "m.onnx", "--seconds", "0.1", "--input-shape", "x=0x3x16", "--input-shape", "past=0x0x12"]) == 2
    )
    assert "must be 1 or more" in capsys.readouterr().err


def test_calibration_and_evaluation_with_an_empty_cache(here):
    assert CalibrationData("d.npz", model_inputs("m.onnx"), None, 100).samples == 32
    report = export("m.onnx", "b", calib="d.npz", keep_macs=0.6, measure=False, allow_larger=True)
    assert 0 < report.calibration.quality.output_error < 1
    found = evaluate("b/model.onnx", "d.npz", reference="m.onnx")
    assert found.samples == 40
    assert [value.output for value in found.values] == ["y", "present"], "what is empty is not compared"
    assert evaluate("m.onnx", "d.npz", reference="m.onnx").agreement == 100


def test_empty_outputs_are_equal_and_not_all_zero():
    empty, some = np.empty((1, 0, 4), np.float32), np.ones(3, np.float32)
    found = compare_outputs([empty], [empty], what="gate", tolerance=0.0)
    assert (found.relative_l2, found.informative) == (0, True)
    assert compare_outputs([empty, some], [empty, some], what="gate").informative
    assert not compare_outputs([empty, 0 * some], [empty, 0 * some], what="gate").informative
    assert list(floating_rows({"empty": empty, "some": some[:1]}, 1)) == ["some"]


# -- serving


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "INT64", "UINT8", "BOOL", "UINT64"])
def test_tensors_without_values(datatype):
    dtype = dtype_of(datatype, "past")
    for values in ([], [[]], [[], []]):
        assert from_values(values, dtype, checked_shape([2, 0, 3], "past"), "past").shape == (2, 0, 3)
    empty = from_binary(b"", dtype, (2, 0, 3), "past")
    assert (empty.shape, empty.dtype, to_binary(empty)) == ((2, 0, 3), dtype, b"")
    for values, shape in (([1], (0,)), ([], (1,)), ([[], [1]], (2, 0))):
        with pytest.raises(Refusal):
            from_values(values, dtype, shape, "past")
    with pytest.raises(Refusal):
        checked_shape([1, -1], "past")


@pytest.mark.parametrize("raw", [False, True])
def test_empty_tensors_over_grpc(raw):
    pb = pytest.importorskip("tritonclient.grpc").service_pb2
    tensor = pb.ModelInferRequest.InferInputTensor
    inputs = [tensor(name="x", datatype="FP32", shape=[1, 1]), tensor(name="past", datatype="FP16", shape=[1, 0])]
    if not raw:
        inputs[0].contents.fp32_contents.append(2.0)
    contents = {"raw_input_contents": [np.float32(2).tobytes(), b""]} if raw else {}
    request = decode(pb.ModelInferRequest(model_name="m", inputs=inputs, **contents))
    assert request.feeds["x"] == 2
    assert (request.feeds["past"].shape, request.feeds["past"].dtype) == ((1, 0), np.float16)


def test_a_server_accepts_and_returns_empty_tensors(here):
    x = np.full((1, 3, 16), 0.5, np.float32)
    past = {"name": "past", "shape": [1, 0, 12], "datatype": "FP32"}
    whole = {"name": "x", "shape": [1, 3, 16], "datatype": "FP32", "data": x.ravel().tolist()}
    feeds = {"x": x, "past": np.zeros((1, 0, 12), np.float32)}
    expected = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)
    with Server("m=m.onnx", ports=(0, None)) as server:
        url = "/v2/models/m/infer"
        for data in ([], [[]]):
            status, _, body = server.ask("POST", url, json.dumps({"inputs": [whole, {**past, "data": data}]}))
            assert status == 200
            for output, wanted in zip(json.loads(body)["outputs"], expected, strict=True):
                assert output["shape"] == list(wanted.shape)
                np.testing.assert_allclose(output["data"], wanted.ravel(), rtol=1e-5)
        head = json.dumps({"inputs": [whole, {**past, "parameters": {"binary_data_size": 0}}]}).encode()
        status, _, _ = server.ask("POST", url, head, {"Inference-Header-Content-Length": str(len(head))})
        assert status == 200
        none = {**whole, "shape": [0, 3, 16], "data": []}
        status, _, body = server.ask(
            "POST", url, json.dumps({"inputs": [none, {**past, "shape": [0, 0, 12], "data": []}]})
        )
        assert (status, b"batch at axis 0, which must be 1 or more" in body) == (400, True)
