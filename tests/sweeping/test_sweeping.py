"""Sweeps: one calibration for all points, gone on with after an interruption, and every point a bundle."""

import html
import json

import numpy as np
import pytest
from nets import SIZES, mlp_onnx, run_onnx
from sweeps import filled, swept

import rsi_deploy
from rsi_deploy.cli import run
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.exporting.run import ExportRun
from rsi_deploy.io.manifest import write_manifest
from rsi_deploy.onnx_models.calibration import activations as onnx_streams
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.precision.quantizers import quantize
from rsi_deploy.precision.schemes import DYNAMIC
from rsi_deploy.report.pages.html import source_of
from rsi_deploy.report.pages.sweep import COLUMNS, sweep_page, sweep_rows
from rsi_deploy.report.sweep_schema import Sweep, SweepPoint, deliver, read_sweep
from rsi_deploy.sweeping import side_by_side
from rsi_deploy.verifying.api import verify


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def done(place):
    swept(place, place / "s")
    return place / "s"


def test_every_point_is_a_bundle_within_its_share(done):
    document = read_sweep(done)
    assert [point.share for point in document.points] == [0.9, 0.65, 0.4]
    assert document.is_done
    for point in document.points:
        assert point.size.macs <= point.share * document.dense.macs
        assert all(claim.status != "broken" for claim in verify(done / point.folder).claims)
    macs = [point.size.macs for point in document.points]
    assert macs == sorted(macs, reverse=True)
    assert not (done / "work").exists()


def test_a_point_is_what_an_export_of_its_share_would_be(place, done, tmp_path):
    options = {"calib": place / "c.npz", "calib_size": 512, "keep_macs": 0.65, "measure": False}
    alone = rsi_deploy.export(str(place / "m.onnx"), tmp_path / "b", **options)
    point = rsi_deploy.read_report(done / "point-02")
    assert [(s.name, s.form, s.rank) for s in alone.sites] == [(s.name, s.form, s.rank) for s in point.sites]


def test_later_points_ask_no_gradients_again_and_are_fitted_the_same(place, done, tmp_path, monkeypatch):
    asked, ask = [], onnx_streams.output_sensitivities

    def counted(*args, **options):
        asked.append(1)
        return ask(*args, **options)

    monkeypatch.setattr(onnx_streams, "output_sensitivities", counted)
    swept(place, tmp_path / "s")
    assert len(asked) == 1
    alone = {"calib": place / "c.npz", "keep_macs": 0.4, "measure": False}
    rsi_deploy.export(str(place / "m.onnx"), tmp_path / "b", **alone)
    x = np.random.default_rng(0).standard_normal((4, SIZES[0])).astype(np.float32)
    point, apart = (run_onnx(folder / "model.onnx", x)[0] for folder in (tmp_path / "s" / "point-03", tmp_path / "b"))
    np.testing.assert_array_equal(point, apart)
    other = run_onnx(tmp_path / "s" / "point-02" / "model.onnx", x)[0]
    assert not np.allclose(other, apart, rtol=1e-3)


def test_a_sweep_is_verified_by_its_points(done, capsys):
    assert run(["verify", str(done)]) == 2
    said = capsys.readouterr().err
    point = said.strip().rpartition("rsi-deploy verify ")[2]
    assert point == str(done / "point-01")
    assert run(["verify", point]) == 0


def test_recipes_make_a_point_and_the_sweep_again(place, done, tmp_path, capsys):
    again = ["export", "--recipe", str(done / "point-02" / "recipe.toml"), "-o", str(tmp_path / "b")]
    assert run(again) == 0
    assert (tmp_path / "b" / "model.onnx").read_bytes() == (done / "point-02" / "model.onnx").read_bytes()
    capsys.readouterr()
    assert run(["sweep", "--recipe", str(done / "recipe.toml"), "--points", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "points = 2" in out
    assert "# Nothing was done yet. Shares of the macs: 90.0%, 40.0%" in out
    assert run(["sweep", "--recipe", str(done / "recipe.toml"), "-o", str(done)]) == 0  # done already: shown again


def test_the_page_is_of_the_document(done):
    import hashlib

    assert source_of(done / "report.html") == hashlib.sha256((done / "sweep.json").read_bytes()).hexdigest()
    page = (done / "report.html").read_text()
    assert "Quality over MACs a sample" in page
    assert "<svg" in page


def test_a_point_is_delivered(done, tmp_path):
    report = deliver(done, 2, tmp_path / "b")
    assert (tmp_path / "b" / "model.onnx").read_bytes() == (done / "point-02" / "model.onnx").read_bytes()
    assert report == rsi_deploy.read_report(tmp_path / "b")
    argv = ["export", "--from-sweep", str(done), "--point", "2", "--json", "-o", str(tmp_path / "c")]
    assert run(argv) == 0
    assert run(argv) == 2
    assert run([*argv, "--force"]) == 0
    with pytest.raises(UsageError, match="is not empty"):
        deliver(done, 2, tmp_path / "b")


def test_a_point_that_was_tampered_with_is_not_delivered(place, tmp_path):
    swept(place, tmp_path / "s", points=2)
    model = tmp_path / "s" / "point-01" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="does not have the hash in its report"):
        deliver(tmp_path / "s", 1, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--from-sweep", "S", "--point", "9"], "--point 9: the sweep in S has points 1, 2, 3"),
        (["--from-sweep", "S"], "go together"),
        (["--point", "1"], "go together"),
        (["m.onnx", "--from-sweep", "S", "--point", "1"], "leave out MODEL"),
        (["--from-sweep", "nowhere", "--point", "1"], "is no sweep"),
        (["--rank", "4"], "export takes a MODEL"),
        (["--from-sweep", "S", "--point", "2", "--keep-macs", "0.5"], "--keep-macs cannot change; leave"),
        (["--from-sweep", "S", "--point", "2", "--no-bench"], "--no-bench cannot"),
        (["--from-sweep", "S", "--point", "2", "--dry-run"], "leave out --dry-run"),
    ],
)
def test_what_cannot_be_delivered(done, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "S").symlink_to(done)
    assert run(["export", *argv, "-o", "b"]) == 2
    assert words in capsys.readouterr().err


def test_an_interrupted_sweep_goes_on_and_calibrates_no_second_time(place, tmp_path, monkeypatch):
    made, calls = ExportRun.write_bundle, []
    surveyed, options_of = [], Calibration.options

    def interrupted(run, output, **options):
        calls.append(run.request.budget.keep_macs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(run, output, **options)

    def counted(self, *args):
        surveyed.append(1)
        return options_of(self, *args)

    monkeypatch.setattr(Calibration, "options", counted)
    monkeypatch.setattr(ExportRun, "write_bundle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(place, tmp_path / "s")
    half = read_sweep(tmp_path / "s")
    assert [point.number for point in half.points] == [1]
    assert "unfinished: 1 of 3 points" in (tmp_path / "s" / "report.html").read_text()
    before = (tmp_path / "s" / "point-01" / "model.onnx").stat().st_mtime_ns
    whole = swept(place, tmp_path / "s")
    assert calls == [0.9, 0.65, 0.65, 0.4]
    assert len(whole.points) == 3
    assert (tmp_path / "s" / "point-01" / "model.onnx").stat().st_mtime_ns == before
    assert len(surveyed) == 1


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_interrupt_says_what_is_kept_and_how_to_go_on(place, tmp_path, monkeypatch, capsys, force):
    made, calls = ExportRun.write_bundle, []

    def interrupted(run, output, **options):
        calls.append(output)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(run, output, **options)

    monkeypatch.setattr(ExportRun, "write_bundle", interrupted)
    argv = ["sweep", str(place / "m.onnx"), "--calib", str(place / "c.npz"), "-o", str(tmp_path / "s"), "--no-bench"]
    argv += ["--points", "3", "--highest", "0.9", "--lowest", "0.4"]
    assert run([*argv, *force]) == 130
    said = capsys.readouterr().err
    assert f"{tmp_path / 's'} keeps 1 of 3 points and the calibration" in said
    assert "nothing partial" not in said
    assert ("without --force" in said) is bool(force)
    before = (tmp_path / "s" / "point-01" / "model.onnx").stat().st_mtime_ns
    assert run(argv) == 0
    assert (tmp_path / "s" / "point-01" / "model.onnx").stat().st_mtime_ns == before


@pytest.mark.parametrize("fits", [True, False])
def test_times_of_all_points_are_of_one_run(place, tmp_path, monkeypatch, fits):
    """A point's report has its own minute's time; the sweep's are measured together where memory lets it."""
    if not fits:
        monkeypatch.setattr(side_by_side, "MEMORY_SHARE", 0.0)
    document = swept(place, tmp_path / "s", points=2, measure=True, bench_seconds=0.2, allow_slower=True)
    assert document == read_sweep(tmp_path / "s")
    assert document.side_by_side is fits
    own = [rsi_deploy.read_report(tmp_path / "s" / point.folder).latency.arms[1] for point in document.points]
    for point, arm in zip(document.points, own, strict=True):
        assert point.latency_ms > 0
        assert ((point.latency_ms, point.speedup) == (arm.median_ms, arm.speedup)) is not fits
    words = "in one run" if fits else "in its own run"
    assert words in (tmp_path / "s" / "report.html").read_text()


def test_what_a_sweep_found_before_its_first_point_is_not_taken_for_other_data(place, tmp_path, monkeypatch):
    folder, made = filled(tmp_path), ExportRun.write_bundle

    def interrupted(*args, **options):
        made(*args, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExportRun, "write_bundle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            swept(folder, folder / "s", points=2)
    assert (folder / "s" / "work" / "options.json").exists()
    assert not (folder / "s" / "sweep.json").exists()
    x = 3 * np.random.default_rng(8).standard_normal((128, SIZES[0])).astype(np.float32) * np.arange(1, SIZES[0] + 1)
    np.savez(folder / "c.npz", x=x.astype(np.float32))
    swept(folder, folder / "s", points=2)
    swept(folder, folder / "fresh", points=2)
    found, fresh = ((folder / name / "point-02" / "model.onnx").read_bytes() for name in ("s", "fresh"))
    assert found == fresh
    np.savez(folder / "c.npz", x=x.astype(np.float32)[:64])
    with pytest.raises(UsageError, match="other settings"):
        swept(folder, folder / "s", points=2)


def test_force_begins_anew_and_never_over_an_input(place, tmp_path):
    folder = filled(tmp_path)
    swept(folder, folder / "s", points=2)
    (folder / "s" / "mine.npz").write_bytes((folder / "c.npz").read_bytes())
    with pytest.raises(UsageError, match="--force would remove it"):
        rsi_deploy.sweep(str(folder / "m.onnx"), folder / "s", calib=folder / "s" / "mine.npz", force=True)
    with pytest.raises(UsageError, match="no such file"):  # found before anything is removed
        rsi_deploy.sweep(str(folder / "none.onnx"), folder / "s", calib=folder / "c.npz", force=True)
    assert len(read_sweep(folder / "s").points) == 2
    swept(folder, folder / "s", points=3, force=True)
    assert sorted(path.name for path in (folder / "s").iterdir()) == [
        "point-01",
        "point-02",
        "point-03",
        "recipe.toml",
        "report.html",
        "sweep.json",
    ]


def test_another_sweep_is_not_gone_on_with(place, done, tmp_path):
    for other, words in [
        ({"points": 4}, "other shares"),
        ({"seed": 1}, "other settings"),
        ({"by": "params"}, "other by"),
    ]:
        with pytest.raises(UsageError, match=words):
            swept(place, done, **other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="did not write it"):
        swept(place, tmp_path / "full", force=True)
    write_manifest(tmp_path / "full")  # now it is a bundle
    with pytest.raises(UsageError, match="holds no sweep"):
        swept(place, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").exists()


def test_a_share_that_no_plan_reaches_is_a_point_with_its_reason(place, tmp_path):
    document = swept(place, tmp_path / "s", points=2, lowest=0.01)
    assert document.points[0].size is not None
    assert "no plan can meet" in document.points[1].problem
    with pytest.raises(UsageError, match="there is no such model: no plan can meet"):
        deliver(tmp_path / "s", 2, tmp_path / "b")
    with pytest.raises(ModelError, match="no plan can meet"):
        swept(place, tmp_path / "t", points=2, highest=0.02, lowest=0.01)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "the file: Invalid JSON"),
        (b"\xff", "the file: 'utf-8' codec"),
        (b'{"schema_version": 2}', "schema_version: Input should be 1"),
    ],
)
def test_a_damaged_document_is_named(tmp_path, content, words):
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"sweep\.json is no sweep of schema version 1: {words}.*; make it again"):
        read_sweep(tmp_path)


def test_one_point_is_no_sweep(place, tmp_path):
    with pytest.raises(UsageError, match="--points must be at least 2, but got 1"):
        swept(place, tmp_path / "s", points=1)
    assert not (tmp_path / "s").exists()


def test_fronts_hold_what_nothing_beats(done):
    def point(number, macs, top1, speedup):
        size = Size(bytes=macs * 4, params=macs, macs=macs)
        return SweepPoint(number=number, share=0.5, size=size, top1=top1, speedup=speedup)

    base = read_sweep(done)
    points = (point(1, 90, 95.0, 1.1), point(2, 70, 95.5, 1.05), point(3, 50, 90.0, 2.0), point(4, 60, 89.0, 1.9))
    made = Sweep.model_validate(base.model_dump() | {"points": [p.model_dump() for p in points]})
    assert [p.number for p in made.front("macs")] == [3, 2]
    assert [p.number for p in made.front("time")] == [3, 1, 2]


def test_a_rival_is_on_the_front_where_it_is_better(done):
    def point(number, count, agreement):
        size = Size(bytes=count, params=count, macs=count)
        return SweepPoint(number=number, share=0.5, precision=f"model {number}", size=size, agreement=agreement)

    def front(rival):
        base, points = read_sweep(done), (point(1, 90, 99.0), point(2, 50, 90.0))
        found = base.model_copy(update={"points": points, "rivals": (rival,), "dense_top1": None}).front("bytes")
        return [point.number for point in found]

    assert front(point(0, 40, 95.0)) == [0, 1]
    assert front(point(0, 60, 85.0)) == [2, 1]


def test_a_rival_that_points_deliver_is_shown_once(done):
    def point(number, name):
        size = Size(bytes=50, params=50, macs=50)
        return SweepPoint(number=number, share=0.5, precision=name, size=size, agreement=95.0)

    theirs, other = "onnxruntime's dynamic int8", "onnxruntime's static int8 (minmax)"
    update = {"points": (point(1, "low rank"), point(2, theirs)), "rivals": (point(0, theirs), point(0, other))}
    sweep = read_sweep(done).model_copy(update={**update, "dense_top1": None})
    rows = {row[1]: row[0] for row in sweep_rows(sweep)[1:]}
    assert len(sweep_rows(sweep)) == 1 + 3
    assert rows == {"low rank": "1", theirs: "2, rival", other: "rival"}
    assert "point 2, rival" in sweep_page(sweep, "")
    assert len(sweep.comparable) == 3


def replace_top1(sweep, name, top1):
    """The sweep with another top-1 of a rival."""
    rivals = [r.model_copy(update={"top1": top1}) if r.precision == name else r for r in sweep.rivals]
    return sweep.model_copy(update={"rivals": tuple(rivals)})


@pytest.mark.filterwarnings("ignore:.*tensor")
def test_a_sweep_of_bytes_chooses_bits_and_shows_rivals(place, tmp_path):
    made = swept(place, tmp_path / "s", by="size", points=2, highest=0.8, lowest=0.5)
    assert all(point.size.bytes <= point.share * made.dense.bytes for point in made.points)
    reports = [rsi_deploy.read_report(tmp_path / "s" / f"point-0{number}") for number in (1, 2)]
    rivals = [point for point in reports[0].precision.points if point.is_rival and point.name != "dense"]
    assert [rival.precision for rival in made.rivals] == [rival.name for rival in rivals]
    assert [rival.size.bytes for rival in made.rivals] == [rival.bytes for rival in rivals]
    dense, *rows = sweep_rows(made)
    quality = COLUMNS.index("#quality")
    assert dense[0] == "dense"
    assert float(dense[quality]) == pytest.approx(made.dense_top1, abs=0.01)
    quantize(place / "m.onnx", tmp_path / "q.onnx", DYNAMIC)
    data = np.load(place / "d.npz")
    right = run_onnx(tmp_path / "q.onnx", data["x"])[0].argmax(1) == data["labels"]
    (rival,) = (rival for rival in made.rivals if "dynamic int8" in rival.precision)
    assert rival.top1 == pytest.approx(100 * right.mean())
    assert rival.top1 != pytest.approx(rival.agreement), "agreement is no top-1"
    shown = [float(row[quality]) for row in rows if row[1] == rival.precision]
    assert shown == [pytest.approx(rival.top1, abs=0.01)] * len(shown) != []
    others = replace_top1(made, rival.precision, None)
    assert rival.precision not in [point.precision for point in others.comparable]
    page = html.unescape((tmp_path / "s" / "report.html").read_text())
    assert all(rival.precision in page for rival in made.rivals)
    alone = {"calib": place / "c.npz", "calib_size": 512, "max_size": int(0.5 * made.dense.bytes), "measure": False}
    rsi_deploy.export(str(place / "m.onnx"), tmp_path / "b", **alone)
    model, apart = (folder / "model.onnx" for folder in (tmp_path / "s" / "point-02", tmp_path / "b"))
    assert model.read_bytes() == apart.read_bytes(), "what the first point has found changes nothing"


def test_the_verb(place, tmp_path, capsys):
    argv = ["sweep", str(place / "m.onnx"), "--calib", str(place / "c.npz"), "-o", str(tmp_path / "s"), "--no-bench"]
    argv.append("--allow-larger")  # at 95 % of so few numbers
    assert run([*argv, "--points", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["points"]) == 2
    assert document["points"][0]["agreement"] > 50
    assert run([*argv, "--points", "2"]) == 0  # done already: shown again
    assert "quality: equal top-1 answers" in capsys.readouterr().out
    assert run([*argv, "--points", "2", "--lowest", "0.99"]) == 2


def test_the_shape_of_a_torch_model_is_no_fault_of_its_points(tmp_path):
    dense = mlp_onnx(tmp_path / "m.onnx")  # its batch alone is open
    for texts, shapes in (("1x12",), {}), (("input=1x12",), {"input": (1, 12)}):
        config = ExportConfig.of(None, input_shape=texts)
        assert side_by_side._shapes(tmp_path, dense, config) == shapes
