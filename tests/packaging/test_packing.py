import json
import re

import pytest
from models import mlp_bundle

from rsi_deploy import UsageError, package
from rsi_deploy.cli import cli, run
from rsi_deploy.io.manifest import check_manifest, write_manifest
from rsi_deploy.packaging.packing import DEFAULTS, USES, flag
from rsi_deploy.packaging.settings import PackageConfig

KSERVE = {"storage_uri": "s3://bucket/models"}


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return mlp_bundle(tmp_path_factory.mktemp("mlp"))


def given(target):
    return KSERVE if target == "kserve" else {}


@pytest.mark.parametrize("target", sorted(USES))
def test_every_package_has_a_readme_and_a_manifest_that_holds(mlp, tmp_path, target):
    result = package(mlp, tmp_path / "p", target=target, **given(target))
    check = check_manifest(tmp_path / "p")
    assert (check.present, check.ok) == (True, True)
    assert {"README.md", "manifest.json"} < set(result.files)
    assert set(result.files) == {
        p.relative_to(tmp_path / "p").as_posix() for p in (tmp_path / "p").rglob("*.*") if p.is_file()
    }
    assert run(["verify", str(tmp_path / "p")]) == 0
    next((tmp_path / "p").rglob("README.md")).write_text("changed")
    assert run(["verify", str(tmp_path / "p")]) == 4


@pytest.mark.parametrize("target", sorted(USES))
def test_nothing_is_overwritten_without_force_and_nothing_partial_is_left(mlp, tmp_path, target, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine").write_text("mine")
    words = ["package", str(mlp), "--target", target, "-o", str(tmp_path / "p")]
    words += ["--storage-uri", KSERVE["storage_uri"]] * (target == "kserve")
    for force in ([], ["--force"]):
        assert run([*words, *force]) == 2
        assert f"delete {tmp_path / 'p'} yourself" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "p").iterdir()] == ["mine"]
    write_manifest(tmp_path / "p")  # a package of another time
    assert run(words) == 2
    assert "add --force" in capsys.readouterr().err
    assert run([*words, "--force"]) == 0
    assert not (tmp_path / "p" / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_an_option_of_another_target_is_refused(mlp, tmp_path):
    other = {"threads": 2, "dense": "d.onnx", "storage_uri": "s3://b", "replicas": "2", "cpus": 3, "memory": "4Gi"}
    other |= {"platform": "amd64", "backend": "python", "dense_as": "name", "max_batch": 4, "max_delay_ms": 2.0}
    other |= {"instances": 2, "device": "gpu", "tensorrt": "fp16"}
    assert other.keys() == DEFAULTS.keys(), "a new option: add a value other than its default here"
    for target in USES:
        for key in other.keys() - USES[target]:
            with pytest.raises(UsageError, match=f"{flag(key)} has no effect with --target {target}; it belongs to"):
                package(mlp, tmp_path / "p", target=target, **{key: other[key]})
    assert not (tmp_path / "p").exists()


def test_the_command_line_has_every_option_with_the_function_s_default():
    verb = cli.commands["package"]
    options = {parameter.name: parameter for parameter in verb.params}
    assert all(options[key].opts == [flag(key)] for key in DEFAULTS)
    assert {key: PackageConfig.model_fields[key].default for key in DEFAULTS} == DEFAULTS
    assert set(options["target"].type.choices) == USES.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "triton", "max_batch": 0}, "--max-batch must be 1 or more"),
        ({"target": "triton", "instances": 0}, "--instances must be 1 or more"),
        ({"target": "triton", "threads": 0}, "--threads must be 1 or more"),
        ({"target": "triton", "max_delay_ms": -1.0}, "--max-delay must be 0 or more"),
        ({"target": "triton", "backend": "torch"}, "--backend must be onnxruntime, python, but got 'torch'"),
        ({"target": "triton", "tensorrt": "fp16"}, "--tensorrt needs --device gpu"),
        ({"target": "triton", "tensorrt": "fp16", "device": "gpu", "backend": "python"}, "--backend onnxruntime"),
        ({"target": "triton", "name": "../x"}, "a model's name has letters"),
        ({"target": "kserve"}, "needs --storage-uri"),
        ({"target": "kserve", "storage_uri": "/local"}, "but got '/local'"),
        ({"target": "ray-serve", "storage_uri": "/local"}, "but got '/local'"),
        ({"target": "ray-serve", "replicas": "many"}, "--replicas must be"),
        ({"target": "kserve", **KSERVE, "name": "Big_Name"}, "Kubernetes needs a name"),
        ({"target": "kserve", **KSERVE, "replicas": "4-1"}, "--replicas must be the fewest and the most"),
        ({"target": "kserve", **KSERVE, "replicas": "0"}, "--replicas must be"),
        ({"target": "kserve", **KSERVE, "memory": "much"}, "--memory must be a number and Mi or Gi"),
        ({"target": "kserve", **KSERVE, "cpus": 0}, "--cpus must be 1 or more"),
        ({"target": "bento"}, "--target must be ort, triton, kserve, ray-serve"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value))[:40],
)
def test_invalid_options_are_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        package(tmp_path / "no-such-bundle", tmp_path / "p", **options)
    assert list(tmp_path.iterdir()) == []


def test_json(mlp, tmp_path, capsys):
    assert run(["package", str(mlp), "--target", "triton", "-o", str(tmp_path / "p"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["target"], result["name"], result["batched"]) == ("triton", "mlp", True)
    assert result["notes"] == []


def test_no_bundle(tmp_path, capsys):
    assert run(["package", str(tmp_path), "--target", "ort", "-o", str(tmp_path / "p")]) == 2
    assert "no bundle" in capsys.readouterr().err
