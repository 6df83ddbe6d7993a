"""The Open Inference Protocol with an unmodified tritonclient; the oracle is onnxruntime on the same file."""

import json
import re
import socket

import numpy as np
import pytest
from served import Server, alone, body, echo, linear, running_sum, tokens

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

BINARY = {"content-type": "application/octet-stream"}
X = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
ROW = np.random.default_rng(1).standard_normal((2, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("models")
    return {
        "digits": digits / "model.onnx",
        "linear": linear(folder / "linear.onnx"),
        "second": linear(folder / "second.onnx", seed=2),
        "tokens": tokens(folder / "tokens.onnx"),
        "sum": running_sum(folder / "sum.onnx"),
        "echo": echo(folder / "echo.onnx"),
    }


@pytest.fixture(scope="module")
def server(models, digits):
    more = [f"linear:1={models['linear']}", f"linear:10={models['second']}", f"tokens={models['tokens']}"]
    more += [f"sum={models['sum']}", f"echo={models['echo']}"]
    with Server(digits, *more, "--max-body", "1MB", "--max-json", "100KB") as server:
        yield server


def client(server, module):
    return module.InferenceServerClient(server.http if module is tritonclient.http else server.grpc)


def infer(module, server, model, feeds, *, binary=True, outputs=None, version="", **more):
    from tritonclient.utils import np_to_triton_dtype

    inputs = []
    for name, array in feeds.items():
        inputs.append(module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array, **({"binary_data": binary} if module is tritonclient.http else {}))
    wanted = None
    if outputs:
        kind = {"binary_data": binary} if module is tritonclient.http else {}
        wanted = [module.InferRequestedOutput(name, **kind) for name in outputs]
    return client(server, module).infer(model, inputs, outputs=wanted, model_version=version, **more)


KINDS = [(tritonclient.http, True), (tritonclient.http, False), (tritonclient.grpc, True)]


@pytest.mark.parametrize(("module", "binary"), KINDS, ids=["http binary", "http json", "grpc"])
@pytest.mark.parametrize("named", [True, False])
def test_tritonclient_gets_what_onnxruntime_says(server, models, module, binary, named):
    found = infer(module, server, "digits", {"input": X}, binary=binary, outputs=["output"] if named else None)
    want = alone(models["digits"], {"input": X})["output"]
    np.testing.assert_allclose(found.as_numpy("output"), want, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found.as_numpy("output"), want[::-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc])
def test_two_inputs_of_integers(server, models, module):
    feeds = {"ids": np.arange(10).reshape(2, 5), "mask": np.ones((2, 5), np.int64)}
    feeds["mask"][1, 3:] = 0
    found = infer(module, server, "tokens", feeds, request_id="one")
    np.testing.assert_allclose(found.as_numpy("y"), alone(models["tokens"], feeds)["y"], rtol=0, atol=1e-6)
    response = found.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "one"


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc])
def test_health_and_metadata(server, module):
    c = client(server, module)
    assert c.is_server_live()
    assert c.is_server_ready()
    assert c.is_model_ready("digits")
    assert c.is_model_ready("linear", "10")
    metadata = c.get_model_metadata("linear")
    if not isinstance(metadata, dict):
        (entry,) = metadata.inputs
        entry = {"name": entry.name, "datatype": entry.datatype, "shape": list(entry.shape)}
        metadata = {"versions": list(metadata.versions), "inputs": [entry]}
    assert metadata["versions"] == ["1", "10"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 12]}]
    index = c.get_model_repository_index()
    entries = index if isinstance(index, list) else [{"name": m.name, "state": m.state} for m in index.models]
    assert {entry["name"] for entry in entries if entry["state"] == "READY"} == set(server.info["models"])


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc])
def test_versions(server, models, module):
    for version, file in (("1", "linear"), ("10", "second"), ("", "second")):  # 10 is newer than 1, as numbers go
        found = infer(module, server, "linear", {"x": ROW}, version=version)
        np.testing.assert_allclose(found.as_numpy("y"), alone(models[file], {"x": ROW})["y"], rtol=0, atol=1e-5)
        response = found.get_response()
        named = response["model_version"] if isinstance(response, dict) else response.model_version
        assert named == (version or "10")


def test_metrics_are_what_prometheus_reads(server):
    from prometheus_client.parser import text_string_to_metric_families

    infer(tritonclient.grpc, server, "linear", {"x": ROW}, version="1")
    _, headers, text = server.ask("GET", "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    assert headers["content-type"].startswith("text/plain")
    labels = {"model": "linear", "version": "1", "protocol": "grpc", "status": "200"}
    (counted,) = [s for s in families["rsi_requests"].samples if s.name.endswith("_total") and s.labels == labels]
    assert counted.value >= 1
    assert families["rsi_workers"].samples[0].value == 2
    server.ask("POST", "/v2/models/made-up/infer", body({"x": ROW}))
    assert b"made-up" not in server.ask("GET", "/metrics")[2]  # text from clients is never a label


def test_a_first_axis_that_is_no_batch_is_passed_on(server, models):
    x = np.random.default_rng(3).standard_normal((7, 3)).astype(np.float32)
    found = infer(tritonclient.http, server, "sum", {"x": x})
    np.testing.assert_allclose(found.as_numpy("y"), np.cumsum(x, axis=0), rtol=0, atol=1e-5)


EXTREMES = {
    **{f"{kind}{bits}": np.iinfo(f"{kind.lower()}{bits}") for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.finfo(f"float{bits}") for bits in (16, 32, 64)},
}


@pytest.mark.parametrize(("module", "binary"), KINDS, ids=["http binary", "http json", "grpc"])
def test_every_datatype_comes_back_as_it_went(server, module, binary):
    """The smallest and the largest value of each, to the bit."""
    feeds = {f"x{name}": np.array([[limits.min, limits.max]], limits.dtype) for name, limits in EXTREMES.items()}
    feeds["xBOOL"] = np.array([[True, False]])
    found = infer(module, server, "echo", feeds, binary=binary, outputs=[f"y{name[1:]}" for name in feeds])
    for name, array in feeds.items():
        if name == "xFP16" and not binary:
            continue  # tritonclient reads no FP16 from JSON; the JSON itself is checked below
        back = found.as_numpy(f"y{name[1:]}")
        assert (back.dtype, back.tobytes()) == (array.dtype, array.tobytes()), name
    if module is tritonclient.http and not binary:
        assert found.get_output("yFP16")["data"] == [-65504.0, 65504.0]


def test_json_cannot_carry_nan(server):
    """NaN would be null in JSON; binary data can hold it."""
    feeds = {f"x{name}": np.zeros((1, 2), limits.dtype) for name, limits in EXTREMES.items()}
    feeds |= {"xBOOL": np.zeros((1, 2), bool), "xFP32": np.array([[np.nan, np.inf]], np.float32)}
    found = infer(tritonclient.http, server, "echo", feeds, outputs=["yFP32"])
    np.testing.assert_array_equal(found.as_numpy("yFP32"), feeds["xFP32"])
    put = []
    for name, array in feeds.items():
        put.append(tritonclient.http.InferInput(name, array.shape, name[1:]))
        put[-1].set_data_from_numpy(array)
    wanted = [tritonclient.http.InferRequestedOutput("yFP32", binary_data=False)]
    with pytest.raises(InferenceServerException, match="NaN or infinity, which JSON cannot"):
        client(server, tritonclient.http).infer("echo", put, outputs=wanted)


# -- what is refused


def head(size=96, **changed):
    entry = {"name": "x", "shape": [2, 12], "datatype": "FP32", "parameters": {"binary_data_size": size}} | changed
    return json.dumps({"inputs": [entry]}).encode()


def entry_of(**changed):
    entry = {"name": "x", "shape": [2, 12], "datatype": "FP32", "data": ROW.ravel().tolist()} | changed
    return json.dumps({"inputs": [entry]}).encode()


def truth(*numbers):
    entry = {"name": "x", "shape": [1, 2], "datatype": "BOOL", "parameters": {"binary_data_size": len(numbers)}}
    start = json.dumps({"inputs": [entry]}).encode()
    return start + bytes(numbers), len(start)


def values(*numbers, datatype="FP32"):
    return json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": datatype, "data": numbers}]}).encode()


BAD = {
    "no JSON": (b"nonsense", "no JSON"),
    "empty": (b"", "no JSON"),
    "a list": (b"[1]", "must be a JSON object"),
    "no inputs": (b"{}", "inputs must be a list"),
    "inputs empty": (b'{"inputs": []}', "inputs is empty"),
    "inputs of numbers": (b'{"inputs": [1]}', "inputs must be a list of objects"),
    "no name": (entry_of(name=None), "name of an input"),
    "wrong name": (entry_of(name="z"), "the inputs given are z"),
    "twice": (json.dumps({"inputs": json.loads(entry_of())["inputs"] * 2}).encode(), "is repeated"),
    "wrong datatype": (entry_of(datatype="FP64"), "float64"),
    "made-up datatype": (entry_of(datatype="COMPLEX"), "datatype must be one of"),
    "datatype a number": (entry_of(datatype=3), "datatype must be one of"),
    "wrong rank": (entry_of(shape=[24]), r"\(24,\)"),
    "wrong width": (entry_of(shape=[3, 8]), r"\(3, 8\)"),
    "shape and data differ": (entry_of(shape=[3, 12]), "data has the shape"),
    "negative shape": (entry_of(shape=[-2, 12]), "shape must be"),
    "no shape": (entry_of(shape=None), "shape must be"),
    "shape of floats": (entry_of(shape=[2.0, 12]), "shape must be"),
    "shape of bools": (entry_of(shape=[True, 24]), "shape must be"),
    "endless shape": (entry_of(shape=[1] * 1000), "shape must be"),
    "huge shape": (entry_of(shape=[2**62, 2**62]), "shape must be"),
    "no data": (entry_of(data=None), "data must be a list"),
    "ragged": (entry_of(data=[[1, 2], [3]]), "ragged"),
    "text": (values("1", "2"), "values that are no FP32"),
    "null": (values(None, 1), "values that are no FP32"),
    "bools": (values(True, False), "values that are no FP32"),
    "too large for FP32": (values(1e300, 1), "outside FP32"),
    "a fraction for INT64": (values(1.5, 1, datatype="INT64"), "no INT64"),
    "300 for a UINT8": (values(300, 1, datatype="UINT8"), "outside UINT8"),
    "-1 for a UINT64": (values(-1, 1, datatype="UINT64"), "outside UINT64"),
    "unknown output": (body({"x": ROW}, outputs=[{"name": "q"}]), "no output q"),
    "parameters a list": (entry_of(parameters=[1]), "parameters must be an object, but got a list of 1"),
    "classification": (
        body({"x": ROW}, outputs=[{"name": "y", "parameters": {"classification": 2}}]),
        "not supported",
    ),
    "binary_data a number": (
        body({"x": ROW}, outputs=[{"name": "y", "parameters": {"binary_data": 1}}]),
        "true or false",
    ),
    "id a number": (body({"x": ROW}, id=5), "id must be a string"),
    "binary size without its header": (head(), "is missing"),
    "deep nesting": (b"[" * 50_000 + b"]" * 50_000, "no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_json_gets_an_error_object(server, name):
    content, words = BAD[name]
    check_refused(server, content, {}, 400, words)


BAD_BINARY = {
    "truncated": (head() + ROW.tobytes()[:-4], len(head()), "only 92 bytes are left"),
    "left over": (head() + ROW.tobytes() + b"1234", len(head()), "4 bytes of tensors are left over"),
    "size is not the shape's": (head(92) + ROW.tobytes()[:-4], len(head(92)), "96 bytes, but 92"),
    "negative size": (head(-1) + ROW.tobytes(), len(head(-1)), "number of bytes"),
    "size a text": (head("96") + ROW.tobytes(), len(head("96")), "number of bytes"),
    "header too long": (head(), 99999, "must be a number of 1 to"),
    "header 0": (head(), 0, "must be a number of 1 to"),
    "header nonsense": (head(), "ten", "must be a number of 1 to"),
    "a BOOL of 2": (*truth(0, 2), "a BOOL is a byte of 0 or 1, but got 2"),
    "data as well": (head(data=[1]) + ROW.tobytes(), len(head(data=[1])), "send one of them"),
    "shared memory": (
        head(parameters={"shared_memory_region": "r"}),
        len(head(parameters={"shared_memory_region": "r"})),
        "not supported",
    ),
}


@pytest.mark.parametrize("name", BAD_BINARY)
def test_a_bad_binary_body_gets_an_error_object(server, name):
    content, length, words = BAD_BINARY[name]
    check_refused(server, content, {**BINARY, "Inference-Header-Content-Length": str(length)}, 400, words)


def check_refused(server, content, headers, status, words, path="/v2/models/linear/versions/1/infer"):
    came, sent, text = server.ask("POST", path, content, headers)
    assert (came, sent["content-type"]) == (status, "application/json"), text
    assert re.search(words, json.loads(text)["error"]), text
    status, _, text = server.ask("POST", "/v2/models/linear/versions/1/infer", body({"x": ROW}))
    assert status == 200, text  # the server still answers
    assert len(json.loads(text)["outputs"][0]["data"]) == 10


def test_bodies_that_are_too_large(server):
    check_refused(server, b"x" * 100_000_000, {}, 413, "the most that a request may have")
    check_refused(server, body({"x": np.zeros((2000, 12), np.float32)}), {}, 413, "send tensors as binary data")
    chunks = iter([b"x" * 100_000] * 20)  # without a Content-Length
    check_refused(server, chunks, {}, 413, "more than 1000000 bytes")


@pytest.mark.parametrize("start", [b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-Long: ", b"GET /"])
def test_headers_without_end(server, start):
    address, port = server.http.split(":")
    with socket.create_connection((address, int(port)), timeout=10) as connection:
        connection.sendall(start)
        with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe, as the system likes
            for _ in range(50):
                connection.sendall(b"a" * 1_000_000)
    assert server.ask("GET", "/v2/health/live")[0] == 200


def test_a_message_that_is_too_large_for_grpc(server):
    with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
        infer(tritonclient.grpc, server, "linear", {"x": np.zeros((30_000, 12), np.float32)})
    assert client(server, tritonclient.grpc).is_server_live()


def test_compressed_bodies_are_not_taken(server):
    check_refused(server, b"\x1f\x8b", {"content-encoding": "gzip"}, 415, "compressed")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v2/models/nobody/infer", "no model 'nobody'"),
        ("/v2/models/linear/versions/2/infer", "no version '2'; it has 1, 10"),
        ("/v2/models/linear/versions/x/infer", "no version 'x'"),
        ("/v3/models/linear/infer", "not part of the protocol"),
        ("/", "not part of the protocol"),
    ],
)
def test_unknown_names_versions_and_paths(server, path, words):
    check_refused(server, body({"x": ROW}), {}, 404, words, path)


def test_a_model_without_a_shadow_says_how_it_gets_one(server):
    status, _, text = server.ask("GET", "/v2/models/linear/shadow")
    assert status == 404
    assert json.loads(text)["error"].endswith("linear has no shadow; start the server with --shadow linear=DIR")


def test_wrong_methods(server):
    status, _, text = server.ask("DELETE", "/v2/models/linear")
    assert (status, list(json.loads(text))) == (405, ["error"])


def test_inputs_that_the_model_cannot_run(server):
    """Right in name, type and shape, and yet no row of the table."""
    feeds = {"ids": np.full((1, 4), 999), "mask": np.ones((1, 4), np.int64)}
    check_refused(server, body(feeds), {}, 400, "could not run these inputs", "/v2/models/tokens/infer")


def test_symbols_that_contradict_each_other(server):
    feeds = {"ids": np.ones((1, 4), np.int64), "mask": np.ones((1, 3), np.int64)}
    check_refused(server, body(feeds), {}, 400, "T is 4 in ids, but 3 in mask", "/v2/models/tokens/infer")


def test_grpc_says_the_same_in_its_own_codes(server):
    pb, codes = tritonclient.grpc.service_pb2, {"NOT_FOUND": [], "INVALID_ARGUMENT": []}
    for model, version, feeds in (
        ("nobody", "", {"x": ROW}),
        ("linear", "7", {"x": ROW}),
        ("linear", "", {"z": ROW}),
        ("linear", "", {"x": ROW[:, :5]}),
        ("linear", "", {"x": ROW.astype(np.int64)}),
    ):
        with pytest.raises(InferenceServerException) as refused:
            infer(tritonclient.grpc, server, model, feeds, version=version)
        codes[refused.value.status().split(".")[1]].append(refused.value.message())
    assert [len(found) for found in codes.values()] == [2, 3]

    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[2, 12])
    request = pb.ModelInferRequest(model_name="linear", inputs=[tensor], raw_input_contents=[ROW.tobytes()[:-3]])
    grpc = client(server, tritonclient.grpc)
    with pytest.raises(Exception, match="96 bytes, but 93 bytes came"):
        grpc._client_stub.ModelInfer(request)
    tensor.contents.fp32_contents.extend(ROW.ravel().tolist())
    good = pb.ModelInferRequest(model_name="linear", inputs=[tensor])
    found = grpc._client_stub.ModelInfer(good)
    raw = infer(tritonclient.grpc, server, "linear", {"x": ROW}).as_numpy("y").tobytes()
    assert found.raw_output_contents[0] == raw


# -- starting


def test_a_key_is_needed_where_one_is_set(models, tmp_path):
    file = tmp_path / "key"
    file.write_text("secret\n")
    with Server(models["linear"], "--api-key-file", file) as server:
        path, asked = "/v2/models/linear/infer", body({"x": ROW})
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
            assert server.ask("POST", path, asked, headers)[0] == 401, headers
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            assert server.ask("POST", path, asked, headers)[0] == 200, headers
        infer(tritonclient.grpc, server, "linear", {"x": ROW}, headers={"x-api-key": "secret"})
        with pytest.raises(InferenceServerException, match="an API key is needed"):
            infer(tritonclient.grpc, server, "linear", {"x": ROW})
