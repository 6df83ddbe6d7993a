"""Exports that time decides: never slower than dense, planned by tables, and honest where nothing is faster."""

import contextlib
import json

import numpy as np
import onnx
import onnxruntime
import pytest
from nets import mlp_onnx, run_onnx

import rsi_deploy
from rsi_deploy.cli import run
from rsi_deploy.core.errors import UsageError
from rsi_deploy.costing.cost_table import read_cost_table
from rsi_deploy.exporting.lowered.maker import PointMaker, decisions_in
from rsi_deploy.exporting.timing.profile import SCHEMES, Costing
from rsi_deploy.exporting.timing.slowdown_rollback import UNDONE
from rsi_deploy.exporting.timing.timed_export import TimedExport, rescaled
from rsi_deploy.planning.latency_search import FASTER
from rsi_deploy.report.schema import read_report
from rsi_deploy.verifying.api import verify

WIDE = (128, 512, 512, 10)
"""Wide enough that a small rank is faster on any machine."""
SLOWER = {"speedup_interval": (0.5, 0.6)}
QUICK = {"cost_budget": 4, "bench_seconds": 0.5, "threads": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timed")
    mlp_onnx(folder / "wide.onnx", sizes=WIDE)
    mlp_onnx(folder / "tiny.onnx")
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((24, 128)).astype(np.float32)  # inputs of 24 directions: small ranks lose little
    np.savez(folder / "calib.npz", x=rng.standard_normal((96, 24)).astype(np.float32) @ mixing)
    made_up = by_size(rsi_deploy.profile(str(folder / "wide.onnx"), budget=3, threads=1))
    (folder / "cost.json").write_text(made_up.model_dump_json())
    return folder


def by_size(table):
    """The table with times as they would be on a machine where numbers are all that costs: no clock decides a test."""
    numbers = {"fc1": (512, 128), "fc2": (512, 512), "head": (10, 512)}
    unit = table.model.dense_nanoseconds / sum(out * into for out, into in numbers.values())
    shapes = {table.sites[name]: shape for name, shape in numbers.items()}
    costs = []
    for cost in table.costs:
        out, into = shapes[cost.signature]
        splits = []
        for split in cost.splits:
            speedup = out * into / (split.rank * (out + into))
            times = {"nanoseconds": round(unit * split.rank * (out + into)), "speedup_interval": (speedup, speedup)}
            splits.append(split.model_copy(update=times))
        times = {"dense_nanoseconds": round(unit * out * into), "blocks": 30, "half_width": 0.01}
        costs.append(cost.model_copy(update={**times, "splits": tuple(splits)}))
    model = table.model.model_copy(update={"scale": 1.0})
    return table.model_copy(update={"costs": tuple(costs), "model": model})


def export(place, name, output, **options):
    return rsi_deploy.export(str(place / name), output, **{**QUICK, **options})


def test_a_share_of_the_time_is_planned_measured_and_delivered(place, tmp_path):
    options = {"calib": place / "calib.npz", "keep_latency": "60%", "cost": place / "cost.json"}
    report = export(place, "wide.onnx", tmp_path / "b", **options)
    assert report.timing.rule == "faster"
    assert report.timing.source == "--cost cost.json"
    assert 1 <= len(report.timing.checks) <= 7
    assert report.split_sites or report.timing.undone
    assert report.timing.last_word.startswith(
        ("the finished model is measured faster", "the DENSE model", "1 of", "2 of")
    )
    assert report.settings.budget == "--keep-latency 60%"
    claims = {claim.name: claim for claim in verify(tmp_path / "b").claims}
    assert claims["budget"].status in ("holds", "broken")  # from the report's own measurement
    assert "of" in claims["budget"].detail


def test_without_a_table_one_is_measured(place, tmp_path):
    report, refused = None, ""
    try:
        report = export(place, "wide.onnx", tmp_path / "b", calib=place / "calib.npz", keep_params=0.6)
    except rsi_deploy.ModelError as error:  # a busy machine: too little was shown faster, and that is said
        refused = str(error)
    assert (report is None) == ("faster" in refused)
    if report is not None:
        assert report.timing.source == "measured here"
        kept = report.compressed.params <= 0.6 * report.dense.params
        assert kept or report.timing.undone or any("the DENSE model" in note for note in report.notes)


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
    "options", [{"allow_slower": True}, {"always_split": True}, {"measure": False}], ids=lambda o: next(iter(o))
)
def test_who_asks_for_it_gets_the_split_all_the_same(place, tmp_path, options):
    report = export(place, "tiny.onnx", tmp_path / "b", rank=4, **options)
    assert report.split_sites
    assert report.timing is None


def test_a_wide_model_keeps_its_uniform_splits(place, tmp_path):
    report = export(place, "wide.onnx", tmp_path / "b", rank=8)
    assert {s.name for s in report.split_sites} >= {"fc1", "fc2"} - {u.site for u in report.timing.undone}
    assert bool(report.split_sites) == ("DENSE" not in report.timing.last_word)


def test_other_budgets_split_only_what_is_faster(place, tmp_path):
    table = read_cost_table(place / "cost.json")
    slow = [cost for cost in table.costs if cost.signature != table.sites["fc2"]]
    late = [c.model_copy(update={"splits": tuple(s.model_copy(update=SLOWER) for s in c.splits)}) for c in slow]
    costs = (*late, table.by_site()["fc2"])
    (tmp_path / "late.json").write_text(table.model_copy(update={"costs": costs}).model_dump_json())
    options = {"calib": place / "calib.npz", "keep_params": 0.5, "cost": tmp_path / "late.json"}
    report = export(place, "wide.onnx", tmp_path / "b", **options)
    reasons = {site.name: site.reason for site in report.sites if site.rank is None}
    assert reasons["fc1"] == FASTER  # it would save parameters, and no time
    assert "fc2" not in reasons or report.timing.undone
    with pytest.raises(rsi_deploy.ModelError, match="only splits that were measured faster were taken"):
        export(place, "wide.onnx", tmp_path / "t", **{**options, "keep_params": 0.05})
    assert export(
        place, "tiny.onnx", tmp_path / "t", calib=calib_of(tmp_path), keep_params=0.5, allow_slower=True
    ).split_sites


def nothing_faster(place, folder):
    """A table of this machine by whose word every split is slower."""
    table = read_cost_table(place / "cost.json")
    late = [c.model_copy(update={"splits": tuple(s.model_copy(update=SLOWER) for s in c.splits)}) for c in table.costs]
    (folder / "slow.json").write_text(table.model_copy(update={"costs": tuple(late)}).model_dump_json())
    return folder / "slow.json"


@pytest.mark.parametrize("budget", [{"keep_params": 0.5}, {"keep_macs": 0.5}], ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("measure", [True, False])
def test_where_no_split_is_faster_the_dense_model_is_delivered_and_said(place, tmp_path, budget, measure):
    options = {"calib": place / "calib.npz", "cost": nothing_faster(place, tmp_path), "keep_dense": True}
    report = export(place, "wide.onnx", tmp_path / "b", measure=measure, **options, **budget)
    assert not report.split_sites
    assert {site.reason for site in report.sites} == {FASTER}
    notes = [note for note in report.notes if "the DENSE model is delivered" in note]
    assert len(notes) == 1
    assert "fc1: no split of it is measured faster" in notes[0]
    assert "--allow-slower" in notes[0]
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    delivered, dense = (run_onnx(tmp_path / "b" / name, x)[0] for name in ("model.onnx", "dense.onnx"))
    np.testing.assert_array_equal(delivered, dense)
    claims = {claim.name: claim for claim in verify(tmp_path / "b").claims}
    assert claims["budget"].status == "not checked"
    assert "given up" in claims["budget"].detail
    assert all(claim.status != "broken" for claim in claims.values())
    assert export(place, "wide.onnx", tmp_path / "s", allow_slower=True, **options, **budget).split_sites


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (
            ["--keep-latency", "0.6"],
            "no plan can meet --keep-latency 60%: no split of any of 3 sites is measured faster",
        ),
        (["--max-latency", "1us"], "the dense model is the fastest here"),
        (["--max-size", "1MB"], "Where smaller is enough, add --allow-slower"),
    ],
)
def test_a_time_or_a_size_that_dense_would_break_is_refused(place, tmp_path, capsys, budget, words):
    argv = ["export", str(place / "wide.onnx"), "--calib", str(place / "calib.npz"), "-o", str(tmp_path / "b")]
    cost = ["--cost", str(nothing_faster(place, tmp_path)), "--threads", "1"]
    assert run([*argv, *budget, *cost]) == 3
    assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def calib_of(folder):
    np.savez(folder / "c.npz", x=np.random.default_rng(1).standard_normal((96, 12)).astype(np.float32))
    return folder / "c.npz"


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
    with pytest.raises(UsageError, match=words) as caught:
        export(place, "wide.onnx", tmp_path / "b", **options)
    assert "--allow-cost-mismatch" in str(caught.value)
    report = export(place, "wide.onnx", tmp_path / "b", allow_cost_mismatch=True, **options)
    assert report.latency is None
    assert any("measured nowhere: run rsi-deploy bench there" in note for note in report.notes)
    assert report.timing.predicted <= 0.6
    assert report.split_sites


def test_the_same_table_and_no_measuring_give_the_same_bytes(place, tmp_path):
    other = changed(place, tmp_path, cpu="Another CPU")
    options = {"calib": place / "calib.npz", "keep_latency": 0.5, "cost": other, "allow_cost_mismatch": True}
    for name in "ab":
        export(place, "wide.onnx", tmp_path / name, **options)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_a_stored_table_is_read_in_the_units_of_now(place):
    table = read_cost_table(place / "cost.json")
    slower = rescaled(table, 3 * table.model.dense_nanoseconds)
    plan = {"fc2": ("gemm", 32)}
    assert slower.predicted(plan) == pytest.approx(table.predicted(plan))
    assert slower.model.dense_nanoseconds == 3 * table.model.dense_nanoseconds


def test_an_absolute_time_is_kept(place, tmp_path):
    table = read_cost_table(place / "cost.json")
    allowed = round(0.6 * table.model.dense_nanoseconds / 1e3)
    options = {"calib": place / "calib.npz", "max_latency": f"{allowed}us", "cost": place / "cost.json"}
    report = export(place, "wide.onnx", tmp_path / "b", **options)
    assert report.settings.budget.startswith("--max-latency")
    assert report.split_sites or report.timing.undone
    assert "Time" in (tmp_path / "b" / "report.html").read_text()


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
        (["--keep-macs", "0.6", "--allow-cost-mismatch"], "add --cost, or leave it out"),
        (["--max-latency", "25"], "write --max-latency 25ms"),
        (["--max-latency", "fast"], "takes a time such as 25ms"),
        (["--keep-latency", "60"], "write --keep-latency 60%"),
        (["--keep-latency", "0.6", "--keep-macs", "0.5"], "exactly one of"),
        (["--keep-latency", "0.6", "--cost", "none.json"], "make one with rsi-deploy profile"),
        (["--keep-latency", "0.6", "--precision", "int8", "--cost", "none.json"], "make one with rsi-deploy profile"),
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


def test_a_table_of_other_shapes_is_refused(place, tmp_path, capsys):
    """The same input, and not one site of the model that was timed."""
    narrow = mlp_onnx(tmp_path / "narrow.onnx", sizes=(128, 48, 12))
    argv = ["export", str(narrow), "--calib", str(place / "calib.npz"), "--keep-latency", "0.6", "--threads", "1"]
    assert run([*argv, "--cost", str(place / "cost.json"), "-o", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "knows no site shape of this model: it was made for wide.onnx; make one of this model with" in said
    assert not (tmp_path / "b").exists()


def test_the_report_is_read_back(place, tmp_path):
    export(place, "tiny.onnx", tmp_path / "b", rank=4)
    timing = read_report(tmp_path / "b").timing
    assert timing.source == "the finished model alone"
    assert timing.conditions.onnxruntime["onnxruntime"] == onnxruntime.__version__
    assert json.loads((tmp_path / "b" / "report.json").read_text())["timing"]["undone"]


def in_int8(place, slow=()):
    """A table of static int8 that is made up by sizes; sites in `slow` are slower at any rank."""
    made = by_size(rsi_deploy.profile(str(place / "wide.onnx"), budget=3, threads=1, scheme="static-int8"))
    late = {made.sites[name] for name in slow}
    costs = [
        cost.model_copy(
            update={"splits": tuple(s.model_copy(update={**SLOWER, "nanoseconds": 10**9}) for s in cost.splits)}
        )
        if cost.signature in late
        else cost
        for cost in made.costs
    ]
    return made.model_copy(update={"costs": tuple(costs)})


@pytest.mark.parametrize("slow", [(), ("fc2",)], ids=["fc2 is faster", "fc2 is slower"])
@pytest.mark.parametrize(
    "request_", [{"keep_latency": 0.001}, {"fastest": True, "max_output_error": 0.99}], ids=lambda r: next(iter(r))
)
def test_in_int8_only_sites_are_split_that_its_table_shows_faster(place, tmp_path, monkeypatch, slow, request_):
    planned, point = [], PointMaker.point

    def noted(maker, made, *rest):
        planned.append({name for name, d in decisions_in(made).items() if d.rank is not None})
        return point(maker, made, *rest)

    monkeypatch.setattr(PointMaker, "point", noted)
    table = in_int8(place, slow)
    monkeypatch.setattr(Costing, "table", lambda *_, **__: table)
    x = np.load(place / "calib.npz")["x"]
    np.savez(tmp_path / "calib.npz", x=np.concatenate([x, x[:, ::-1]]))
    options = {"calib": tmp_path / "calib.npz", "precision": "int8"}
    with contextlib.suppress(rsi_deploy.ModelError):  # no model is so fast
        export(place, "wide.onnx", tmp_path / "b", **options, **request_)
    split = set().union(*planned)
    assert "fc1" in split
    assert ("fc2" in split) is (not slow)


def test_a_table_holds_for_its_scheme_alone(place, tmp_path):
    (tmp_path / "int8.json").write_text(in_int8(place).model_dump_json())
    for foreign in (False, True):
        with pytest.raises(UsageError, match="static int8"):
            options = {"keep_latency": 0.6, "cost": tmp_path / "int8.json", "allow_cost_mismatch": foreign}
            export(place, "wide.onnx", tmp_path / "b", calib=place / "calib.npz", precision="float32", **options)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_table_of_another_net_or_machine_is_refused_in_every_precision(place, tmp_path, precision):
    table = in_int8(place) if precision == "int8" else read_cost_table(place / "cost.json")
    costs = [cost.model_copy(update={"signature": f"other {cost.signature}"}) for cost in table.costs]
    conditions = table.conditions.model_copy(update={"cpu": "Another CPU"})
    wrong = {"knows no site shape": {"costs": tuple(costs)}, "cpu Another CPU against": {"conditions": conditions}}
    for words, update in wrong.items():
        (tmp_path / "cost.json").write_text(table.model_copy(update=update).model_dump_json())
        options = {"keep_latency": 1.0, "cost": tmp_path / "cost.json", "precision": precision}  # int8 needs no times
        with pytest.raises(UsageError, match=words):
            export(place, "wide.onnx", tmp_path / "b", calib=place / "calib.npz", **options)


def test_tables_of_schemes_are_cached_apart(place, tmp_path, monkeypatch):
    monkeypatch.setenv("RSI_DEPLOY_CACHE", str(tmp_path))
    schemes = ("float32", "static-int8", "dynamic-int8")
    made = [rsi_deploy.profile(str(place / "tiny.onnx"), budget=1, threads=1, scheme=scheme) for scheme in schemes]
    again = [rsi_deploy.profile(str(place / "tiny.onnx"), budget=1, threads=1, scheme=scheme) for scheme in schemes]
    assert made == again
    assert len({str(table.conditions) for table in made}) == 3
    assert len({len({cost.signature for cost in table.costs}) for table in made}) == 1


@pytest.mark.parametrize(("scheme", "node"), [("static-int8", "QuantizeLinear"), ("dynamic-int8", "MatMulInteger")])
def test_sites_are_timed_in_the_scheme(place, scheme, node):
    dense = place / "wide.onnx"
    name = onnxruntime.InferenceSession(dense).get_inputs()[0].name
    feeds = {name: np.zeros((2, 128), np.float32)}
    plain, lowered = (Costing(scheme=SCHEMES[s]).pieces(dense, feeds)[0]["fc2"] for s in ("float32", scheme))
    assert plain.signature == lowered.signature
    for form, rank in ((None, 0), (lowered.site.forms[0], 8)):
        graphs = [onnx.load_from_string(piece.model(form, rank)).graph for piece in (plain, lowered)]
        floats, lows = ({n.op_type for n in graph.node} for graph in graphs)
        assert node in lows - floats
        weights = [{t.data_type for t in graph.initializer if len(t.dims) == 2} for graph in graphs]
        assert weights == [{onnx.TensorProto.FLOAT}, {onnx.TensorProto.INT8}]


def test_a_measured_model_corrects_what_the_table_predicts(place):
    table = read_cost_table(place / "cost.json")
    rank = next(s for s in table.by_site()["fc2"].splits if s.rank == 32)
    splits = {"fc2": (rank.form, rank.rank)}
    timing = TimedExport(table=table, source="", is_foreign=False, must_be_faster=True, dense=place, feeds={})
    assert table.predicted(splits) < 0.9
    timing.correct(splits, 0.9)
    assert timing.table.predicted(splits) == pytest.approx(0.9)
