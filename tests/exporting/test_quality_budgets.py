"""Exports whose size the quality of the outputs decides, and plans that are compared with the check part."""

import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
from calibrated_nets import inputs, text_net, texts
from nets import mlp_onnx, run_onnx

from rsi_deploy import export
from rsi_deploy.calibration import record
from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.exporting.calibrated.plan_check import at_fault, is_much_worse
from rsi_deploy.planning.decide import Planned
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.planning.planner import Decision, FixedPlanner
from rsi_deploy.report.summary import plan_lines, verdict
from rsi_deploy.verifying.api import verify


def classifier(tmp_path, *, low_rank=5, count=1400, **options):
    """Export a net whose middle layer has rank 6, but for a little noise."""
    rng = np.random.default_rng(3)
    middle = rng.standard_normal((48, 6)) @ rng.standard_normal((6, 48)) / 6 + 0.01 * rng.standard_normal((48, 48))
    model = mlp_onnx(tmp_path / "m.onnx", sizes=(12, 48, 48, 10), fc2=middle)
    data = inputs(tmp_path / "c.npz", 12, low_rank=low_rank, count=count)
    return export(str(model), tmp_path / "b", calib=data, measure=False, force=True, **options)


def test_with_calibration_data_alone_99_percent_of_the_answers_stay(tmp_path):
    report = classifier(tmp_path)
    assert report.settings.budget == "--min-agreement 99%"
    assert report.plan.is_default
    assert report.calibration.checked.agreement_at_least >= 99
    assert report.compressed.params < report.dense.params
    kept = min(trial.share for trial in report.plan.trials if trial.holds)
    assert report.plan.next_smaller.share < kept <= report.plan.next_smaller.share + 0.05
    assert report.plan.next_smaller.value < 0.99 <= min(t.value for t in report.plan.trials if t.holds)
    lines = plan_lines(report)
    assert "no size was set" in lines[0]
    assert "(missed)" in lines[0]
    recipe = tomllib.loads(report.recipe)
    assert recipe["min_agreement"] == "99%"
    assert "max_output_error" not in recipe
    fresh = np.load(inputs(tmp_path / "t.npz", 12, low_rank=5, count=2000, seed=5))["x"]
    dense, small = (
        run_onnx(path, fresh)[0].argmax(axis=1) for path in (tmp_path / "m.onnx", tmp_path / "b/model.onnx")
    )
    assert (dense == small).mean() >= 0.985


def test_less_quality_gives_a_smaller_model_and_verify_checks_the_limit(tmp_path):
    small = classifier(tmp_path, min_agreement="90%", keep_dense=True, precision="float32")
    assert small.calibration.checked.agreement_at_least >= 90
    (claim,) = (claim for claim in verify(tmp_path / "b").claims if claim.name == "budget")
    assert claim.status == "holds"
    large = classifier(tmp_path, min_agreement="99%", precision="float32")
    assert large.compressed.params > small.compressed.params
    assert classifier(tmp_path, min_agreement="90%").compressed.bytes < small.compressed.bytes  # bits are chosen, too


def test_embeddings_keep_their_cosine(tmp_path):
    model, data = text_net(tmp_path / "t.onnx"), texts(tmp_path / "t.npz", count=600)
    report = export(str(model), tmp_path / "b", calib=data, measure=False)
    assert report.settings.budget == "--min-cosine 0.99"
    assert report.calibration.checked.cosine_at_least >= 0.99
    assert report.precision.request == "auto"
    assert report.compressed.bytes < report.dense.bytes / 2
    report = export(str(model), tmp_path / "f", calib=data, measure=False, min_cosine=0.99, precision="float32")
    assert report.plan.delivers_dense, "any split makes so small a file larger"
    smaller = export(str(model), tmp_path / "s", calib=data, min_cosine=0.5, measure=False)
    assert smaller.calibration.checked.cosine_at_least >= 0.5
    assert smaller.compressed.bytes < smaller.dense.bytes
    with pytest.raises(UsageError, match=r"--min-agreement is for class scores.* embeddings; type --min-cosine or"):
        export(str(model), tmp_path / "x", calib=data, min_agreement=0.9, measure=False)


def test_other_outputs_keep_their_error(tmp_path):
    model = mlp_onnx(tmp_path / "m.onnx", sizes=(12, 48, 48, 1))
    data = inputs(tmp_path / "c.npz", 12, low_rank=5, count=400)
    report = export(str(model), tmp_path / "b", calib=data, measure=False)
    assert report.settings.budget == "--max-output-error 1%"
    assert report.calibration.checked.output_error_at_most <= 0.01
    for option in ("min_agreement", "min_cosine"):
        with pytest.raises(UsageError, match="neither class scores nor embeddings; type --max-output-error"):
            export(str(model), tmp_path / "x", calib=data, measure=False, **{option: 0.9})


def test_a_quality_that_only_the_dense_model_keeps(tmp_path):
    report = classifier(tmp_path, max_output_error=1e-12)
    assert report.plan.delivers_dense
    assert not report.split_sites
    assert "DENSE model is delivered" in verdict(report)
    assert report.compressed.params == report.dense.params
    assert not any(trial.holds for trial in report.plan.trials)


def test_too_few_samples_say_what_they_show_and_how_many_would_do(tmp_path):
    model, data = mlp_onnx(tmp_path / "m.onnx"), inputs(tmp_path / "c.npz", 12, count=200)
    with pytest.raises(UsageError) as caught:
        export(str(model), tmp_path / "b", calib=data, min_agreement="99%", measure=False)
    for words in ("100 samples", "97.0 % at most", "--calib with 598 samples", "--min-agreement 97%"):
        assert words in str(caught.value)
    with pytest.raises(UsageError, match="no number of samples shows 100 %"):
        export(str(model), tmp_path / "b", calib=data, min_agreement="100%", measure=False)
    with pytest.raises(UsageError, match="too few to judge by; --calib with 128 samples would do"):
        few = inputs(tmp_path / "f.npz", 12, count=100)
        export(str(model), tmp_path / "b", calib=few, max_output_error="5%", measure=False)
    assert not (tmp_path / "b").exists()


def test_beside_a_rank_the_output_error_is_a_gate_on_the_check_part(tmp_path):
    with pytest.raises(GateError, match="--max-output-error 0.01%.*calibration data"):
        classifier(tmp_path, rank=2, max_output_error=1e-4)
    assert classifier(tmp_path, rank=2, max_output_error=100).settings.rank == "2"


# -- a plan and what the check part shows


def test_a_budget_that_breaks_the_model_names_one_that_holds_up(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "BROKEN_AGREEMENT", 90.0)
    with pytest.raises(GateError) as caught:
        classifier(tmp_path, low_rank=0, count=400, keep_params=0.12)
    assert "is broken" in str(caught.value)
    assert not (tmp_path / "b").exists()
    nearest = str(caught.value).partition("type --keep-params ")[2].partition(",")[0]
    report = classifier(tmp_path, low_rank=0, count=400, keep_params=nearest)
    assert not report.calibration.quality.is_broken
    broken = classifier(tmp_path, low_rank=0, count=400, keep_params=0.12, allow_broken=True)
    assert broken.calibration.quality.is_broken
    assert "broken" in verdict(broken)


def test_the_report_compares_what_was_foreseen_with_what_is_shown(tmp_path):
    report = classifier(tmp_path, count=400, keep_params=0.6)
    assert report.plan.foreseen > 0
    quality = report.calibration.checked
    assert report.plan.shown == pytest.approx(quality.output_error + quality.divergence)
    assert report.plan.worse == pytest.approx(report.plan.shown / report.plan.foreseen)
    assert any("times as much" in line for line in plan_lines(report))


def faulty(costs, errors):
    """Four split sites, what each costs on the check part, and its error over the one planned with."""
    dense = Option(form="dense", rank=None, params=100, macs=100, bytes=400, loss=0.0)
    split = Option(form="gemm", rank=1, params=20, macs=20, bytes=80, loss=0.01, error=0.1)
    options = [SiteOptions(name=name, options=(dense, split)) for name in costs]
    decisions = {name: Decision(rank=1, reason="", form="gemm") for name in costs}
    fitted = {name: SimpleNamespace(response_error=0.05, held_out_error=0.1 * error) for name, error in errors.items()}
    made = Planned(planner=FixedPlanner(decisions=decisions), fitted=fitted)
    tried = []

    def loss(trial):
        tried.append({name for name in costs if trial.planner.decisions[name].rank is None})
        return sum(cost for name, cost in costs.items() if name not in tried[-1])

    return at_fault(made, decisions, options, SimpleNamespace(loss=loss)), tried


def test_the_overfitted_site_is_found():
    found, tried = faulty({"a": 0.02, "b": 0.02, "wide": 0.9, "c": 0.02}, {"a": 1, "b": 2, "wide": 8, "c": 1})
    assert found == ["wide"]
    assert len(tried) == 2, "the most suspicious site is tried first, and suffices"


def test_a_suspicious_site_that_does_no_harm_stays_split():
    found, _ = faulty({"a": 0.5, "b": 0.0, "c": 0.6}, {"a": 3, "b": 9, "c": 2})
    assert found == ["c", "a"], "the most helpful first"


def test_what_is_much_worse():
    assert is_much_worse(0.5, 0.1)
    assert not is_much_worse(0.2, 0.1)
    assert not is_much_worse(0.001, 0.00001), "too little to matter"
    assert is_much_worse(float("inf"), 0.1)
