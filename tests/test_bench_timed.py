"""The benches of time: what they count, and the plans they make without calibration."""

from types import SimpleNamespace

import onnx_ir as ir
import pytest

from bench import latency_plans, never_slower, timed, untrained
from bench.never_slower import naive_splits, summary
from graph_passes import count_parameters
from graph_passes.split_markers import found_splits
from rsi_deploy.costing.zero_filled import write_zero_filled
from rsi_deploy.io.onnx_file import read_onnx
from rsi_deploy.runtime.shape_trace import trace_run


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timed")
    dense = untrained.written("cnn_cifar10", folder)
    return timed.setting("cnn_cifar10", dense, 2, 1, 3.0)


def test_options_cost_what_the_written_model_costs(here, tmp_path):
    for form in ("channel", "input", "separable"):
        (site,) = [s for s in here.options() if s.name == "conv2"]
        option = next(o for o in site.options if o.form == form and o.rank == 4)
        write_zero_filled(here.dense, tmp_path / "m.onnx", {"conv2": (form, 4)})
        saved = here.params - count_parameters(read_onnx(tmp_path / "m.onnx"))
        assert saved == site.options[0].params - option.params
        macs = sum(trace_run(tmp_path / "m.onnx", here.feeds).macs.values())
        assert here.total_macs - macs == site.options[0].macs - option.macs


def test_the_naive_split_keeps_its_budget_and_uses_it(here, tmp_path):
    write_zero_filled(here.dense, tmp_path / "m.onnx", naive_splits(here, 0.5))
    kept = count_parameters(read_onnx(tmp_path / "m.onnx")) / here.params
    assert 0.48 < kept <= 0.505  # biases of split sites that had none are not counted
    assert naive_splits(here, 0.001) == {}


def test_the_last_word_is_that_of_an_export(here, tmp_path, monkeypatch):
    splits = {"conv2": ("input", 2), "fc1": ("gemm", 4)}
    written = []  # forms in each model that was measured; what came of it is made up

    def measured(self, paths, labels, seconds):
        written.append(sorted(split.form for split in found_splits(ir.load(paths[0])).values()))
        arm = SimpleNamespace(speedup_interval=ends.pop(0), blocks=30, verdict="", label="delivered")
        return SimpleNamespace(arms=(None, arm), reached_precision=0.01)

    monkeypatch.setattr(timed.Setting, "measured", measured)
    ends = [(1.2, 1.3)]
    assert timed.after_rollback(here, splits, tmp_path / "m.onnx", 1.0) == splits
    assert written[0] == ["gemm", "input"]
    ends = [(0.7, 0.8)] * 6
    assert timed.after_rollback(here, splits, tmp_path / "m.onnx", 1.0) == {}
    assert written[-1] == []
    assert count_parameters(read_onnx(tmp_path / "m.onnx")) == here.params


def row(delivered, naive="slower", outcome="as planned"):
    found = [None if s is None else {"shown": s, "interval": (1, 1), "speedup": 1.0} for s in (delivered, naive)]
    what = {"net": "n", "batch": 1, "threads": 1, "keep_params": 0.5, "outcome": outcome}
    return {**what, "delivered": found[0], "naive": found[1]}


def test_a_slower_delivery_misses_the_goal_and_a_naive_one_does_not():
    fine = [row("faster"), row("nothing"), row(None, outcome="dense"), row(None, outcome="refused: no faster splits")]
    (goal,) = never_slower.goals(fine)
    assert goal.held
    assert summary(fine)["naive"]["slower"] == 4
    (goal,) = never_slower.goals([*fine, row("slower")])
    assert not goal.held
    assert "slower: n batch 1 threads 1 at 50%" in goal.row


def test_goals_of_plans_are_held_against_their_numbers():
    def held(**parts):
        return [goal.held for goal in latency_plans.goals(parts)]

    assert held(landing=[{"net": "a", "share": 0.6}, {"net": "b", "share": 0.5}, {"net": "c", "share": None}]) == [
        True,
        False,
    ]
    errors = [{"error": 0.05}] * 8 + [{"error": -0.2}] * 2
    assert held(prediction=errors) == [True]
    assert held(prediction=[*errors, {"error": 0.2}]) == [False]
    pair = [{"net": "a", "score": 90.0, "share": 0.6}, {"net": "a", "score": 89.0, "share": 0.61}]
    assert held(accuracy=pair) == [True]
    assert held(accuracy=pair[::-1]) == [False]
    assert held(accuracy=[pair[0], {**pair[1], "share": 0.7}]) == [False]  # not at equal time
    assert held(gemm=[{"net": "a", "of_ideal": 0.9}, {"net": "b", "of_ideal": 0.8}]) == [True, False]
    assert held(table=[{"seconds": 200, "reuse": 0.4}, {"seconds": 200, "reuse": 1.4}]) == [True, False]
