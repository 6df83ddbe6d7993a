"""A process that exports again and again holds no more for it; `bench.long_run` does two hundred."""

import gc

import numpy as np
import pytest
from nets import SIZES, cnn, labelled, mlp_onnx

import rsi_deploy
from bench import long_run
from bench.long_run import compared, goals, held

WARM_UP, EXPORTS = 4, 12


@pytest.fixture
def export(tmp_path):
    """One more export, plain and calibrated in turns."""
    model = mlp_onnx(tmp_path / "m.onnx")
    labelled(tmp_path / "d.npz", model)
    x = np.random.default_rng(3).standard_normal((64, SIZES[0])).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=x)

    def export(number):
        calibrated = {"calib": tmp_path / "c.npz"} if number % 2 else {}
        rsi_deploy.export(
            str(model), tmp_path / "b", rank=4, data=tmp_path / "d.npz", measure=False, force=True, **calibrated
        )

    return export


def test_a_dozen_exports_leave_no_thread_no_file_and_hardly_a_byte(export):
    marks = []
    for number in range(EXPORTS):
        export(number)
        marks.append(held())
    warm = marks[WARM_UP:]
    assert len({mark["threads"] for mark in warm}) == 1, warm
    assert len({mark["files"] for mark in warm}) == 1, warm
    assert warm[-1]["bytes"] - warm[0]["bytes"] < 24e6, warm  # of some 500 MB: a model a time would be more


def test_torch_exports_leave_nothing_in_torchs_own_caches(tmp_path):
    """They held 1,800 objects for each export of the digits CNN: every traced shape with its environment."""
    counts = []
    for _ in range(6):
        rsi_deploy.export(cnn(), tmp_path / "b", rank=4, measure=False, force=True)
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert (counts[-1] - counts[2]) / 3 < 200, counts


def test_the_goals_tell_growth_from_none():
    """What the bench must reject: a leak of a tenth, and a file a run."""
    flat = [{"bytes": 100.0 + n % 3, "resident": 200.0, "threads": 3, "files": 20} for n in range(200)]
    assert all(goal.held for goal in goals(compared(flat), []))
    growing = [{**mark, "bytes": 100.0 + n / 10} for n, mark in enumerate(flat)]
    assert [goal.held for goal in goals(compared(growing), [])] == [False, True, True]
    opening = [{**mark, "files": 20 + n // 50} for n, mark in enumerate(flat)]
    assert [goal.held for goal in goals(compared(opening), [])] == [True, True, False]


def test_the_goals_tell_a_verdict_that_changes():
    window = {"speedup": 2.0, "interval": (1.9, 2.1), "kind": "faster", "blocks": 9, "threads": 3, "files": 20}
    assert all(goal.held for goal in goals([], [window] * 3))
    other = {**window, "kind": "slower", "files": 21}
    assert not any(goal.held for goal in goals([], [window, window, other]))


def test_quick(tmp_path, monkeypatch, capsys):
    """The script's own way, with two exports of a small model in place of the sample."""
    model = mlp_onnx(tmp_path / "m.onnx")
    monkeypatch.setattr(long_run, "torch_way", lambda: (str(model),))
    monkeypatch.setattr(long_run, "weights", dict)
    monkeypatch.setattr(long_run, "SAMPLES", tmp_path)
    labelled(tmp_path / "digits_eval.npz", model)
    monkeypatch.setattr(long_run, "QUICK_EXPORTS", 2)
    assert long_run.main(["--quick", "--json", str(tmp_path / "r.json")]) == 0
    assert "files" in capsys.readouterr().out
    assert (tmp_path / "r.json").exists()
