"""`serve --engine ray`: the answers of a real Ray Serve, and what is refused. Skipped if ray is not installed."""

import importlib.util
import json
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from processes import free_port, running
from served import MAIN, Server, alone, body, linear, versions_of_answers

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")
import grpc
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from rsi_deploy import Preprocessing, UsageError, evaluate, export, read_report
from rsi_deploy.cli import run
from rsi_deploy.serving.ray import grpc as ray_grpc
from rsi_deploy.serving.ray.app import RayAppSettings, build
from rsi_deploy.serving.transports.grpc_app import grpc_calls

EVAL = Path(__file__).parents[2] / "samples" / "digits_eval.npz"
ROW = np.random.default_rng(0).standard_normal((1, 12)).astype(np.float32)
CANARY = ("--canary-share", "20%")


def needs_ray():
    pytest.importorskip("ray.serve", reason="no ray here: pip install 'rsi-deploy[ray]'")


# -- what is refused before Ray starts


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "ray", "--workers", "2"], "--workers has no effect with --engine ray"),
        (["--engine", "ray", "--provider", "cuda"], "--engine ray serves on cpu alone"),
        (["--engine", "ray", "--access-log", "log.txt"], "--access-log log.txt: with --engine ray it must be -"),
        (["--engine", "ray", "--ray", "local", "--write-config", "c.yaml"], "--ray has no effect with --write-config"),
        (["--engine", "ray", "--write-config", "c.yaml", "--http-port", "0"], "--http-port 0: every node"),
        (["--engine", "ray", "--replicas", "4-1"], "--replicas must be the fewest and the most"),
        (["--engine", "ray", "--grpc-port", "8001"], "listens for gRPC on every address of the machine"),
        (["--ray", "local"], "--ray has no effect without --engine ray"),
        (["--replicas", "2"], "--replicas has no effect without --engine ray"),
        (["--write-config", "c.yaml"], "--write-config has no effect without --engine ray"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run(["serve", str(linear(tmp_path / "m.onnx")), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "c.yaml").exists()


def test_a_missing_extra(tmp_path, monkeypatch, capsys, caplog):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    assert run(["serve", str(linear(tmp_path / "m.onnx")), "--engine", "ray", "--http-port", "0"]) == 2
    assert "HTTP alone: Ray Serve listens for gRPC on every address" in caplog.text
    assert "pip install 'rsi-deploy[serve,ray,cpu]'" in capsys.readouterr().err


def test_no_config_is_written_for_a_bundle_with_changed_files(copied, tmp_path, monkeypatch, capsys):
    content = bytearray((copied / "model.onnx").read_bytes())
    content[-1000] ^= 1
    (copied / "model.onnx").write_bytes(content)
    config = tmp_path / "c.yaml"
    assert run(["serve", str(copied), "--engine", "ray", "--write-config", str(config)]) == 4
    assert "changed since report.json was written: model.onnx" in capsys.readouterr().err
    assert not config.exists()


def test_a_config_is_read_back_and_holds_no_key(tmp_path, monkeypatch, capsys):
    yaml = pytest.importorskip("yaml")
    config, model = tmp_path / "c.yaml", linear(tmp_path / "m.onnx")
    monkeypatch.setenv("RSI_DEPLOY_API_KEY", "open sesame")
    monkeypatch.chdir(tmp_path)
    words = ["serve", "a=m.onnx", "--engine", "ray", "--replicas", "0-3", "--write-config", str(config)]
    assert run([*words, "--canary", "m.onnx", "--canary-share", "10%", "--threads", "2"]) == 0
    assert str(config) in capsys.readouterr().out
    assert "open sesame" not in config.read_text()
    (application,) = yaml.safe_load(config.read_text())["applications"]
    settings = RayAppSettings.model_validate(application["args"])
    assert (settings.models, settings.canary, settings.canary_share) == ((f"a={model}",), str(model), 0.1)
    assert (settings.replicas, settings.threads, settings.max_body) == ((0, 3), 2, 64_000_000)
    assert (settings.api_key, settings.needs_key) == ("", True)
    assert run(words) == 2  # nothing is overwritten
    assert "the file exists" in capsys.readouterr().err
    with pytest.raises(UsageError, match="args: models: Field required"):
        build({})


def test_every_grpc_message_can_be_pickled():
    ray_grpc.add_to_server(service_pb2_grpc.GRPCInferenceServiceServicer(), grpc.server(ThreadPoolExecutor(1)))
    for name in ray_grpc.METHODS:
        message = getattr(service_pb2, f"{name}Request")()
        assert pickle.loads(pickle.dumps(message)) == message
    with pytest.raises(pickle.PicklingError, match="grpc_service_pb2"):
        pickle.dumps(service_pb2.ModelStatisticsRequest())  # an unsupported method, whose message is not corrected
    assert set(ray_grpc.METHODS) == set(grpc_calls(None, None, None))


@pytest.mark.ray
def test_ray_s_own_schema_takes_the_config(tmp_path):
    needs_ray()
    yaml, schema = pytest.importorskip("yaml"), pytest.importorskip("ray.serve.schema")
    config = tmp_path / "c.yaml"
    words = ["--engine", "ray", "--host", "0.0.0.0", "--write-config", str(config)]
    assert run(["serve", str(linear(tmp_path / "m.onnx")), *words]) == 0
    given = yaml.safe_load(config.read_text())
    found = schema.ServeDeploySchema.model_validate(given).model_dump(exclude_unset=True)
    assert found["http_options"] == given["http_options"]
    assert found["grpc_options"] == given["grpc_options"]
    assert found["applications"] == given["applications"]
    given["http_options"]["port"] = "everywhere"
    with pytest.raises(ValueError, match="port"):
        schema.ServeDeploySchema.model_validate(given)


# -- served


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {v: linear(tmp_path_factory.mktemp("m") / f"m{v}.onnx", seed=int(v)) for v in ("1", "2")}


@pytest.fixture(scope="module")
def harsh(tmp_path_factory):
    return tmp_path_factory.mktemp("harsh") / "harsh"


@pytest.fixture(scope="module")
def server(digits, models, harsh, tmp_path_factory):
    """A server of the sample's bundle, a linear model with a canary, and the sample's dense model with a shadow."""
    needs_ray()
    export(str(digits / "dense.onnx"), harsh, rank="5%", measure=False, always_split=True)
    shadow = (f"dense={digits / 'dense.onnx'}", "--shadow", f"dense={harsh}")
    canary = ("--canary", f"m={models['2']}", *CANARY)
    options = ("--engine", "ray", "--replicas", "1", "--max-body", "1MB", "--max-json", "100kB")
    log = tmp_path_factory.mktemp("log") / "stderr"
    everywhere = ("--host", "0.0.0.0")  # required for gRPC
    served = (digits, f"m={models['1']}", *canary, *shadow)
    with Server(*served, *options, *everywhere, code=MAIN, log=log, ends_within=60) as started:
        yield started


@pytest.mark.ray
@pytest.mark.parametrize(("module", "way"), [("http", "binary"), ("http", "json"), ("grpc", "binary")])
def test_tritonclient_gets_what_onnxruntime_says(server, digits, module, way):
    inputs = (read_report(digits).preprocessing or Preprocessing()).apply(np.load(EVAL)["images"][:5])
    want = alone(digits / "model.onnx", {"input": inputs})["output"]
    triton = {"http": tritonclient.http, "grpc": tritonclient.grpc}[module]
    client = triton.InferenceServerClient(getattr(server, module))
    kind = {"binary_data": way == "binary"} if module == "http" else {}
    (asked,) = (triton.InferInput("input", inputs.shape, np_to_triton_dtype(inputs.dtype)),)
    asked.set_data_from_numpy(inputs, **kind)
    outputs = [triton.InferRequestedOutput("output", **kind)]
    found = client.infer("digits", [asked], outputs=outputs).as_numpy("output")
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found[::-1], want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits", "1")
    with pytest.raises(InferenceServerException, match="no model 'nobody'"):
        client.infer("nobody", [asked])


@pytest.mark.ray
def test_a_wrong_request_gets_an_error_object(server):
    wrong = body({"x": np.zeros((1, 5), np.float32)})
    for path, content, headers, status, words in (
        ("m/infer", b"{", {}, 400, "no JSON"),
        ("m/infer", b"[" * 50_000, {}, 400, "no JSON"),
        ("m/infer", wrong, {}, 400, "takes x: float32"),
        ("m/infer", bytes(200_000), {}, 413, "bytes of JSON are more than"),
        ("m/infer", bytes(2_000_000), {}, 413, "bytes are more than"),
        ("m/infer", body({"x": ROW}), {"Inference-Header-Content-Length": "99999"}, 400, "must be a number"),
        ("m/versions/9/infer", body({"x": ROW}), {}, 404, "has no version '9'"),
        ("nobody/infer", body({"x": ROW}), {}, 404, "no model 'nobody'"),
        ("m/more", b"", {}, 404, "not part of the protocol"),
    ):
        came, _, text = server.ask("POST", f"/v2/models/{path}", content, headers)
        assert (came, set(json.loads(text))) == (status, {"error"}), text
        assert words in json.loads(text)["error"]
        assert server.ask("POST", "/v2/models/m/infer", body({"x": ROW}))[0] == 200  # the server still answers


@pytest.mark.ray
def test_the_canary_answers_its_share(server, models):
    before = server.metric("rsi_requests_total", model="m", version="2", status="200")
    versions = versions_of_answers(server, models, ROW, clients=5)
    assert versions == {"1": 40, "2": 10}
    assert server.metric("rsi_requests_total", model="m", version="2", status="200") - before == 10


@pytest.mark.ray
def test_the_shadow_agrees_as_eval_does(server, digits, harsh):
    steps = read_report(digits).preprocessing or Preprocessing()
    inputs = steps.apply(np.load(EVAL)["images"])
    oracle = evaluate(harsh / "model.onnx", EVAL, reference=digits / "dense.onnx", preprocessing=steps)
    assert oracle.agreement < 99  # so that a wrong comparison would be noticed
    for start in range(0, len(inputs), 8):
        assert server.ask("POST", "/v2/models/dense/infer", body({"input": inputs[start : start + 8]}))[0] == 200
    for _ in range(200):
        summary = json.loads(server.ask("GET", "/v2/models/dense/shadow")[2])
        if summary["samples"] + summary["skipped"] >= len(inputs):
            break
    assert (summary["samples"], summary["skipped"]) == (len(inputs), 0)
    assert summary["agreement"] == oracle.agreement
    assert summary["divergence"] == pytest.approx(oracle.divergence, rel=1e-4)
    assert server.metric("rsi_shadow_samples", model="dense") == len(inputs)


@pytest.mark.ray
def test_the_written_config_serves_and_requires_its_key(tmp_path):
    """`serve run` reads the same config as `serve deploy`, which would need a cluster with a dashboard."""
    needs_ray()
    model, config, port = linear(tmp_path / "m.onnx"), tmp_path / "c.yaml", free_port()
    environment = {**os.environ, "RSI_DEPLOY_API_KEY": "sesame", "RAY_ADDRESS": "local"}
    environment |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_USAGE_STATS_ENABLED": "0"}
    words = ["serve", f"m={model}", "--engine", "ray", "--no-grpc", "--http-port", str(port)]
    command = [sys.executable, "-c", MAIN, *words, "--replicas", "1", "--write-config", str(config)]
    assert os.spawnve(os.P_WAIT, sys.executable, command, environment) == 0
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    url = f"http://127.0.0.1:{port}/v2/health/ready"
    with running(command, url, tmp_path / "log", within=240, env=environment):
        asked = Server.__new__(Server)
        asked.http = f"127.0.0.1:{port}"
        status, _, text = asked.ask("POST", "/v2/models/m/infer", body({"x": ROW}))
        assert (status, "API key" in json.loads(text)["error"]) == (401, True)
        headers = {"Authorization": "Bearer sesame"}
        status, _, text = asked.ask("POST", "/v2/models/m/infer", body({"x": ROW}), headers)
        assert status == 200
        want = alone(model, {"x": ROW})["y"].ravel()
        np.testing.assert_allclose(json.loads(text)["outputs"][0]["data"], want, rtol=0, atol=1e-5)
