"""`--plan` with calibration data: sites of the plan are not measured again, and the factors are the same."""

from collections import Counter

import numpy as np
import onnx
import pytest
from calibrated_nets import IMAGE, conv_net, inputs
from onnx import numpy_helper

from rsi_deploy import export
from rsi_deploy.calibration.accumulator import SiteAccumulator
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.onnx_models.calibration.segment import Segment
from rsi_deploy.planning.plan_file import PlannedSite, read_plan, write_plan
from rsi_deploy.planning.site_options import Calibration


@pytest.fixture
def work(monkeypatch):
    """Count the calls of each costly part of calibration."""
    done: Counter[str] = Counter()

    def spied(cls, name, key):
        real = getattr(cls, name)

        def call(self, *args, **more):
            done[key(self, *args)] += 1
            return real(self, *args, **more)

        monkeypatch.setattr(cls, name, call)

    spied(OnnxStreams, "survey", lambda *_: "survey")
    spied(OnnxStreams, "distance", lambda *_: "sensitivity")
    spied(Calibration, "_errors", lambda *_: "error curve")
    spied(Calibration, "replacement", lambda self, site, *_: f"factors of {site.name}")
    spied(SiteAccumulator, "__init__", lambda self, site, *_: f"moments of {site.name}")
    spied(Segment, "__call__", lambda *_: "run")
    return done


@pytest.fixture
def model(tmp_path):
    return str(conv_net(tmp_path / "m.onnx"))


@pytest.fixture
def data(tmp_path):
    return inputs(tmp_path / "c.npz", *IMAGE, count=64)


def weights(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name])


def test_the_plan_of_a_bundle_gives_the_same_weights_with_less_work(tmp_path, model, data, work):
    report = export(model, tmp_path / "a", calib=data, keep_macs=0.6, measure=False)
    first = dict(work)
    work.clear()
    export(model, tmp_path / "b", calib=data, plan=tmp_path / "a" / "plan.json", measure=False)
    assert first["survey"] == 1
    assert not work.keys() & {"survey", "sensitivity", "error curve"}
    assert work["run"] < first["run"] / 3
    assert {key for key in work if key.startswith("moments")} == {f"moments of {s.name}" for s in report.split_sites}
    assert_same(weights(tmp_path / "a" / "model.onnx"), weights(tmp_path / "b" / "model.onnx"))


@pytest.mark.parametrize("split", ["conv1", "conv2", "grouped", "head"])
def test_only_planned_sites_have_moments(tmp_path, model, data, work, split):
    export(model, tmp_path / "a", calib=data, keep_macs=0.5, measure=False)
    plan = read_plan(tmp_path / "a" / "plan.json")
    form = "gemm" if split == "head" else "channel"
    alone = {name: PlannedSite(form="dense") for name in plan.sites} | {split: PlannedSite(form=form, rank=2)}
    write_plan(tmp_path / "plan.json", plan.model_copy(update={"sites": alone}))
    work.clear()
    export(model, tmp_path / "b", calib=data, plan=tmp_path / "plan.json", measure=False)
    assert {key for key in work if key.startswith("moments")} == {f"moments of {split}"}
    assert {key for key in work if key.startswith("factors")} == {f"factors of {split}"}


def test_a_plan_without_splits_is_not_fitted(tmp_path, model, data, work):
    export(model, tmp_path / "a", calib=data, keep_macs=0.5, measure=False)
    plan = read_plan(tmp_path / "a" / "plan.json")
    dense = {name: PlannedSite(form="dense") for name in plan.sites}
    write_plan(tmp_path / "plan.json", plan.model_copy(update={"sites": dense}))
    work.clear()
    with pytest.raises(Exception, match="nothing to split"):
        export(model, tmp_path / "b", calib=data, plan=tmp_path / "plan.json", measure=False)
    assert "run" not in work


def test_a_budget_fits_only_the_sites_that_it_splits(tmp_path, model, data, work):
    report = export(model, tmp_path / "a", calib=data, keep_macs=0.6, measure=False)
    split = {site.name for site in report.split_sites}
    gathered = Counter({key: count for key, count in work.items() if key.startswith("moments")})
    assert {key.removeprefix("moments of ") for key, count in gathered.items() if count == 2} == split
    assert len(gathered) > len(split)
