"""bench --rivals: onnxruntime's own quantizations stand beside the models; one that fails is named."""

import json

import numpy as np
import pytest
from nets import labelled, mlp_onnx

from rsi_deploy.cli import run
from rsi_deploy.core.errors import ModelError
from rsi_deploy.precision import rivals as making

STATIC, DYNAMIC, INT4 = "onnxruntime's static int8 (minmax)", "onnxruntime's dynamic int8", "onnxruntime's int4 weights"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlp_onnx(tmp_path / "m.onnx")
    labelled(tmp_path / "d.npz", tmp_path / "m.onnx")
    with np.load("d.npz") as data:
        np.savez("calib.npz", **{name: data[name] for name in data.files[:1]})
    return tmp_path


def document(capsys, *more):
    assert run(["bench", "m.onnx", "--seconds", "0.1", "--json", "--rivals", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_rivals_are_further_variants_of_the_same_run(here, capsys):
    found = document(capsys, "--calib", "calib.npz", "--data", "d.npz")
    labels = [arm["label"] for arm in found["cells"][0]["arms"]]
    assert labels[:3] == ["m.onnx", STATIC, DYNAMIC]
    assert labels[3].startswith(INT4)
    assert found["accuracy"].keys() == set(labels)
    assert all(arm["speedup"] > 0 for arm in found["cells"][0]["arms"][1:])
    sizes = {arm["label"]: arm["file_bytes"] for arm in found["arms"]}
    assert sizes[DYNAMIC] != sizes["m.onnx"] != sizes[STATIC]
    assert "/" not in "".join(arm["model"] for arm in [*found["arms"], *found["cells"][0]["arms"]])


def test_a_rival_that_cannot_be_made_is_named_with_its_error(here, capsys, monkeypatch):
    made = making.quantize

    def failing(source, target, scheme, feeds=None):
        if scheme.kind == "dynamic int8":
            raise ModelError("no kernel for it")
        made(source, target, scheme, feeds)

    monkeypatch.setattr(making, "quantize", failing)
    found = document(capsys)
    assert [arm["label"][: len(INT4)] for arm in found["arms"]] == ["m.onnx", INT4]
    static, dynamic = found["notes"]
    assert STATIC in static
    assert "--calib" in static
    assert DYNAMIC in dynamic
    assert "no kernel for it" in dynamic


def test_a_rival_that_onnxruntime_cannot_load_is_named(here, monkeypatch):
    monkeypatch.setattr(making, "quantize", lambda source, target, *_: target.write_bytes(b"no model"))
    (rival,) = making.make_rivals(here / "m.onnx", here, [making.DYNAMIC], None)
    assert rival.path is None
    assert rival.error


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--calib", "calib.npz"], "--rivals"),
        (["--rivals", "m.onnx", "--max-slowdown", "5%"], "--rivals"),
        (["--rivals", "--calib", "nothing.npz"], "nothing.npz"),
    ],
)
def test_what_does_not_go_together_is_refused(here, capsys, argv, names):
    assert run(["bench", "m.onnx", "--seconds", "0.1", *argv]) == 2
    assert names in capsys.readouterr().err
