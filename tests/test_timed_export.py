"""Exports that time decides: never slower than dense, planned by tables, and honest where nothing is faster."""

import json

import numpy as np
import onnxruntime
import pytest
from nets import mlp_onnx, run_onnx

import rsi_deploy
from rsi_deploy.cli import run
from rsi_deploy.errors import UsageError
from rsi_deploy.last_word import UNDONE
from rsi_deploy.measure.cost_table import read_cost_table
from rsi_deploy.report.schema import read_report
from rsi_deploy.verification import verify

WIDE = (128, 1024, 1024, 10)
"""Wide enough that a small rank is faster on any machine."""
QUICK = {"cost_budget": 8, "bench_seconds": 1.0, "threads": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timed")
    mlp_onnx(folder / "wide.onnx", sizes=WIDE)
    mlp_onnx(folder / "tiny.onnx")
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((24, 128)).astype(np.float32)  # inputs of 24 directions: small ranks lose little
    np.savez(folder / "calib.npz", x=rng.standard_normal((96, 24)).astype(np.float32) @ mixing)
    rsi_deploy.profile(str(folder / "wide.onnx"), folder / "cost.json", budget=8, threads=1)
    return folder


def export(place, name, output, **options):
    return rsi_deploy.export(str(place / name), output, **{**QUICK, **options})


def test_a_share_of_the_time_is_kept(place, tmp_path):
    report = export(place, "wide.onnx", tmp_path / "b", calib=place / "calib.npz", keep_latency="60%")
    assert report.timing.rule == "faster"
    assert report.timing.checks
    assert report.split_sites
    assert report.latency.arms[1].speedup > 1 / 0.6 * 0.85
    assert "measured faster than the dense one" in report.timing.last_word
    assert report.settings.budget == "--keep-latency 60%"
    claims = {claim.name: claim for claim in verify(tmp_path / "b").claims}
    assert claims["budget"].status == "holds"


def test_a_split_that_is_not_faster_is_undone_and_the_dense_model_delivered(place, tmp_path):
    report = export(place, "tiny.onnx", tmp_path / "b", rank=4, keep_dense=True)
    assert not report.split_sites
    assert {u.site for u in report.timing.undone} == {"fc1", "fc2", "head"} - {
        s.name for s in report.sites if s.reason != UNDONE
    }
    assert report.timing.last_word.startswith("the DENSE model is delivered")
    assert report.timing.last_word in report.notes
    assert report.timing.last_word in (tmp_path / "b" / "README.md").read_text()
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    delivered, dense = (run_onnx(tmp_path / "b" / name, x)[0] for name in ("model.onnx", "dense.onnx"))
    np.testing.assert_array_equal(delivered, dense)
    assert all(claim.status != "broken" for claim in verify(tmp_path / "b").claims)


@pytest.mark.parametrize(
    "options", [{"smaller_is_enough": True}, {"always_split": True}, {"measure": False}], ids=lambda o: next(iter(o))
)
def test_who_asks_for_it_gets_the_split_all_the_same(place, tmp_path, options):
    report = export(place, "tiny.onnx", tmp_path / "b", rank=4, **options)
    assert report.split_sites
    assert report.timing is None


def test_a_wide_model_keeps_its_uniform_splits(place, tmp_path):
    report = export(place, "wide.onnx", tmp_path / "b", rank=8)
    assert {s.name for s in report.split_sites} >= {"fc1", "fc2"} - {u.site for u in report.timing.undone}
    assert report.split_sites
    assert report.latency.arms[1].speedup > 1


def test_other_budgets_split_only_what_is_faster(place, tmp_path):
    report = export(place, "wide.onnx", tmp_path / "b", calib=place / "calib.npz", keep_params=0.5)
    assert report.compressed.params <= 0.5 * report.dense.params
    table = rsi_deploy.profile(str(place / "wide.onnx"), budget=8, threads=1)
    costs = table.by_site()
    for site in report.split_sites:
        assert costs[site.name].is_faster(site.form, site.rank), site.name
    words = "only splits that were measured faster were taken|no split of any site is measured faster"
    with pytest.raises(rsi_deploy.ModelError, match=words):
        export(place, "tiny.onnx", tmp_path / "t", calib=calib_of(tmp_path), keep_params=0.3)
    assert export(
        place, "tiny.onnx", tmp_path / "t", calib=calib_of(tmp_path), keep_params=0.5, smaller_is_enough=True
    ).split_sites


def calib_of(folder):
    np.savez(folder / "c.npz", x=np.random.default_rng(1).standard_normal((96, 12)).astype(np.float32))
    return folder / "c.npz"


def test_a_stored_table_is_planned_with(place, tmp_path):
    options = {"calib": place / "calib.npz", "keep_latency": 0.6, "cost": place / "cost.json"}
    report = export(place, "wide.onnx", tmp_path / "b", **options)
    assert report.timing.source == "--cost cost.json"
    assert report.split_sites


def changed(place, folder, **conditions):
    table = read_cost_table(place / "cost.json")
    other = table.model_copy(update={"conditions": table.conditions.model_copy(update=conditions)})
    (folder / "other.json").write_text(other.model_dump_json())
    return folder / "other.json"


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({"cpu": "Another CPU"}, "cpu Another CPU against"),
        ({"onnxruntime": {"onnxruntime": "0.1"}}, "onnxruntime onnxruntime 0.1 against onnxruntime"),
        ({"threads": 7}, "threads 7 against 1"),
        ({"provider": "openvino"}, r"provider openvino against cpu \(its provider is not here"),
    ],
)
def test_a_table_of_other_conditions_is_refused_and_says_what_differs(place, tmp_path, conditions, words):
    other = changed(place, tmp_path, **conditions)
    options = {"calib": place / "calib.npz", "keep_latency": 0.6, "cost": other}
    with pytest.raises(UsageError, match=words) as told:
        export(place, "wide.onnx", tmp_path / "b", **options)
    assert "--foreign-cost" in str(told.value)
    report = export(place, "wide.onnx", tmp_path / "b", foreign_cost=True, **options)
    assert report.latency is None
    assert any("measured nowhere: run rsi-deploy bench there" in note for note in report.notes)
    assert report.timing.predicted <= 0.6
    assert report.split_sites


def test_the_same_table_and_no_measuring_give_the_same_bytes(place, tmp_path):
    other = changed(place, tmp_path, cpu="Another CPU")
    options = {"calib": place / "calib.npz", "keep_latency": 0.5, "cost": other, "foreign_cost": True}
    for name in "ab":
        export(place, "wide.onnx", tmp_path / name, **options)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_an_unreachable_time_names_the_fastest_plan(place, tmp_path, capsys):
    argv = ["export", str(place / "wide.onnx"), "--calib", str(place / "calib.npz"), "--keep-latency", "0.1%"]
    argv += ["--cost", str(place / "cost.json"), "--threads", "1", "-o", str(tmp_path / "b")]
    assert run(argv) == 3
    assert "the fastest takes" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--keep-latency", "0.6", "--no-bench"], "are measured: leave out --no-bench"),
        (["--keep-macs", "0.6", "--foreign-cost"], "add --cost, or leave it out"),
        (["--max-latency", "25"], "write --max-latency 25ms"),
        (["--max-latency", "fast"], "must be a time such as 25ms"),
        (["--keep-latency", "60"], "write --keep-latency 60%"),
        (["--keep-latency", "0.6", "--keep-macs", "0.5"], "exactly one of"),
        (["--keep-latency", "0.6", "--cost", "none.json"], "make one with rsi-deploy profile"),
    ],
)
def test_what_cannot_be_meant(place, tmp_path, capsys, argv, words):
    base = ["export", str(place / "wide.onnx"), "--calib", str(place / "calib.npz"), "-o", str(tmp_path / "b")]
    assert run([*base, *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_table_goes_with_a_budget_and_with_its_own_inputs(place, tmp_path, capsys):
    cost = ["--cost", str(place / "cost.json"), "--threads", "1", "-o", str(tmp_path / "b")]
    assert run(["export", str(place / "wide.onnx"), "--rank", "4", *cost]) == 2
    assert "--cost is planned with: give a budget" in capsys.readouterr().err
    calib = ["--calib", str(place / "calib.npz"), "--keep-latency", "0.6"]
    assert run(["export", str(place / "wide.onnx"), *calib, "--bench-batch", "4", *cost]) == 2
    assert "float32 (1, 128), but this export measures with input: float32 (4, 128)" in capsys.readouterr().err
    tiny = ["--calib", str(calib_of(tmp_path)), "--keep-latency", "0.6"]
    assert run(["export", str(place / "tiny.onnx"), *tiny, *cost]) == 2
    assert "this export measures with" in capsys.readouterr().err


def test_the_report_is_read_back(place, tmp_path):
    export(place, "tiny.onnx", tmp_path / "b", rank=4)
    timing = read_report(tmp_path / "b").timing
    assert timing.source == "the finished model alone"
    assert timing.conditions.onnxruntime["onnxruntime"] == onnxruntime.__version__
    assert json.loads((tmp_path / "b" / "report.json").read_text())["timing"]["undone"]
