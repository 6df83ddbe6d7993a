"""Packages for the Python backend in a real tritonserver, with an unmodified tritonclient. Run by `make triton`."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
from engines import asked, environment, tritonserver
from models import bundle_of, mixing, scalars, tokens, words
from nets import mlp_onnx

from bench import models as bench_models
from bench.models import UnavailableError
from rsi_deploy import export, package

pytestmark = pytest.mark.triton

ROUNDING = 1e-5  # relative L2; the same onnxruntime on both sides, maybe with other threads
SAMPLES = "samples.digits"


def outputs(model, feeds):
    """Return the outputs of onnxruntime alone."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return dict(zip((output.name for output in session.get_outputs()), session.run(None, feeds), strict=True))


def distance(a, b):
    return max(relative_distance(a[name], b[name]) for name in b)


def relative_distance(a, b):
    if b.dtype.kind == "O":
        return 0.0 if a.tolist() == b.tolist() else np.inf
    return float(np.linalg.norm(np.float64(a) - b) / max(np.linalg.norm(np.float64(b)), 1e-12))


def kinds(arrays):
    return {name: "text" if array.dtype.kind in "OU" else array.dtype for name, array in arrays.items()}


def digits(net, count=5):
    with np.load("samples/digits_eval.npz") as data:
        images = data["images"][:count]
    return {"input": ((images / 255 - 0.305) / 0.376).astype(np.float32).reshape(count, 1, 8, 8)}


def pictures(count=4):
    return {"input": np.random.default_rng(1).standard_normal((count, 3, 32, 32)).astype(np.float32)}


def texts():
    ids, mask = bench_models.tokenize(["A cat sat on the mat.", "Two dogs ran.", "Nobody was there."], 16)
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}


def made(name, root):
    """Return the bundle `name`, and inputs."""
    if name in ("cnn", "vit"):
        source, checkpoint = f"{SAMPLES}:{name}", f"samples/digits_{name}.safetensors"
        export(source, root / name, checkpoint=checkpoint, rank="25%", measure=False, keep_dense=True)
        return root / name, digits(name)
    if name == "resnet56":
        export(bench_models.trained(name), root / name, rank="25%", measure=False, keep_dense=True)
        return root / name, pictures()
    if name == "minilm":
        export(bench_models.minilm(16), root / name, rank="25%", measure=False, keep_dense=True)
        return root / name, texts()
    rng = np.random.default_rng(2)
    if name == "tokens":
        bundle_of(tokens(root / "t.onnx"), root / name, input_shape=["ids=2x7"], keep_dense=True)
        return root / name, {"ids": rng.integers(0, 50, (4, 9)), "mask": rng.integers(0, 2, (4, 9))}
    if name == "fixed":
        bundle_of(mlp_onnx(root / "f.onnx", batch=2), root / name, keep_dense=True)
        return root / name, {"input": rng.standard_normal((2, 12)).astype(np.float32)}
    if name == "scalars":
        bundle_of(scalars(root / "s.onnx"), root / name, keep_dense=True)
        x = rng.standard_normal((2, 32)).astype(np.float32)
        return root / name, {"x": x, "k": np.array(2.5, np.float32), "flag": np.array(True)}
    if name == "words":
        feeds = {"x": rng.standard_normal((2, 32)).astype(np.float32), "s": np.array(["a", "größer"])}
        bundle_of(words(root / "w.onnx"), root / name, keep_dense=True, feeds=feeds)
        return root / name, feeds
    bundle_of(mixing(root / "m.onnx"), root / name, keep_dense=True)
    return root / name, {"x": rng.standard_normal((4, 32)).astype(np.float32)}


NAMES = ["cnn", "vit", "resnet56", "minilm", "tokens", "fixed", "mixing", "scalars", "words"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of the packages of all models, each with its dense model as version 1."""
    environment("triton")
    root, repository, cases = tmp_path_factory.mktemp("triton"), tmp_path_factory.mktemp("repository"), {}
    for name in NAMES:
        try:
            bundle, feeds = made(name, root)
        except UnavailableError as error:
            cases[name] = str(error)
            continue
        package(
            bundle,
            root / f"{name}-package",
            target="triton",
            backend="python",
            dense=bundle / "dense.onnx",
            feeds=feeds if name == "words" else None,
            max_delay_ms=300.0,
            threads=1,
        )
        shutil.copytree(root / f"{name}-package" / "models" / name, repository / name)
        cases[name] = (bundle, feeds)
    with tritonserver(repository, tmp_path_factory.mktemp("server")) as address:
        yield address, cases


def case(served, name):
    address, cases = served
    if isinstance(cases[name], str):
        pytest.skip(cases[name])
    return address, *cases[name]


@pytest.mark.parametrize("way", ["json", "binary"])
@pytest.mark.parametrize("name", NAMES)
def test_it_answers_as_onnxruntime_alone(served, tmp_path, name, way):
    address, bundle, feeds = case(served, name)
    np.savez(tmp_path / "feeds.npz", **feeds)
    alone = {"1": outputs(bundle / "dense.onnx", feeds), "2": outputs(bundle / "model.onnx", feeds)}
    for version, expected in alone.items():
        asked(
            environment("triton"), "ask_triton.py", address, name, version, way, tmp_path / "feeds.npz",
            tmp_path / "answers.npz",
        )  # fmt: skip
        with np.load(tmp_path / "answers.npz") as file:
            answers = dict(file)
        assert answers.keys() == expected.keys()
        if name == "tokens":
            answers["score"] = answers["score"].reshape(-1)  # Triton has no scalars: (batch, 1)
        if name == "scalars":
            assert answers["not"].shape == (1,)
            answers["not"] = answers["not"].reshape(())
        assert distance(answers, expected) < ROUNDING
        assert kinds(answers) == kinds(expected)
    assert distance(alone["1"], alone["2"]) > 100 * ROUNDING  # so that the wrong version would be noticed


def many(served, name, feeds, tmp_path):
    address, bundle, _ = case(served, name)
    np.savez(tmp_path / "feeds.npz", **feeds)
    result = json.loads(asked(environment("triton"), "ask_many.py", address, name, tmp_path / "feeds.npz"))
    first = next(iter(outputs(bundle / "model.onnx", feeds).values())) if name != "tokens" else None
    return result, first


def test_requests_share_runs(served, tmp_path):
    feeds = digits("cnn", 16)
    result, expected = many(served, "cnn", feeds, tmp_path)
    assert result["runs"] < result["requests"] == 16
    assert distance({"y": np.array(result["answers"])[:, 0]}, {"y": expected}) < ROUNDING


def test_dependent_samples_do_not_share_a_run(served, tmp_path):
    feeds = {"x": np.random.default_rng(3).standard_normal((6, 32)).astype(np.float32)}
    result, _ = many(served, "mixing", feeds, tmp_path)
    assert result["runs"] == 6
    assert np.abs(np.array(result["answers"])).max() < 1e-5  # each sample minus its own mean


def test_a_bad_request_does_not_fail_others(served, tmp_path):
    rng = np.random.default_rng(4)
    feeds = {"ids": rng.integers(0, 50, (6, 9)), "mask": np.ones((6, 9), np.int64)}
    feeds["ids"][2, 3] = 50  # an invalid index
    result, _ = many(served, "tokens", feeds, tmp_path)
    assert "out of data bounds" in result["answers"][2] or "indices" in result["answers"][2]
    good = [0, 1, 3, 4, 5]
    _, bundle, _ = case(served, "tokens")
    expected = outputs(bundle / "model.onnx", {name: array[good] for name, array in feeds.items()})["vector"]
    answers = np.array([result["answers"][at][0] for at in good])
    assert distance({"y": answers}, {"y": expected}) < ROUNDING
