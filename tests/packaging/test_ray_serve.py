"""The packaged application in a real Ray Serve, with an unmodified tritonclient. Skipped if ray is not installed."""

import json
import os
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from engines import asked, free_port, running, with_tritonclient
from models import bundle_of, mixing, mlp_bundle, tokens

from rsi_deploy import ModelError, package
from rsi_deploy.packaging.servable import Tensor

READY_WITHIN = 240  # s, on two busy cores


def outputs(model, feeds):
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, feeds), strict=True))


# -- what is written


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return mlp_bundle(tmp_path_factory.mktemp("mlp"))


def config(folder):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_the_config(mlp, tmp_path):
    package(mlp, tmp_path / "p", target="ray-serve", replicas="0-3", cpus=4, max_batch=16, storage_uri="s3://b/p.zip")
    found = config(tmp_path / "p")
    (application,) = found["applications"]
    (deployment,) = application["deployments"]
    assert found["http_options"]["host"] == "127.0.0.1"
    assert application["args"] == {"name": "mlp", "max_batch": "16", "max_delay_ms": "1", "threads": "4"}
    assert application["runtime_env"] == {"working_dir": "s3://b/p.zip"}
    assert deployment["ray_actor_options"] == {"num_cpus": 4}
    assert deployment["autoscaling_config"]["max_replicas"] == 3
    assert deployment["max_ongoing_requests"] > 16


def test_dependent_samples_do_not_share_a_run(tmp_path):
    made = bundle_of(mixing(tmp_path / "m.onnx"), tmp_path / "m")
    result = package(made, tmp_path / "p", target="ray-serve")
    assert config(tmp_path / "p")["applications"][0]["args"]["max_batch"] == "1"
    assert result.batched is False
    assert "Requests are not batched" in (tmp_path / "p" / "README.md").read_text()


def test_an_unsupported_type_is_refused(mlp, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rsi_deploy.packaging.servable._tensor",
        lambda value: Tensor(name="text", type="string", shape=("n",)),
    )
    with pytest.raises(ModelError, match="text is string, which --target ray-serve does not support"):
        package(mlp, tmp_path / "p", target="ray-serve")
    assert not (tmp_path / "p").exists()


def lost_in(given, back, where=""):
    """Return the paths of values of `given` that `back` lacks or changes."""
    if isinstance(given, list):
        given, back = dict(enumerate(given)), dict(enumerate(back or []))
    if not isinstance(given, dict):
        return [] if given == back else [where]
    found = back if isinstance(back, dict) else {}
    return [p for key, value in given.items() for p in lost_in(value, found.get(key), f"{where}.{key}".lstrip("."))]


@pytest.mark.ray
def test_ray_s_own_schema_takes_the_config(mlp, tmp_path):
    schema = pytest.importorskip("ray.serve.schema")
    package(mlp, tmp_path / "p", target="ray-serve")
    found = config(tmp_path / "p")

    def lost():
        return lost_in(found, schema.ServeDeploySchema.model_validate(found).model_dump(exclude_unset=True))

    assert lost() == []
    deployment = found["applications"][0]["deployments"][0]
    deployment["surplus"] = 1  # the schema drops unknown fields
    assert lost() == ["applications.0.deployments.0.surplus"]
    pytest.importorskip("ray.serve.config").AutoscalingConfig.model_validate(deployment["autoscaling_config"])
    deployment["max_ongoing_requests"] = "many"
    with pytest.raises(ValueError, match="max_ongoing_requests"):
        lost()


# -- served


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Run `serve run config.yaml` for a token model on a separate Ray; yield address, bundle and a client's Python."""
    pytest.importorskip("ray.serve", reason='no ray here: pip install "rsi-deploy[ray]"')
    python = with_tritonclient()
    root = tmp_path_factory.mktemp("ray")
    bundle = bundle_of(tokens(root / "t.onnx"), root / "tokens", input_shape=["ids=2x7"])
    package(bundle, root / "p", target="ray-serve", replicas="1", cpus=1, max_delay_ms=200.0)
    port = free_port()
    path = root / "p" / "config.yaml"
    path.write_text(path.read_text().replace("port: 8000", f"port: {port}"))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean |= {
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": "local",  # never another cluster on this machine
    }
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "config.yaml"]
    url = f"http://127.0.0.1:{port}/v2/models/tokens/ready"
    with running(command, url, root / "log", within=READY_WITHIN, cwd=root / "p", env=clean):
        yield f"127.0.0.1:{port}", bundle, python


def some(count=4):
    rng = np.random.default_rng(2)
    return {"ids": rng.integers(0, 50, (count, 9)), "mask": rng.integers(0, 2, (count, 9))}


@pytest.mark.ray
@pytest.mark.parametrize("way", ["json", "binary"])
def test_it_answers_as_onnxruntime_alone(served, tmp_path, way):
    address, bundle, python = served
    np.savez(tmp_path / "feeds.npz", **some())
    asked(python, "ask_triton.py", address, "tokens", "1", way, tmp_path / "feeds.npz", tmp_path / "answers.npz")
    expected = outputs(bundle / "model.onnx", some())
    other = outputs(bundle.parent / "t.onnx", some())
    with np.load(tmp_path / "answers.npz") as answers:
        assert set(answers.files) == expected.keys()
        for name in answers.files:
            np.testing.assert_allclose(answers[name], expected[name], rtol=1e-5, atol=1e-5)
            assert answers[name].dtype == expected[name].dtype
        assert np.abs(answers["vector"] - other["vector"]).max() > 1e-2  # the dense model would be noticed


def posted(address, body, path="/v2/models/tokens/infer", **headers):
    """Return status and document of a raw request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://{address}{path}", data, headers), timeout=60
        ) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def request(ids=None, **changed):
    given = {"name": "ids", "datatype": "INT64", "shape": [1, 3], "data": ids or [1, 2, 3]}
    mask = {"name": "mask", "datatype": "INT64", "shape": [1, 3], "data": [1, 1, 1]}
    return {"inputs": [{**given, **changed}, mask]}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "must be 1 to 0"),
        (b"{", "no JSON"),
        (b"[1]", "must be a JSON object"),
        (b"[" * 200_000, "no JSON"),
        ({}, "inputs must be a list"),
        ({"inputs": []}, "inputs are missing: ['ids', 'mask']"),
        (request(name="other"), "input 'other' is unknown"),
        (request(name=["ids"]), "is unknown"),
        (request(datatype="FP32"), "input ids is INT64, but got 'FP32'"),
        (request(shape=[3]), "input ids has shape ['batch', 'length'], but got [3]"),
        (request(shape=[1, -3]), "but got [1, -3]"),
        (request(shape=[1 << 40, 1 << 40]), "more than a request may have"),
        (request([1, 2]), "no int64 of shape [1, 3]"),
        (request([1, 2, 3.5]), "no int64"),
        (request([1, 2, "3"]), "no int64"),
        (request([1, 2, [3]]), "no int64"),
        (request([1, 2, 1 << 70]), "no int64"),
        (request(parameters={"binary_data_size": 24}), "needs 24 bytes"),
        (request(parameters=1), "parameters must be an object"),
        ({**request(), "outputs": [{"name": "more"}]}, "outputs ['more'] are unknown"),
        (request([1, 2, 50]), "the model could not run these inputs"),
    ],
    ids=range(21),
)
def test_a_wrong_request_gets_an_error_object(served, body, words):
    status, document = posted(served[0], body)
    assert status == 400
    assert set(document) == {"error"}
    assert words in document["error"]
    assert posted(served[0], request())[0] == 200  # the server still answers


@pytest.mark.ray
def test_unknown_paths_models_and_versions_are_not_found(served):
    address = served[0]
    for path in ("/", "/v2/models/other/infer", "/v2/models/tokens/versions/2/infer", "/v2/models/tokens/more"):
        status, document = posted(address, request(), path=path)
        assert (status, set(document)) == (404, {"error"})
    assert posted(address, request(), path="/v2/models/tokens/versions/1/infer")[0] == 200
    assert posted(address, b"{}", **{"Inference-Header-Content-Length": "9"})[0] == 400
    assert posted(address, bytes((64 << 20) + 1))[0] == 413


@pytest.mark.ray
def test_a_bad_request_does_not_fail_others_in_its_run(served):
    from concurrent.futures import ThreadPoolExecutor

    address, bundle, _ = served
    feeds = some(8)
    feeds["ids"][3, 4] = 50  # an invalid index
    bodies = [
        {
            "inputs": [
                {"name": name, "datatype": "INT64", "shape": [1, 9], "data": array[at].tolist()}
                for name, array in feeds.items()
            ]
        }
        for at in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: posted(address, body), bodies))
    assert [status for status, _ in answers] == [200, 200, 200, 400, 200, 200, 200, 200]
    good = [at for at in range(8) if at != 3]
    expected = outputs(bundle / "model.onnx", {name: array[good] for name, array in feeds.items()})["vector"]
    found = np.array([answers[at][1]["outputs"][0]["data"] for at in good])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
