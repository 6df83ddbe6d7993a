"""`profile`: one entry a shape, known again, and no torch where an ONNX file is timed."""

import json

import pytest
from nets import mlp, mlp_onnx
from test_without_torch import run

import rsi_deploy
from rsi_deploy.cli import run as cli
from rsi_deploy.core.errors import UsageError
from rsi_deploy.costing.cost_table import read_cost_table

SIZES = (24, 64, 64, 64, 10)
FAST = {"budget": 2, "threads": 1}


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RSI_DEPLOY_CACHE", str(tmp_path / "cache"))


def test_one_entry_a_shape(tmp_path, fresh_cache):
    model = mlp_onnx(tmp_path / "m.onnx", sizes=SIZES)
    table = rsi_deploy.profile(str(model), tmp_path / "cost.json", batch=2, **FAST)
    assert set(table.sites) == {"fc1", "fc2", "fc3", "head"}
    assert table.sites["fc2"] == table.sites["fc3"] != table.sites["fc1"]
    assert len(table.costs) == 3
    assert table.model.batch == 2
    assert table.model.inputs == {"input": "float32 (2, 24)"}
    assert table.model.dense_nanoseconds > 1000
    assert read_cost_table(tmp_path / "cost.json") == table


def test_a_second_table_is_the_first_and_fresh_is_another(tmp_path, fresh_cache):
    model = mlp_onnx(tmp_path / "m.onnx", sizes=SIZES)
    first = rsi_deploy.profile(str(model), **FAST)
    assert rsi_deploy.profile(str(model), **FAST) == first
    assert rsi_deploy.profile(str(model), fresh=True, **FAST) != first
    other = mlp_onnx(tmp_path / "other.onnx", sizes=(24, 64, 64, 10))  # another model of the same shapes
    shared = {c.signature: c for c in rsi_deploy.profile(str(model), **FAST).costs}
    assert [c for c in rsi_deploy.profile(str(other), **FAST).costs if shared.get(c.signature) == c]


def test_a_torch_model_and_its_onnx_file_have_the_same_shapes(tmp_path, fresh_cache):
    net = mlp()
    rsi_deploy.export(net, tmp_path / "b", rank=4, measure=False, keep_dense=True)
    here = rsi_deploy.profile(net, **FAST)
    there = rsi_deploy.profile(str(tmp_path / "b" / "dense.onnx"), **FAST)
    assert here.sites == there.sites


@pytest.mark.parametrize("scheme", ["float32", "static-int8"])
def test_no_torch_is_needed_for_an_onnx_file(tmp_path, scheme):
    model = mlp_onnx(tmp_path / "m.onnx", sizes=SIZES)
    argv = ("profile", model, "-o", tmp_path / "cost.json", "--budget", "1s", "--threads", "1", "--json")
    done = run(*argv, "--scheme", scheme)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sites"].keys() == {"fc1", "fc2", "fc3", "head"}


def test_the_verb_prints_shapes_and_the_whole_model(tmp_path, fresh_cache, capsys):
    model = mlp_onnx(tmp_path / "m.onnx", sizes=SIZES)
    assert cli(["profile", str(model), "-o", str(tmp_path / "c.json"), "--budget", "1s", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Gemm 1x64x64 float32" in shown
    assert "the whole dense model:" in shown


def test_what_cannot_be_meant_is_refused(tmp_path, capsys):
    model = mlp_onnx(tmp_path / "m.onnx")
    (tmp_path / "c.json").write_text("mine")
    for argv, words in [
        (["profile", str(model), "-o", str(tmp_path / "c.json")], "add --force to replace it"),
        (["profile", str(tmp_path / "no.onnx"), "-o", str(tmp_path / "d.json")], "no such file"),
        (["profile", str(model), "-o", str(tmp_path / "d.json"), "--budget", "soon"], "takes a time such as"),
        (["profile", str(model), "-o", str(tmp_path / "d.json"), "--provider", "openvino"], "openvino"),
        (["profile", str(model), "-o", str(tmp_path)], "is a folder"),
        (["profile", str(model), "-o", str(tmp_path / "no" / "c.json")], "no/c.json does not exist: make it first"),
    ]:
        assert cli(argv) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "c.json").read_text() == "mine"
    with pytest.raises(UsageError, match="int7.*static-int8"):
        rsi_deploy.profile(str(model), scheme="int7")
    with pytest.raises(UsageError, match="go with PyTorch models"):
        rsi_deploy.profile(str(model), checkpoint="x")
