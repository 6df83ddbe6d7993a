"""The calibrator itself; what it makes of whole exports stands in test_calibrated_export.py."""

import numpy as np
import pytest
from calibrated_nets import IMAGE, branch_net, conv_net, inputs
from nets import mlp_onnx

from rsi_deploy import export
from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.exporting import calibration_step as calibrating
from rsi_deploy.exporting.calibrated.data_checks import listed, remarks
from rsi_deploy.exporting.timing import model_times
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.runtime.feeds.inputs import model_inputs


def test_names_by_reason():
    assert listed({}) == ""
    assert listed({"a": "x", "b": "y", "c": "x"}) == "a, c (x); b (y)"
    assert listed(dict.fromkeys("abcd", "x")) == "a, b, c, ... (x)"


def surveyed(model, path, size=1024):
    """Streams that have seen the data, and the data."""
    data = CalibrationData(path, model_inputs(model), None, size)
    streams = OnnxStreams(model, data.feeds, data.samples)
    streams.survey(lambda site, moments: None)
    return streams, data


def test_scarce_data_name_the_worst_site_and_how_many_would_do(tmp_path):
    model = mlp_onnx(tmp_path / "m.onnx", sizes=(12, 48, 24, 10))
    path = inputs(tmp_path / "x.npz", 12, count=100)
    (note,) = remarks(*surveyed(model, path))
    assert note == (
        "80 samples of the fit give 2 sites fewer than 4 rows an input (fc2: 80 rows for 48); about 256 samples "
        "would do"
    )
    assert remarks(*surveyed(model, inputs(tmp_path / "y.npz", 12, count=256))) == []
    assert "(--calib-size; there are 100)" in remarks(*surveyed(model, path, 79))[0]


def test_a_conv_has_many_rows_a_sample(tmp_path):
    model = conv_net(tmp_path / "m.onnx")  # conv2 has 216 inputs at 16 positions, the head 32 at one
    (note,) = remarks(*surveyed(model, inputs(tmp_path / "x.npz", *IMAGE, count=60)))
    assert "give 2 sites fewer than 4 rows an input (head: 48 rows for 32); about 192 samples would do" in note


def test_what_is_out_of_reach_is_said(tmp_path):
    notes = remarks(*surveyed(branch_net(tmp_path / "m.onnx"), inputs(tmp_path / "x.npz", 16, count=200)))
    assert notes == ["not calibrated: no, yes (it stands in a subgraph or function, which calibration cannot observe)"]


def run(tmp_path, **options):
    model = mlp_onnx(tmp_path / "m.onnx", sizes=(12, 48, 48, 10))
    data = inputs(tmp_path / "c.npz", 12, low_rank=5)
    return export(str(model), tmp_path / "b", calib=data, measure=False, force=True, **options)


def test_data_that_do_not_fit_are_refused_before_the_cost_table(tmp_path, monkeypatch):
    monkeypatch.setattr(model_times, "timed_export", lambda *a, **k: pytest.fail("a cost table was measured"))
    model, wrong = mlp_onnx(tmp_path / "m.onnx", sizes=(12, 48, 48, 10)), inputs(tmp_path / "c.npz", 13)
    with pytest.raises(UsageError, match="13"):
        export(str(model), tmp_path / "b", calib=wrong, keep_macs=0.5)
    right = inputs(tmp_path / "d.npz", 12)
    with pytest.raises(pytest.fail.Exception):  # data that fit come to the table
        export(str(model), tmp_path / "b", calib=right, keep_macs=0.5)


def test_sites_are_fitted_once_however_often_a_budget_is_measured(tmp_path, monkeypatch):
    fits, real = [], Calibration.fit
    monkeypatch.setattr(
        Calibration, "fit", lambda self, streams, plan, *a: (fits.append(plan), real(self, streams, plan, *a))[1]
    )
    report = run(tmp_path, max_size=9000, precision="float32")
    assert len(fits) == 1
    assert {name: rank for name, (_, rank) in fits[0].items()} == {s.name: s.rank for s in report.split_sites}


def test_what_needs_no_calibration_runs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "OnnxStreams", lambda *a, **k: pytest.fail("calibration ran"))
    report = run(tmp_path, rank="25%", factors="weights")
    assert report.calibration.checked.samples == 64  # the data certify all the same
    with pytest.raises(pytest.fail.Exception):
        run(tmp_path, rank="25%")


def test_candidates_are_not_left_behind(tmp_path):
    run(tmp_path, keep_params=0.5)
    names = ["README.md", "manifest.json", "model.onnx", "plan.json", "recipe.toml", "report.html", "report.json"]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == names


def test_refusals_come_before_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "OnnxStreams", lambda *a, **k: pytest.fail("calibration ran"))
    for options, words in (
        ({"rank": 49}, "--rank 49 is above the full rank of every site"),
        ({"keep_params": 0.5, "exclude": ["nothing"]}, "matches none"),
    ):
        with pytest.raises(UsageError, match=words):
            run(tmp_path, **options)


def test_filters_that_let_nothing_through(tmp_path):
    with pytest.raises(ModelError, match="calibration reaches no site: the filters let none through"):
        run(tmp_path, keep_params=0.5, exclude=["*"])


def test_the_search_for_a_drop_ends_at_the_smallest_model(tmp_path):
    model = mlp_onnx(tmp_path / "m.onnx", sizes=(12, 48, 48, 10))
    x = np.random.default_rng(7).standard_normal((50, 12)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, labels=np.arange(50) % 10)
    data = inputs(tmp_path / "c.npz", 12, low_rank=5)
    report = export(
        str(model), tmp_path / "b", calib=data, data=tmp_path / "d.npz", max_drop=100, measure=False
    )  # anything will do
    smallest = 59 + 95 + 57 + 48 + 48 + 10  # rank 1 everywhere, pivoted, and the biases
    assert smallest <= report.compressed.params <= smallest + report.dense.params / 64


def test_a_drop_where_no_rank_saves_anything(tmp_path):
    """Rank 1 of `(1, 12)` has 13 numbers for 12."""
    model = mlp_onnx(tmp_path / "m.onnx", sizes=(12, 1, 10))
    x = np.random.default_rng(7).standard_normal((50, 12)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, labels=np.arange(50) % 10)
    data = inputs(tmp_path / "c.npz", 12)
    with pytest.raises(ModelError, match=r"--max-drop: no rank of any site saves anything; let more sites be split"):
        export(str(model), tmp_path / "b", calib=data, data=tmp_path / "d.npz", max_drop=5, measure=False)
    assert not (tmp_path / "b").exists()
