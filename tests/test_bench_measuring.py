"""bench/: the suites about measuring itself notice what they must not let pass, and skip with a reason."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from bench import loadgen_check, overhead, small, speedup
from bench.common import judge
from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime.sessions import make_session


def overheads(recorded: float, whole: float):
    rng = np.random.default_rng(0)
    bare = 4 + rng.random(50)
    times = {"bare": bare, "recorded": bare + recorded, "whole": bare + whole}
    return [overhead.row(arm, times) for arm in overhead.ARMS]


def test_overhead_is_taken_within_each_round_and_a_large_one_is_missed():
    rows = overheads(0.5, 1.0)
    assert [round(r["added_us"], 6) for r in rows] == [0, 0.5, 1.0]
    assert all(goal.held for goal in overhead.goals(rows))
    missed = overhead.goals(overheads(0.5, 3.5))
    assert [goal.held for goal in missed] == [True, False]
    assert judge(missed, check=True) == 4


def test_overhead_measures_every_arm_in_every_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(overhead, "CALLS", 3)
    times = overhead.measure(2)
    assert {arm: len(values) for arm, values in times.items()} == {"bare": 2, "recorded": 2, "whole": 2}
    assert all((values > 0).all() for values in times.values())


def loadgen_rows(*p90s):
    keys = ("loadgen_p90_ms", "same_calls_p90_ms", "own_loop_p90_ms")
    return [dict(zip(keys, values, strict=True)) for values in p90s]


def test_the_worst_round_decides_whether_two_clocks_agree():
    near = loadgen_check.summary(loadgen_rows((1.02, 1.0, 1.0), (1.01, 1.0, 1.0)))
    assert near == {"same_calls": pytest.approx(0.02), "own_loop": pytest.approx(0.015)}
    assert all(goal.held for goal in loadgen_check.goals(near))
    for far in ((1.06, 1.0, 1.0), (0.94, 1.0, 1.0)):
        missed = loadgen_check.goals(loadgen_check.summary(loadgen_rows((1.0, 1.0, 1.0), far)))
        assert not missed[0].held


def test_small_models_are_what_they_say(tmp_path):
    x = np.array([[1, -1, 2, -2]], np.float32)
    np.testing.assert_array_equal(
        make_session(small.trivial(tmp_path / "t.onnx")).run(None, {"x": x})[0], [[1, 0, 2, 0]]
    )
    session = make_session(small.perceptron(tmp_path / "p.onnx", width=8, layers=3))
    assert session.run(None, {"x": np.ones((2, 8), np.float32)})[0].shape == (2, 8)


class Size:
    def __init__(self, params, macs):
        self.params, self.macs = params, macs


class Report:
    dense, compressed = Size(100, 1000), Size(30, 250)


RESULT = {
    "onnxruntime": "1.0",
    "arms": [
        {"median_ms": 10.0},
        {
            "median_ms": 12.5,
            "speedup": 0.8,
            "speedup_interval": (0.79, 0.81),
            "verdict": "1.25x slower [1.23, 1.27]",
            "blocks": 30,
            "provider_nodes": {"P": 3},
            "memcpy_nodes": 0,
        },
    ],
}


def test_slowdowns_and_refusals_are_rows_too():
    slow = speedup.row("vgg19", "cpu", 8, Report, RESULT)
    refused = speedup.row("vgg19", "cpu", 8, Report, {"error": "it does not load"})
    document = {"command": "python -m bench.speedup", "machine": {"cpu": "C", "cores": 2, "load_average": (9.1, 5, 1)}}
    text = speedup.markdown([slow, refused], {"cuda": "no GPU"}, document)
    for part in (
        "1.25x slower",
        "| 30.0% | 25.0% | 10.00 | 12.50 |",
        "it does not load",
        "minutes: 9.1, 5.0",
        "Skipped: cuda",
    ):
        assert part in text
    assert text.startswith("`python -m bench.speedup`")
    assert [goal.held for goal in speedup.goals([slow])] == [False]
    assert [goal.held for goal in speedup.goals([refused])] == [False]
    assert [goal.held for goal in speedup.goals([{**slow, "speedup": 2.6}])] == [True]
    assert speedup.goals([{**slow, "provider": "openvino"}]) == []


def test_providers_that_are_not_here_are_skipped_with_the_reason(monkeypatch, tmp_path):
    def resolve(name):
        if name != "cpu":
            raise UsageError(f"{name} is not offered")
        return "CPUExecutionProvider"

    monkeypatch.setattr(speedup, "resolve_provider", resolve)
    monkeypatch.setattr(speedup, "OPENVINO", tmp_path / "python")
    pythons, skipped = speedup.environments(speedup.PROVIDERS)
    assert pythons == {"cpu": sys.executable}
    assert skipped == {
        "openvino": "no environment with onnxruntime-openvino: run make openvino",
        "cuda": "cuda is not offered",
    }
    (tmp_path / "python").touch()
    assert speedup.environments(["openvino"]) == ({"openvino": str(tmp_path / "python")}, {})


def test_what_does_not_load_is_exported_again_at_an_older_opset(monkeypatch):
    exports = []

    def exported(name, bundle, dense=None, opset=None):
        bundle.mkdir()
        exports.append(opset)
        return Report

    def measured(python, bundle, *_):
        return RESULT if bundle.name == "older" or python == "modern" else {"error": "cannot load it on P"}

    monkeypatch.setattr(speedup, "exported", exported)
    monkeypatch.setattr(speedup, "measured", measured)
    rows = speedup.model_rows("net", {"cpu": "modern", "openvino": "old"}, 1.0)
    assert [(r["provider"], r["batch"], r["opset"]) for r in rows] == [
        ("cpu", 1, "as exported"),
        ("cpu", 8, "as exported"),
        ("openvino", 1, 20),
        ("openvino", 8, 20),
    ]
    assert exports == [None, 20]


def test_a_row_is_measured_in_a_process_of_its_own(tmp_path):
    bundle = tmp_path / "net"
    bundle.mkdir()
    for name, layers in (("dense.onnx", 4), ("model.onnx", 2)):
        small.perceptron(bundle / name, width=16, layers=layers)
    found = speedup.measured(sys.executable, bundle, "cpu:threads=1", 2, 0.1)
    assert [arm["label"] for arm in found["arms"]] == ["dense", "compressed"]
    assert found["inputs"] == {"x": "float32 (2, 16)"}
    refused = speedup.measured(sys.executable, bundle, "cpu:thread=1", 2, 0.1)
    assert "'thread' does not exist" in refused["error"]
    assert str(tmp_path) not in refused["error"]


def test_a_process_that_dies_is_told(monkeypatch, tmp_path):
    died = subprocess.CompletedProcess([], -11, "", "Segmentation fault")
    monkeypatch.setattr(speedup.subprocess, "run", lambda *_, **__: died)
    assert speedup.measured("python", tmp_path, "cpu", 1, 1.0) == {
        "error": "the process ended with -11: Segmentation fault"
    }


def local_paths(text):
    """Absolute paths in a text, and hidden folders of a run: they would say where one machine kept its files."""
    return re.findall(r"(?<![\w.~/<:])/(?!s\b)[A-Za-z][\w.-]*/[\w./-]+|\.bench-\w+", text)


def test_stored_results_name_their_command_and_no_machine():
    files = sorted((speedup.Path(__file__).parents[1] / "bench" / "results").rglob("*.json"))
    assert len(files) > 20
    for file in files:
        document = json.loads(file.read_text(encoding="utf-8"))
        assert document["command"].startswith(f"python -m bench.{file.parent.name} "), file
        assert not local_paths(document["command"]), file.name
    assert local_paths("python -m bench.speedup --json /home/me/speed.json") == ["/home/me/speed.json"]
    assert local_paths("read ms/call from bench/results/a.json") == []
