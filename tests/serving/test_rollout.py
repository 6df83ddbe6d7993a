"""The rollout of a compressed model: the canary's share, and the shadow's comparison against that of `eval`."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import Server, alone, body, linear, versions_of_answers

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")

from rsi_deploy import Preprocessing, evaluate, read_report
from rsi_deploy.runtime.sessions import make_session
from rsi_deploy.serving.catalog import Route, ServedModel
from rsi_deploy.serving.protocol.images import image_request
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.signature import Signature

EVAL = Path(__file__).parents[2] / "samples" / "digits_eval.npz"
X = np.random.default_rng(0).standard_normal((1, 12)).astype(np.float32)


@pytest.mark.parametrize(("share", "asked"), [(0.1, 1000), (0.25, 400), (1 / 3, 300), (0.5, 7), (1.0, 10), (0.01, 99)])
def test_the_canary_gets_its_share_to_the_request(share, asked, digits):
    served = {v: ServedModel(name="m", version=v, bundle=None) for v in ("1", "2")}
    route = Route(name="m", versions=served, main="1", canary="2", share=share)
    picked = [route.pick("").version for _ in range(asked)]
    assert picked.count("2") == int(asked * share + 1e-9)
    gaps = np.diff([-1, *(place for place, version in enumerate(picked) if version == "2")])
    assert all(gap in (int(1 / share), int(1 / share) + 1) for gap in gaps)  # evenly spread
    assert {route.pick("1").version, route.pick("2").version} == {"1", "2"}


def test_a_canary_answers_its_share_and_says_so(tmp_path):
    models = {v: linear(tmp_path / f"m{v}.onnx", seed=int(v)) for v in ("1", "2")}
    with Server(f"m={models['1']}", "--canary", models["2"], "--canary-share", "20%") as server:
        versions = versions_of_answers(server, models, X, clients=10)
        assert versions == {"1": 80, "2": 20}
        for version, count in versions.items():
            assert server.metric("rsi_requests_total", model="m", version=version) == count
        for version in ("1", "2"):  # a request that names a version gets it
            text = server.ask("POST", f"/v2/models/m/versions/{version}/infer", body({"x": X}))[2]
            assert json.loads(text)["model_version"] == version


def compared(server, name, samples):
    """Wait until the shadow has compared the samples; return its summary."""
    end = time.monotonic() + 20
    while True:
        summary = json.loads(server.ask("GET", f"/v2/models/{name}/shadow")[2])
        if summary["samples"] + summary["skipped"] >= samples or time.monotonic() > end:
            return summary
        time.sleep(0.05)


def test_the_shadow_agrees_as_eval_does(digits, tmp_path):
    """The dense model answers, and a strongly compressed one is its shadow; `eval --reference` is the oracle."""
    data = np.load(EVAL)
    steps = read_report(digits).preprocessing or Preprocessing()
    inputs = steps.apply(data["images"])
    harsh = tmp_path / "harsh"
    from rsi_deploy import export

    export(str(digits / "dense.onnx"), harsh, rank="5%", measure=False, always_split=True)
    oracle = evaluate(harsh / "model.onnx", EVAL, reference=digits / "dense.onnx", preprocessing=steps)
    assert oracle.agreement < 99  # so that a wrong comparison would be noticed
    with Server(f"m={digits / 'dense.onnx'}", "--shadow", harsh) as server:
        for start in range(0, len(inputs), 8):
            rows = inputs[start : start + 8]
            status, _, text = server.ask("POST", "/v2/models/m/infer", body({"input": rows}))
            assert (status, json.loads(text)["model_version"]) == (200, "1")
        summary = compared(server, "m", len(inputs))
        assert summary["samples"] == len(inputs) == oracle.samples
        assert summary["skipped"] == 0
        assert summary["kind"] == oracle.kind == "classes"
        assert summary["agreement"] == oracle.agreement
        assert summary["agreement_interval"] == pytest.approx(oracle.agreement_interval)
        assert summary["divergence"] == pytest.approx(oracle.divergence, rel=1e-4)
        (value,) = summary["values"]
        assert value["output"] == "output"
        assert 0 < value["cosine"] < 1
        assert summary["latency"]["main"]["mean_ms"] > 0 < summary["latency"]["shadow"]["p99_ms"]
        assert server.metric("rsi_shadow_agreement_percent", model="m") == pytest.approx(summary["agreement"])
        assert server.metric("rsi_shadow_samples", model="m") == len(inputs)


def test_embeddings_are_compared_as_values(tmp_path):
    """One number a row is no class score: the summary has cosine and distance, as in `eval`."""
    data = np.random.default_rng(3).standard_normal((40, 12)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=data)
    one, two = (linear(tmp_path / f"{seed}.onnx", seed=seed, rows_out=1) for seed in (1, 2))
    oracle = evaluate(two, tmp_path / "data.npz", reference=one)
    with Server(f"m={one}", "--shadow", two) as server:
        for row in data:
            assert server.ask("POST", "/v2/models/m/infer", body({"x": row[None]}))[0] == 200
        summary = compared(server, "m", 40)
    assert (summary["kind"], summary["agreement"]) == (oracle.kind, None) == ("values", None)
    (value,) = summary["values"]
    assert value["cosine"] == pytest.approx(oracle.values[0].cosine, abs=1e-4)
    assert value["distance"] == pytest.approx(oracle.values[0].distance, rel=1e-4)


def test_a_shadow_that_cannot_run_the_inputs_is_skipped(tmp_path):
    wide, narrow = linear(tmp_path / "wide.onnx"), linear(tmp_path / "narrow.onnx", rows_in=5)
    with Server(f"m={wide}", "--shadow", narrow) as server:
        assert server.ask("POST", "/v2/models/m/infer", body({"x": X}))[0] == 200
        summary = compared(server, "m", 1)
        assert (summary["skipped"], summary["samples"]) == (1, 0)
        assert server.ask("GET", "/v2/models/m/shadow")[0] == 200
        assert server.ask("GET", "/v2/models/n/shadow")[0] == 404


def encoded(picture, kind="PNG"):
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def test_an_image_goes_through_the_bundle_s_preprocessing(digits):
    steps = read_report(digits).preprocessing
    pixels = np.load(EVAL)["images"][:4]
    want = alone(digits / "model.onnx", {"input": steps.apply(pixels)})["output"]
    with Server(digits, f"plain={digits / 'model.onnx'}") as server:
        for place, picture in enumerate(pixels):
            status, _, text = server.ask("POST", "/v2/models/digits/image", encoded(Image.fromarray(picture[..., 0])))
            assert status == 200, text
            np.testing.assert_allclose(json.loads(text)["outputs"][0]["data"], want[place], rtol=0, atol=1e-5)
        grey = Image.fromarray(pixels[0, ..., 0])
        colour = server.ask("POST", "/v2/models/digits/versions/1/image", encoded(grey.convert("RGB")))
        np.testing.assert_allclose(json.loads(colour[2])["outputs"][0]["data"], want[0], rtol=0, atol=1e-5)
        for path, content, status, words in (
            ("digits/image", b"no picture", 400, "cannot be read as an image"),
            ("digits/image", encoded(grey)[:60], 400, "cannot be read as an image"),
            ("digits/image", encoded(Image.new("L", (9000, 9000))), 413, "pixels are more than"),
            ("digits/image", encoded(Image.new("L", (9, 9))), 400, "output|input"),
            ("plain/image", encoded(grey), 400, "plain has no preprocessing for pictures"),
            ("nobody/image", encoded(grey), 404, "no model"),
        ):
            came, _, text = server.ask("POST", f"/v2/models/{path}", content)
            assert came == status, text
            assert any(word in json.loads(text)["error"] for word in words.split("|")), text


@pytest.mark.parametrize(
    ("model", "picture", "words"),
    [
        ("vectors", (8, 8), r"vectors does not take pictures but x: float32 \(N, 12\); send it to /infer"),
        ("digits", (2, 6000), "an image of 6000 x 2 would become 672000 x 224; set resize to"),
    ],
)
def test_pictures_that_a_model_cannot_take(digits, tmp_path, model, picture, words):
    path = digits / "model.onnx" if model == "digits" else linear(tmp_path / "m.onnx")
    signature = Signature.of(make_session(path), model)
    data = encoded(Image.new("L", picture))
    with pytest.raises(Refusal, match=words) as refused:
        image_request(data, Preprocessing(resize=224), signature, model)
    assert refused.value.status == 400
