"""`bench --baseline` and `bench --compare`: on stored results, and once through the command line."""

import json

import numpy as np
import pytest
from bench_documents import accuracy, arm, cell, document
from nets import labelled, mlp_onnx

from rsi_deploy.benchmark.settings import BenchConfig
from rsi_deploy.cli import run
from rsi_deploy.cli.gating import requested_gates, show_comparison
from rsi_deploy.core.errors import GateError, ModelError, UsageError

BASE = document(cell(arm("m", 10.0)), accuracy={"m": accuracy(92.0)})


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.json").write_text(BASE.model_dump_json())
    return "base.json"


def gates(baseline="base.json", max_slowdown="5%", max_drop=None, models=("m",), data="d.npz"):
    asked = {"baseline": baseline, "max_slowdown": max_slowdown, "max_drop": max_drop, "data": data}
    return requested_gates(BenchConfig.of(asked), models=models)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_gate_says_every_check_and_fails_in_one_sentence(base, capsys, as_json):
    gates(max_drop=0.5).enforce(BASE, as_json=as_json)
    out, err = capsys.readouterr()
    assert (out == "") == as_json, "stdout is for the document"
    shown = err if as_json else out
    assert shown.count("holds") == 2
    slow = document(cell(arm("m", 12.0)), accuracy=BASE.accuracy)
    with pytest.raises(GateError, match="^gate failed: m, batch 1: 20.0 % slower"):
        gates(max_drop=0.5).enforce(slow, as_json=as_json)
    assert "failed" in "".join(capsys.readouterr())


def test_without_gates_there_is_nothing_to_check():
    assert gates(None, None) is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_slowdown": None}, "--baseline gates nothing by itself: add --max-slowdown 5%"),
        ({"baseline": None}, "needs something to compare with: --baseline result.json, or a second model"),
        ({"max_drop": 0.5, "data": None}, "add --data DATA"),
        ({"max_slowdown": "5"}, "takes a percentage such as 5%, but got '5'; write 5%"),
        ({"baseline": "absent.json"}, "no such file: absent.json"),
        ({"baseline": "bare.json", "max_drop": 0.5}, "bare.json holds no accuracy; measure it again with --data"),
    ],
)
def test_gates_that_cannot_be_checked_are_refused_before_measuring(base, tmp_path, asked, words):
    (tmp_path / "bare.json").write_text(document(cell(arm("m", 10.0))).model_dump_json())
    with pytest.raises(UsageError) as caught:
        gates(**asked)
    assert words in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "no json", '{"schema_version": 99}'])
def test_another_document_is_no_baseline(base, tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ModelError, match=r"other\.json is no bench result"):
        gates("other.json")


def test_results_side_by_side(base, tmp_path, capsys):
    (tmp_path / "board.json").write_text(document(cell(arm("m", 99.0)), cpu="Arm").model_dump_json())
    show_comparison(["base.json", "board.json"], as_json=False)
    out = capsys.readouterr().out
    assert "base: Some CPU" in out
    assert "99.000 [98.010, 99.990]" in out
    show_comparison(["base.json", "board.json"], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [device["cpu"] for device in found["devices"]] == ["Some CPU", "Arm"]
    for paths, words in (
        (["base.json"], "takes two results or more"),
        (["base.json", "base.json"], "the same result twice"),
        (["base.json", "m.onnx"], "but got the model m.onnx; measure it first"),
        (["base.json", "absent.json"], "no such file: absent.json"),
    ):
        with pytest.raises(UsageError, match=words):
            show_comparison(paths, as_json=False)


def test_a_run_is_held_against_a_stored_one(tmp_path, monkeypatch, capsys):
    """The stored times are made ten times longer or shorter: no noise of this machine reaches that."""
    monkeypatch.chdir(tmp_path)
    labelled("d.npz", mlp_onnx(tmp_path / "m.onnx"))
    argv = ["bench", "m.onnx", "--seconds", "0.5", "--data", "d.npz"]
    assert run([*argv, "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    for name, factor, drop in (("slow", 10, 0), ("fast", 0.1, 0), ("better", 10, 5)):
        changed = json.loads(json.dumps(stored))
        timed = changed["cells"][0]["arms"][0]
        timed["median_ms"] *= factor
        timed["median_interval_ms"] = [end * factor for end in timed["median_interval_ms"]]
        changed["accuracy"]["m.onnx"]["top1"] += drop
        (tmp_path / f"{name}.json").write_text(json.dumps(changed))
    gated = [*argv, "--max-slowdown", "50%", "--max-drop", "1", "--baseline"]
    assert run([*gated, "slow.json"]) == 0
    assert capsys.readouterr().out.count("holds") == 2
    assert run([*gated, "fast.json"]) == 4
    out, err = capsys.readouterr()
    assert "failed" in out
    assert err.startswith("rsi-deploy: gate failed: m.onnx, batch 1: ")
    assert err.count("\n") == 1
    assert run([*gated, "better.json", "--json"]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["accuracy"]["m.onnx"]["samples"] == 60, "stdout is the document alone"
    assert "top-1 85.00 %, 5.00 points below the baseline's 90.00 %, more than the 1 allowed" in err
    assert run(["bench", "--compare", "slow.json", "fast.json"]) == 0
    assert "slow: median ms" in capsys.readouterr().out


def test_bench_refuses_labels_before_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labelled("d.npz", mlp_onnx(tmp_path / "m.onnx"))
    data = dict(np.load("d.npz"))
    np.savez("range.npz", x=data["x"], labels=data["labels"] + 3)
    assert run(["bench", "m.onnx", "--seconds", "600", "--data", "range.npz"]) == 2
    assert "has 10 classes (0 to 9), but the labels range from 3 to 12" in capsys.readouterr().err
    np.savez("inputs.npz", x=data["x"])
    assert run(["bench", "m.onnx", "--seconds", "0.2", "--data", "inputs.npz", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == {}
