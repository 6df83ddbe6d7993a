"""Texts over the protocol (BYTES), and models that cannot be served next to others that can."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper
from served import Server, body, linear, value, write

from rsi_deploy.cli import run
from rsi_deploy.runtime.feeds.values import TEXT
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.tensors import from_binary, from_values, to_binary

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")

WORDS = np.array([["a", "größer"], ["", "日本"]], TEXT)


def passing_texts(path):
    """Write a model that returns `s (N, 2)` and `-x (N, 12)`."""
    nodes = [helper.make_node("Identity", ["s"], ["t"]), helper.make_node("Neg", ["x"], ["y"])]
    kinds = {"s": TensorProto.STRING, "t": TensorProto.STRING, "x": TensorProto.FLOAT, "y": TensorProto.FLOAT}
    values = {name: value(name, kind, ["N", 2 if name in "st" else 12]) for name, kind in kinds.items()}
    return write(path, nodes, [values["s"], values["x"]], [values["t"], values["y"]], [])


def giving_a_sequence(path):
    """Write a model whose output is a sequence, for which the protocol has no datatype."""
    parts = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    node = helper.make_node("SequenceConstruct", ["x", "x"], ["parts"])
    return write(path, [node], [value("x", TensorProto.FLOAT, ["N", 12])], [parts], [])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    models = [passing_texts(folder / "words.onnx"), giving_a_sequence(folder / "seq.onnx"), linear(folder / "m.onnx")]
    with Server(*models, "--workers", "1", log=folder / "log") as running:
        yield running


def request(**more):
    inputs = [
        {"name": "s", "datatype": "BYTES", "shape": [2, 2], "data": WORDS.ravel().tolist()},
        {"name": "x", "datatype": "FP32", "shape": [2, 12], "data": [1.0] * 24},
    ]
    return json.dumps({"inputs": inputs, **more}).encode()


def test_texts_as_json(server):
    metadata = json.loads(server.ask("GET", "/v2/models/words")[2])
    assert [tensor["datatype"] for tensor in (*metadata["inputs"], *metadata["outputs"])] == [
        "BYTES",
        "FP32",
        "BYTES",
        "FP32",
    ]
    status, _, answer = server.ask("POST", "/v2/models/words/infer", request())
    outputs = {output["name"]: output for output in json.loads(answer)["outputs"]}
    assert status == 200
    assert (outputs["t"]["datatype"], outputs["t"]["data"]) == ("BYTES", WORDS.ravel().tolist())


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_texts_by_an_unmodified_client(server, way):
    client_of = pytest.importorskip(f"tritonclient.{way}")
    client = client_of.InferenceServerClient(getattr(server, way))
    inputs = []
    texts = np.array([text.encode() for text in WORDS.ravel()], object).reshape(WORDS.shape)
    for name, datatype, array in (("s", "BYTES", texts), ("x", "FP32", np.ones((2, 12), np.float32))):
        inputs.append(client_of.InferInput(name, array.shape, datatype))
        inputs[-1].set_data_from_numpy(array)
    answer = client.infer("words", inputs).as_numpy("t")
    assert [text.decode() for text in answer.ravel()] == WORDS.ravel().tolist()
    client.close()


def test_values_that_are_no_texts_are_refused(server):
    def sent(**change):
        document = json.loads(request())
        document["inputs"][0] |= change
        status, _, answer = server.ask("POST", "/v2/models/words/infer", json.dumps(document).encode())
        return status, json.loads(answer).get("error", "")

    assert sent()[0] == 200
    assert sent(data=[["a", "b"], ["c", "d"]])[0] == 200
    for change, words in (
        ({"data": ["a", "b", "c"]}, "3 texts came"),
        ({"data": ["a", "b", "c", 1]}, "no texts"),
        ({"data": ["a", "b", "c", None]}, "no texts"),
        ({"data": [["a", "b"], ["c"]]}, "ragged"),
        ({"datatype": "FP32", "data": [1.0] * 4}, "string"),
    ):
        status, error = sent(**change)
        assert (status, words in error) == (400, True), error


def test_the_binary_form_is_read_back():
    raw = to_binary(WORDS)
    assert from_binary(raw, TEXT, (2, 2), "s").tolist() == WORDS.tolist()
    for broken in (raw[:-1], raw[:-3] + b"\xff\xff\xff", raw + b"\x01", raw + b"\x01\x00\x00\x00a"):
        with pytest.raises(Refusal):
            from_binary(broken, TEXT, (2, 2), "s")
    with pytest.raises(Refusal, match="are more than"):
        from_values([], TEXT, (1 << 21,), "s")


def test_other_models_start_if_one_cannot_be_served(server):
    """The refused model is named, with its output and the reason."""
    assert server.info["models"] == {"words": ["1"], "m": ["1"]}
    (label,) = server.info["refused"]
    assert label == "seq, version 1"
    said = server.errors()
    assert "seq, version 1 is not served" in said
    assert "seq.onnx: output parts is seq(tensor(float))" in said
    assert server.ask("POST", "/v2/models/m/infer", body({"x": np.ones((1, 12), np.float32)}))[0] == 200
    assert server.ask("GET", "/v2/models/seq")[0] == 404


def test_a_version_that_cannot_be_served_leaves_the_others(tmp_path):
    good, bad = linear(tmp_path / "a.onnx"), giving_a_sequence(tmp_path / "b.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    arguments = (f"m:1={good}", f"m:2={bad}", f"other={tmp_path / 'broken.onnx'}")
    with Server(*arguments, "--shadow", f"m={bad}", "--workers", "1", ports=(0, None)) as server:
        assert server.info["models"] == {"m": ["1"]}
        assert server.info["refused"].keys() == {"m, version 2", "m, version 3", "other, version 1"}
        assert server.ask("POST", "/v2/models/m/infer", body({"x": np.ones((1, 12), np.float32)}))[0] == 200


def test_the_server_ends_if_no_model_can_be_served(tmp_path, capsys):
    models = [giving_a_sequence(tmp_path / "a.onnx"), giving_a_sequence(tmp_path / "b.onnx")]
    assert run(["serve", *map(str, models), "--http-port", "0", "--no-grpc", "--access-log", "off"]) == 3
    said = capsys.readouterr().err
    assert "a.onnx: output parts is" in said
