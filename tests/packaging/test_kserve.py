import json

import pytest
from engines import asked, environment
from models import mlp_bundle

from rsi_deploy import package
from rsi_deploy.packaging.yaml_text import yaml_text


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return mlp_bundle(tmp_path_factory.mktemp("mlp"))


def service(python, path):
    return json.loads(asked(python, "check_kserve.py", path))


def lost(given, back):
    """Return the paths of values of `given` that `back` lacks or changes."""
    if not isinstance(given, dict):
        return [] if given == back else [given]
    return [f"{key}.{path}" for key, value in given.items() for path in lost(value, (back or {}).get(key))]


@pytest.mark.kserve
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_kserve_s_own_models_know_every_field(mlp, tmp_path, device):
    python = environment("kserve")
    package(
        mlp, tmp_path / "p", target="kserve", storage_uri="pvc://store/models", replicas="0-3", cpus=4, device=device
    )
    found = service(python, tmp_path / "p" / "inferenceservice.yaml")
    assert lost(found["given"], found["back"]) == []
    predictor = found["back"]["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (0, 3)
    assert predictor["model"]["storageUri"] == "pvc://store/models"
    assert predictor["model"]["resources"]["limits"]["cpu"] == "4"
    assert predictor["model"]["resources"]["limits"].get("nvidia.com/gpu") == ("1" if device == "gpu" else None)


def misspelt(mlp, tmp_path, right, wrong):
    package(mlp, tmp_path / "p", target="kserve", storage_uri="s3://bucket/models")
    path = tmp_path / "p" / "inferenceservice.yaml"
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))
    return path


@pytest.mark.kserve
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("storageUri:", "storageURI:"), ("minReplicas: 1", "minReplicas: 1\n    surplus: 2")],
)
def test_an_unknown_field_is_noticed(mlp, tmp_path, right, wrong):
    python = environment("kserve")
    found = service(python, misspelt(mlp, tmp_path, right, wrong))
    assert lost(found["given"], found["back"]) != []


@pytest.mark.kserve
def test_a_missing_field_is_noticed(mlp, tmp_path):
    python = environment("kserve")
    with pytest.raises(AssertionError, match="must not be `None`"):
        service(python, misspelt(mlp, tmp_path, "modelFormat:", "format:"))


def test_its_storage_is_a_model_repository(mlp, tmp_path):
    package(mlp, tmp_path / "p", target="kserve", storage_uri="s3://bucket/models", name="digits-25")
    names = {path.relative_to(tmp_path / "p").as_posix() for path in (tmp_path / "p").rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "inferenceservice.yaml",
        "manifest.json",
        "models/digits-25/1/model.onnx",
        "models/digits-25/config.pbtxt",
    }
    readme = (tmp_path / "p" / "README.md").read_text()
    assert "s3://bucket/models" in readme
    assert "inferenceservice/digits-25" in readme


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"b": {"c": 1}}, "d": "x: y # z"},
        {"a": [{"b": {"c": [1, 2]}, "d": 2}, {"e": 'quo"te\n'}], "f": {}},
        {"a": "no", "b": "1", "c": True, "d": None, "e": "2Gi", "nvidia.com/gpu": "1"},
    ],
)
def test_the_text_is_yaml(value):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(yaml_text(value)) == value
