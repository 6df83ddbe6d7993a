import re

import numpy as np
import onnx
import onnxruntime
import pytest
from models import bundle_of, mlp_bundle, tokens

from rsi_deploy import GateError, ModelError, package, verify
from rsi_deploy.cli import run
from rsi_deploy.io import onnx_file
from rsi_deploy.packaging import ort_format

FILES = ("README.md", "manifest.json", "model.ort", "required_operators.config", "required_operators_and_types.config")


def operators(config):
    """Return (domain, opset, operator) of every line of a required-operators file."""
    found = set()
    for line in config.read_text().splitlines():
        if line and not line.startswith("#"):
            domain, opset, names = line.split(";")
            names = re.sub(r"{.*?}}", "", names)
            found |= {(domain, int(opset), name) for name in names.split(",")}
    return found


def optimized_operators(model, folder):
    """Return the operators of the graph that onnxruntime runs, from its own dump and not from its converter."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )
    return {(node.domain or "ai.onnx", node.op_type) for node in onnx.load(folder / "optimized.onnx").graph.node}


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return mlp_bundle(tmp_path_factory.mktemp("mlp"))


@pytest.mark.parametrize("platform", ["arm", "amd64"])
def test_its_outputs_are_those_of_the_bundle(mlp, tmp_path, platform):
    result = package(mlp, tmp_path / "p", target="ort", platform=platform)
    assert (result.files, result.name, result.batched) == (FILES, "mlp", None)
    x = np.random.default_rng(3).standard_normal((5, 12)).astype(np.float32)
    ours, theirs = (
        onnxruntime.InferenceSession(path).run(None, {"input": x})[0]
        for path in (tmp_path / "p" / "model.ort", mlp / "model.onnx")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert verify(tmp_path / "p").ok


@pytest.mark.parametrize("kind", ["mlp", "tokens"])
def test_the_config_names_every_operator_that_runs(mlp, tmp_path, kind):
    made = mlp
    if kind == "tokens":
        made = bundle_of(tokens(tmp_path / "t.onnx"), tmp_path / "t", input_shape=["ids=2x7"])
    package(made, tmp_path / "p", target="ort")
    named = operators(tmp_path / "p" / "required_operators.config")
    assert {(domain, name) for domain, _, name in named} == optimized_operators(made / "model.onnx", tmp_path)
    assert named == operators(tmp_path / "p" / "required_operators_and_types.config")


def test_no_path_of_this_machine_is_left(mlp, tmp_path):
    package(mlp, tmp_path / "p", target="ort")
    for path in (tmp_path / "p").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_the_same_bundle_gives_the_same_files(mlp, tmp_path):
    for name in "ab":
        package(mlp, tmp_path / name, target="ort")
    for file in set(FILES) - {"model.ort", "manifest.json"}:  # the order of tables in model.ort varies
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_external_weights_are_included(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 1000)
    made = mlp_bundle(tmp_path, rank=8, sizes=(12, 64, 64, 10))
    assert (made / "model.onnx.data").stat().st_size > 1000
    result = package(made, tmp_path / "p", target="ort")
    assert result.files == FILES


def test_a_model_with_other_outputs_is_not_delivered(mlp, tmp_path, monkeypatch, capsys):
    """The check refuses the ORT format of another model."""
    other = package(mlp_bundle(tmp_path, "other", seed=5, rank=2), tmp_path / "o", target="ort")
    real = ort_format._converted

    def swapped(folder, model, platform):
        path = real(folder, model, platform)
        path.write_bytes((tmp_path / "o" / "model.ort").read_bytes())
        return path

    monkeypatch.setattr(ort_format, "_converted", swapped)
    assert other.files == FILES
    with pytest.raises(GateError, match="ORT-format gate"):
        package(mlp, tmp_path / "p", target="ort")
    assert run(["package", str(mlp), "--target", "ort", "-o", str(tmp_path / "p")]) == 4
    assert not (tmp_path / "p").exists()
    assert "ORT-format gate" in capsys.readouterr().err


def test_a_failed_conversion_is_an_error(mlp, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no such format")

    monkeypatch.setattr("onnxruntime.tools.convert_onnx_models_to_ort.convert_onnx_models_to_ort", fails)
    with pytest.raises(ModelError, match="cannot write it in ORT format: no such format"):
        package(mlp, tmp_path / "p", target="ort")
    assert [p for p in tmp_path.iterdir() if p.name != "cache"] == []
