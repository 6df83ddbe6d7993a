"""Calibration and budgets as a user meets them: the command line, its files, exit codes and messages."""

import json

import numpy as np
import onnx
import pytest
from calibrated_nets import IMAGE, branch_net, conv_net, inputs, logarithm_net, text_net, texts
from nets import SIZES, labelled, mlp_onnx, run_onnx

from rsi_deploy import read_report
from rsi_deploy.cli import run
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.runtime.shape_trace import trace_run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with models and data that calibration may meet."""
    monkeypatch.chdir(tmp_path)
    mlp_onnx("m.onnx", sizes=(12, 48, 48, 10))
    conv_net("conv.onnx")
    inputs("c.npz", 12, low_rank=5)
    inputs("images.npz", *IMAGE)
    return tmp_path


def export(model, *argv, calib="c.npz", output="b", code=0):
    given = ["--calib", calib] if calib else []
    assert run(["export", model, *given, *map(str, argv), "-o", output, "--no-bench", "--force"]) == code


def report_of(folder="b"):
    from pathlib import Path

    return read_report(Path(folder))


def refused(capsys, code, model, *argv, calib="c.npz"):
    """The one readable message of an export that must fail; nothing is left."""
    export(model, *argv, calib=calib, output="refused", code=code)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rsi-deploy: ")
    assert err.count("\n") == 1
    import os

    assert not [name for name in os.listdir() if "refused" in name]
    return err


def decided(report):
    """Site -> (form, rank) as the report has it."""
    return {site.name: (site.form, site.rank) for site in report.sites}


# -- budgets are kept, exactly


@pytest.mark.parametrize("share", [0.35, 0.6])
def test_parameters_and_macs_are_kept(here, capsys, share):
    export("conv.onnx", "--keep-params", share, calib="images.npz")
    report = report_of()
    assert report.compressed.params <= share * report.dense.params
    assert report.compressed.params > 0.75 * share * report.dense.params  # and made use of
    arrays = map(onnx.numpy_helper.to_array, onnx.load("b/model.onnx").graph.initializer)
    assert report.compressed.params == sum(array.size for array in arrays if array.dtype == np.float32)
    assert report.settings.budget == f"--keep-params {100 * share:g}%"
    assert report.settings.factors == "response"


@pytest.mark.parametrize("padded", [True, False])
def test_macs_are_kept_where_sizes_are_odd_too(here, padded):
    conv_net("net.onnx", padded=padded)  # without padding the strided input form costs more than its stride tells
    export("net.onnx", "--keep-macs", "50%", calib="images.npz")
    report = report_of()
    feeds = {"input": np.zeros((1, *IMAGE), np.float32)}
    assert sum(trace_run(here / "net.onnx", feeds).macs.values()) == report.dense.macs
    assert sum(trace_run(here / "b" / "model.onnx", feeds).macs.values()) == report.compressed.macs
    assert report.compressed.macs <= 0.5 * report.dense.macs
    assert report.compressed.macs == sum(site.macs_compressed for site in report.sites)


@pytest.mark.parametrize("size", [20_000, 30_001])
def test_the_file_is_no_larger_than_asked(here, size):
    export("conv.onnx", "--max-size", size, "--precision", "float32", calib="images.npz")
    assert 0.75 * size < file_bytes(here / "b" / "model.onnx") <= size
    assert report_of().compressed.bytes == (here / "b" / "model.onnx").stat().st_size


def test_ranks_are_held_to_what_was_asked(here):
    export("conv.onnx", "--keep-params", "0.6", "--rank-multiple", "4", "--min-rank", "8", calib="images.npz")
    report = report_of()
    ranks = [site.rank for site in report.split_sites]
    assert ranks
    assert all(rank % 4 == 0 and rank >= 8 for rank in ranks)
    export("conv.onnx", "--keep-params", "0.6", calib="images.npz")
    assert any(site.rank % 4 for site in report_of().split_sites)


def test_filters_are_respected(here):
    export("conv.onnx", "--keep-params", "0.7", "--exclude", "conv2", calib="images.npz")
    reasons = {site.name: site.reason for site in report_of().sites if not site.rank}
    assert reasons["conv2"] == "excluded by --exclude conv2"
    export("conv.onnx", "--keep-params", "0.7", "--include", "conv2", calib="images.npz")
    assert [site.name for site in report_of().split_sites] == ["conv2"]


@pytest.fixture
def answers(here):
    """Evaluation data for `m.onnx`: its own answers to inputs like those of the calibration data."""
    x = np.load(inputs("x.npz", 12, low_rank=5, count=300, seed=3))["x"]
    np.savez("d.npz", x=x, labels=run_onnx("m.onnx", x)[0].argmax(axis=1))
    return "d.npz"


@pytest.mark.parametrize(("factors", "drops"), [("response", (8, 40)), ("weights", (35, 60))])
def test_the_drop_is_kept_and_a_smaller_one_gives_a_larger_model(answers, factors, drops):
    kept = {}
    for drop in drops:
        export("m.onnx", "--max-drop", drop, "--data", answers, "--factors", factors)
        report = report_of()
        assert report.accuracy.dense.top1 - report.accuracy.compressed.top1 <= drop
        assert report.settings.budget == f"--max-drop {drop}"
        kept[drop] = report.compressed.params
    assert kept[drops[1]] < kept[drops[0]] < report.dense.params


def test_a_drop_that_nothing_keeps(answers, capsys):
    err = refused(capsys, 4, "m.onnx", "--max-drop", 0, "--data", answers, "--include", "head", "--factors", "weights")
    assert "--max-drop 0: no compressed model keeps it; the least drop seen is" in err


# -- what calibration is good for


def test_fitted_factors_beat_plain_ones(here):
    export("m.onnx", "--rank", "25%")
    fitted = report_of()
    export("m.onnx", "--rank", "25%", "--factors", "weights")
    plain = report_of()
    assert decided(fitted) == decided(plain)
    assert fitted.calibration.quality.output_error < 0.5 * plain.calibration.quality.output_error
    assert (fitted.settings.factors, plain.settings.factors) == ("response", "weights")
    assert all(site.response_error is not None and site.normalized_error is None for site in fitted.split_sites)
    assert all(site.response_error is None and site.normalized_error is not None for site in plain.split_sites)
    held_out = np.load(inputs("other.npz", 12, low_rank=5, seed=7))["x"]
    export("m.onnx", "--rank", "25%", output="f")
    errors = [np.linalg.norm(run_onnx(f"{b}/model.onnx", held_out)[0] - run_onnx("m.onnx", held_out)[0]) for b in "fb"]
    assert errors[0] < 0.7 * errors[1]


def test_factors_of_the_weights_under_a_budget(here):
    export("m.onnx", "--keep-params", "0.5", "--factors", "weights")
    report = report_of()
    assert report.compressed.params <= 0.5 * report.dense.params
    assert report.split_sites
    assert all(site.response_error is None for site in report.split_sites)
    assert report.calibration.quality.output_error > 0


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(here):
    for output, seed in (("b", 0), ("c", 0), ("d", 1)):
        export("conv.onnx", "--keep-macs", "0.5", "--seed", seed, calib="images.npz", output=output)
    b, c, d = ((here / folder / "model.onnx").read_bytes() for folder in "bcd")
    assert b == c
    assert b != d


def test_a_text_model_with_two_inputs_and_a_mask(here, capsys):
    text_net("text.onnx")
    texts("texts.npz")
    export("text.onnx", "--keep-params", "0.7", calib="texts.npz")
    report = report_of()
    assert [site.name for site in report.split_sites]
    assert report.calibration.quality.divergence is None  # unit vectors are no class scores
    assert report.calibration.quality.output_error < 0.5
    capsys.readouterr()
    np.savez("half.npz", ids=np.load("texts.npz")["ids"])
    err = refused(capsys, 2, "text.onnx", "--keep-params", "0.7", calib="half.npz")
    assert "the model has the inputs ids, attention_mask, but the data hold ids" in err
    assert "give an .npz with one array for each of them" in err


# -- plans


def test_a_plan_is_written_edited_and_done_exactly(here, capsys):
    export("conv.onnx", "--keep-params", "0.5", calib="images.npz")
    first = report_of()
    plan = json.loads((here / "b" / "plan.json").read_text())
    assert {name: (s["form"], s.get("rank")) for name, s in plan["sites"].items()} == {
        name: (form or "dense", rank) for name, (form, rank) in decided(first).items()
    }
    export("conv.onnx", "--plan", "b/plan.json", calib="images.npz", output="again")
    assert decided(report_of("again")) == decided(first)
    again, before = (run_onnx(f"{b}/model.onnx", np.ones((2, *IMAGE), np.float32))[0] for b in ("again", "b"))
    np.testing.assert_array_equal(again, before)
    plan["sites"]["conv2"] = {"form": "separable", "rank": 5}
    plan["sites"]["grouped"] = {"form": "dense"}
    plan["sites"]["head"] = {"form": "gemm", "rank": 4}
    del plan["sites"]["conv1"]
    (here / "mine.json").write_text(json.dumps(plan))
    for calib in ("images.npz", None):
        export("conv.onnx", "--plan", "mine.json", calib=calib, output="mine")
        report = report_of("mine")
        assert decided(report) == {
            "conv1": (None, None), "conv2": ("separable", 5), "grouped": (None, None), "head": ("gemm", 4)
        }  # fmt: skip
        reasons = {site.name: site.reason for site in report.sites}
        assert (reasons["conv1"], reasons["grouped"]) == ("not in the plan", "as the plan says")
        assert report.settings.budget == "--plan mine.json"
        assert run(["verify", "mine"]) == 0


def test_filters_hold_under_a_plan_too(here):
    (here / "p.json").write_text(
        json.dumps({"schema_version": 1, "tool": "", "sites": {n: {"form": "gemm", "rank": 4} for n in ("fc1", "fc2")}})
    )
    export("m.onnx", "--plan", "p.json", "--exclude", "fc1")
    assert decided(report_of())["fc1"] == (None, None)
    assert decided(report_of())["fc2"] == ("gemm", 4)


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ({"fc9": {"form": "gemm", "rank": 4}}, "site 'fc9' is not in the model (similar names: fc"),
        ({"fc1": {"form": "gemm", "rank": 13}}, "site 'fc1' cannot have rank 13 as \"gemm\"; possible are "),
        ({"fc1": {"form": "separable", "rank": 2}}, "site 'fc1' cannot have the form \"separable\""),
        ({"fc1": {"form": "gemm"}}, 'form "gemm" needs a rank'),
    ],
)
def test_plans_that_do_not_fit(here, capsys, sites, words):
    (here / "p.json").write_text(json.dumps({"schema_version": 1, "tool": "", "sites": sites}))
    for calib in ("c.npz", None):
        assert words in refused(capsys, 2, "m.onnx", "--plan", "p.json", calib=calib)


# -- sites that calibration cannot see


@pytest.mark.parametrize("asked", [("--rank", "25%"), ("--keep-params", "0.8", "--allow-broken")])
def test_a_site_in_a_branch_stays_dense_and_it_is_said(here, capsys, asked):
    branch_net("branch.onnx")
    inputs("x.npz", 16)
    export("branch.onnx", *asked, calib="x.npz")
    report = report_of()
    reasons = {site.name: site.reason for site in report.sites if not site.rank}
    assert reasons.keys() >= {"yes", "no"}
    assert reasons["yes"] == "it stands in a subgraph or function, which calibration cannot observe"
    assert any(note.startswith("not calibrated: no, yes (it stands in a subgraph") for note in report.notes)
    assert report.split_sites
    assert "not calibrated: no, yes" in " ".join(capsys.readouterr().out.split())


def test_nothing_in_reach(here, capsys):
    branch_net("branch.onnx")
    inputs("x.npz", 16)
    err = refused(capsys, 3, "branch.onnx", "--rank", "25%", "--include", "yes", calib="x.npz")
    assert "calibration reaches no site: yes (it stands in a subgraph" in err


def test_nan_names_the_site(here, capsys):
    logarithm_net("log.onnx")
    inputs("x.npz", 16)
    err = refused(capsys, 3, "log.onnx", "--rank", "25%", calib="x.npz")
    assert "site 'fc2': its inputs on the calibration data hold NaN or infinite values" in err
    assert "--exclude 'fc2'" in err
    export("log.onnx", "--rank", "25%", "--exclude", "fc2", calib="x.npz")
    assert [site.name for site in report_of().split_sites] == ["fc1"]


def test_constant_inputs_are_said(here, capsys):
    np.savez("constant.npz", x=np.ones((40, 12), np.float32))
    np.savez("one.npz", x=np.random.default_rng(0).standard_normal((1, 12)).astype(np.float32))
    for calib in ("constant.npz", "one.npz"):
        err = refused(capsys, 3, "m.onnx", "--rank", "25%", calib=calib)
        assert "its inputs do not vary on the calibration data (fc1, fc2, head)" in err
        assert "no plan can meet" in refused(capsys, 3, "m.onnx", "--keep-params", "0.5", calib=calib)


def test_too_few_samples_are_said_with_how_many_would_do(here):
    np.savez("few.npz", x=np.load("c.npz")["x"][:20])
    export("m.onnx", "--rank", "25%", calib="few.npz")
    (note,) = report_of().notes
    assert (
        "16 samples of the fit give 3 sites fewer than 4 rows an input (fc2: 16 rows for 48); about 256 samples" in note
    )
    export("m.onnx", "--rank", "25%", "--calib-size", "20")
    assert "20 samples of the fit (--calib-size; there are 200) give" in report_of().notes[0]
    inputs("more.npz", 12, count=256)
    export("m.onnx", "--rank", "25%", calib="more.npz")
    assert report_of().notes == ()


def test_a_model_that_only_its_fit_part_likes_is_not_praised(here, capsys):
    """A wide head fitted to 24 samples of its own kind, checked on others."""
    mlp_onnx("wide.onnx", sizes=(300, 10))
    inputs("fit.npz", 300, count=24)
    inputs("new.npz", 300, count=200, seed=5)
    export("wide.onnx", "--rank", "3", "--calib-check", "new.npz", calib="fit.npz")
    report = report_of()
    assert report.calibration.checked.is_broken
    assert report.calibration.in_sample.agreement > report.calibration.checked.agreement + 10
    out = capsys.readouterr().out
    assert "verdict: the outputs are broken" in out
    assert (here / "b" / "README.md").read_text().count("the outputs are broken") == 1
    assert "The outputs are broken" in (here / "b" / "report.html").read_text()
    export("wide.onnx", "--rank", "3", calib="fit.npz", output="c")
    assert report_of("c").calibration.needed == 128
    out = capsys.readouterr().out
    assert "too few samples for a verdict" in out
    assert "128" in out
    one = np.load("fit.npz")["x"][:1]
    np.savez("one.npz", x=one)
    export("wide.onnx", "--rank", "3", "--factors", "weights", calib="one.npz", output="d")
    assert "no check part" in capsys.readouterr().out


# -- requests that cannot be meant


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--keep-params 0.5", "--keep-params is planned on calibration data: add --calib DATA"),
        ("--max-size 20kB", "--max-size is planned on calibration data: add --calib DATA"),
        ("--max-drop 1 --data d.npz", "--max-drop is planned on calibration data: add --calib DATA"),
        ("--max-drop 1 --calib c.npz", "--max-drop is measured on labelled data: add --data DATA"),
        ("--max-drop 101 --calib c.npz --data d.npz", "--max-drop must be at most 100, but got 101"),
        ("--keep-params 0.5 --keep-macs 0.5 --calib c.npz", "but got --keep-params and --keep-macs"),
        ("--keep-params 0.5 --rank 4 --calib c.npz", "but got --rank and --keep-params; type for example --rank 25%"),
        ("--plan p.json --rank 4", "but got --rank and --plan"),
        ("--keep-params 50 --calib c.npz", "write --keep-params 50%"),
        ("--max-size 20XB --calib c.npz", "--max-size takes a size in B, kB, MB"),
        ("--rank 4 --calib nowhere.npz", "--calib: nowhere.npz does not exist; expected an .npz"),
        ("--rank 4 --calib m.onnx", "--calib: m.onnx is neither an .npz, .parquet or .arrow file nor a folder"),
        ("--rank 4 --calib wide.npz", "takes input: float32 (batch, 12), but the data are float32 (samples, 13)"),
        ("--rank 4 --calib whole.npz", "--calib: the model takes input: float32 (batch, 12), but the data are int64"),
        ("--rank 4 --calib pictures.npz", "8-bit pictures need a preprocessing"),
        ("--rank 4 --calib nan.npz", "--calib: the data for input have NaN; remove those samples"),
        ("--rank 4 --calib other.npz", "has the input input, but the data hold rows, columns; give data with"),
        ("--rank 4 --calib empty.npz", "has no samples"),
        ("--rank 4 --calib-check c.npz", "--calib-check goes with --calib: add --calib DATA"),
        ("--rank 4 --calib c.npz --calib-check nowhere.npz", "--calib-check: nowhere.npz does not exist"),
        ("--rank 4 --calib c.npz --calib-check wide.npz", "--calib-check: the model takes input: float32 (batch, 12)"),
        ("--rank 4 --calib c.npz --calib-check empty.npz", "--calib-check: "),
        ("--rank 4 --calib c.npz --calib-check c.npz", "--calib-check and --calib share samples (200 of 200"),
        ("--rank 4 --calib c.npz --check-size 0", "--check-size must be at least 1"),
        ("--rank 49 --calib c.npz", "--rank 49 is above the full rank of every site"),
        ("--rank 4 --calib c.npz --exclude nothing", "--exclude 'nothing' matches none of the 3 sites"),
        ("--keep-params 0.5 --calib c.npz --exclude nothing", "--exclude 'nothing' matches none of the 3 sites"),
        ("--keep-params 0.5 --calib c.npz --always-split", "--always-split goes with --rank alone"),
        ("--rank 4 --min-rank 2", "--min-rank holds ranks that a budget chooses, but got --rank"),
        ("--rank 4 --rank-multiple 8", "--rank-multiple holds ranks that a budget chooses"),
        ("--plan nowhere.json", "cannot read the plan nowhere.json"),
        ("--rank 4 --calib c.npz --data d.npz", "--calib and --data share samples (60 of 60 evaluation samples"),
        ("--rank 4 --calib c.npz --data one.npz", "--calib and --data share samples (1 of 60 evaluation samples"),
        ("--keep-params 0.5 --calib c.npz --data d.npz", "add --allow-shared-data"),
    ],
)  # fmt: skip
def test_usage_errors(here, capsys, argv, words):
    x = np.load("c.npz")["x"]
    labels = np.arange(60) % 10
    np.savez("d.npz", x=x[:60], labels=labels)
    other = np.random.default_rng(5).standard_normal((60, 12)).astype(np.float32)
    other[40] = x[199]
    np.savez("one.npz", x=other, labels=labels)
    np.savez("wide.npz", x=np.ones((64, 13), np.float32))
    np.savez("whole.npz", x=np.ones((64, 12), np.int64))
    np.savez("pictures.npz", images=np.ones((64, 3, 4), np.uint8))
    np.savez("nan.npz", x=np.where(np.arange(12) == 3, np.nan, x))
    np.savez("other.npz", rows=x, columns=x)
    np.savez("empty.npz", x=x[:0])
    (here / "p.json").write_text('{"schema_version": 1, "tool": "", "sites": {}}')
    assert words in refused(capsys, 2, "m.onnx", *argv.split(), calib=None)


def test_shared_data_where_they_are_allowed(here):
    np.savez("d.npz", x=np.load("c.npz")["x"][:60], labels=np.arange(60) % 10)
    export("m.onnx", "--rank", "25%", "--data", "d.npz", "--allow-shared-data")
    assert report_of().accuracy is not None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--keep-params 1%", "no plan can meet --keep-params 1% (34 of 3,466 parameters): the smallest comes to"),
        ("--keep-macs 0.01", "type --keep-macs "),
        ("--max-size 100B", "no plan can meet --max-size 100B (100 bytes): the smallest comes to"),
        ("--keep-params 100%", "--keep-params 100%: the dense model keeps it (3,466 params); type a smaller budget"),
        ("--keep-params 0.5 --rank-multiple 64", "or let more sites be split"),
    ],
)
def test_budgets_that_no_plan_meets(here, capsys, argv, words):
    assert words in refused(capsys, 3, "m.onnx", *argv.split())


def test_what_the_message_says_to_type_can_be_met(here, capsys):
    import re

    for asked in ("--keep-params", "--keep-macs", "--max-size"):
        capsys.readouterr()
        err = refused(capsys, 3, "m.onnx", asked, "0.001" if asked != "--max-size" else "10B")
        nearest = re.search(rf"type {asked} (\S+) or more", err)[1]
        export("m.onnx", asked, nearest)
        assert report_of().settings.budget.startswith(asked)
        assert any(site.rank for site in report_of().sites) or report_of().precision.bits


def test_the_terminal_tells_forms_losses_and_the_certificate(here, capsys):
    data = labelled("d.npz", mlp_onnx("net.onnx"), count=300, seed=2)
    inputs("calib.npz", SIZES[0])
    export("net.onnx", "--rank", "25%", "--data", data, calib="calib.npz")
    out = capsys.readouterr().out
    assert "response" in out
    assert "in-sample" in out
    assert "top-1 unchanged for at least " in out
    assert "normalized spectral error" not in out
    card = (here / "b" / "README.md").read_text()
    assert "rank 25%, fitted to calibration data, seed 0" in card
    assert "response" in card
    assert "check part | in-sample |" in card
    assert "| samples | 64 | 136 |" in card
    export("conv.onnx", "--keep-macs", "0.5", calib="images.npz")
    out = capsys.readouterr().out
    assert "Conv input" in out or "Conv separable" in out or "Conv channel" in out
    assert "split: loss " in out
    assert "Loss: estimated change of the model's outputs" in out
    assert "(rsi, q = 4, --keep-macs 50%, fitted" in (here / "b" / "README.md").read_text()
