"""The same samples from every source, through every verb that takes data."""

import json
import sys

import numpy as np
import pytest
from calibrated_nets import text_net, texts
from flows import outputs
from nets import SIZES, labelled, mlp_onnx

from rsi_deploy.cli import run
from rsi_deploy.report.schema import read_report

pa = pytest.importorskip("pyarrow", reason="needs rsi-deploy[data]")
pq = pytest.importorskip("pyarrow.parquet")

CODE = """
import numpy as np

def batches():
    data = np.load("d.npz")
    for rows in np.array_split(np.arange(len(data["labels"])), 4):
        yield data["x"][rows], data["labels"][rows]

def unlabelled():
    return [np.random.default_rng(5).standard_normal((200, {width})).astype(np.float32)]
"""
SOURCES = ["d.npz", "d.parquet", "saved", "source_of_data:batches", "two#split=test,label=kind"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "source_of_data", raising=False)
    mlp_onnx(tmp_path / "m.onnx")
    labelled(tmp_path / "d.npz", tmp_path / "m.onnx")
    (tmp_path / "source_of_data.py").write_text(CODE.format(width=SIZES[0]))
    data = np.load("d.npz")
    columns = {"x": list(data["x"]), "labels": data["labels"]}
    pq.write_table(pa.table(columns), "d.parquet", row_group_size=17)
    for folder, table in (
        ("saved", pa.table(columns)),
        (
            "two/test",
            pa.table({"kind": data["labels"], "label": np.zeros(len(data["labels"]), int), "x": columns["x"]}),
        ),
        ("two/train", pa.table(columns)),
    ):
        (tmp_path / folder).mkdir(parents=True)
        path = f"{folder}/data-00000-of-00001.arrow"
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        (tmp_path / folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return tmp_path


def result(capsys, *argv):
    assert run([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_source_gives_the_same_accuracy(here, capsys):
    found = [result(capsys, "eval", "m.onnx", "--data", source, "--batch", "7") for source in SOURCES]
    assert len({(one["top1"], one["top5"], one["samples"]) for one in found}) == 1
    assert 50 < found[0]["top1"] < 100
    limited = [result(capsys, "eval", "m.onnx", "--data", source, "--limit", "9")["top1"] for source in SOURCES]
    assert len(set(limited)) == 1


@pytest.mark.parametrize("source", SOURCES[1:])
def test_export_and_verify_take_every_source(here, capsys, source):
    argv = ["export", "m.onnx", "--rank", "6", "-o", "b", "--no-bench", "--keep-dense", "--data", source]
    assert run([*argv, "--calib", "source_of_data:unlabelled"]) == 0
    report = read_report(here / "b")
    assert (report.calibration.samples, report.calibration.check_samples) == (136, 64)
    assert report.accuracy.compressed.paired.lost >= 0
    assert report.accuracy.compressed.agreement_interval[0] < report.accuracy.compressed.agreement
    capsys.readouterr()
    assert run(["verify", "b", "--data", source, "--calib", "source_of_data:unlabelled"]) == 0
    claims = capsys.readouterr().out
    assert "holds  accuracy" in claims
    assert "holds  calibration" in claims


def test_calibration_samples_that_are_evaluated_are_refused_whatever_their_source(here, capsys):
    argv = ["export", "m.onnx", "--rank", "6", "-o", "b", "--no-bench", "--data", "d.npz"]
    assert run([*argv, "--calib", "d.parquet"]) == 2
    assert "--calib and --data share samples" in capsys.readouterr().err


def test_a_text_model_is_evaluated_with_its_mask(here, capsys):
    text_net("text.onnx")
    texts("texts.npz", seed=1)
    texts("more.npz", seed=2)
    arrays = dict(np.load("more.npz"))
    labels = outputs("text.onnx", arrays)[0].argmax(axis=1)
    np.savez("labelled.npz", **arrays, labels=labels)
    pq.write_table(pa.table({**{name: list(a) for name, a in arrays.items()}, "label": labels}), "texts.parquet")
    for source in ("labelled.npz", "texts.parquet"):
        assert result(capsys, "eval", "text.onnx", "--data", source)["top1"] == 100
    argv = ["export", "text.onnx", "--keep-params", "0.7", "-o", "t", "--no-bench", "--keep-dense"]
    # short texts of 20 words: some are in both
    assert run([*argv, "--calib", "texts.npz", "--data", "labelled.npz", "--allow-shared-data"]) == 0
    assert read_report(here / "t").accuracy.dense.top1 == 100
    capsys.readouterr()
    found = result(capsys, "eval", "t", "--reference", "text.onnx", "--data", "more.npz")
    assert (found["kind"], found["values"][0]["output"]) == ("values", "embedding")
    assert 0.5 < found["values"][0]["cosine"] < 1
    assert run(["eval", "t", "--reference", "text.onnx", "--data", "more.npz"]) == 0
    assert "distance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("source_of_data:batch", "similar names: batches"),
        ("absent.module:f", "cannot import 'absent.module'"),
        ("two", "several splits"),
        ("d.npz#split=test", "takes nothing after a #"),
        ("d.csv", "neither an .npz, .parquet or .arrow file nor a folder"),
    ],
)
def test_what_is_wrong_with_data_is_one_message(here, capsys, source, words):
    (here / "d.csv").write_text("1,2")
    for argv in (
        ["eval", "m.onnx", "--data", source],
        ["export", "m.onnx", "--rank", "6", "-o", "b", "--data", source],
        ["export", "m.onnx", "--rank", "6", "-o", "b", "--calib", source],
    ):
        assert run(argv) == 2
        err = capsys.readouterr().err
        assert words in err
        assert "Traceback" not in err
        assert not (here / "b").exists()
