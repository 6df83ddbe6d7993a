"""In every verb a note names the resize and crop stored in a model, and options turn them off."""

import inspect

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import cli, evaluate, export, profile, sweep
from rsi_deploy.cli.bench import bench
from rsi_deploy.cli.evaluate import evaluate_verb
from rsi_deploy.cli.export import export as export_verb
from rsi_deploy.cli.profile import profile as profile_verb
from rsi_deploy.cli.sweep import sweep as sweep_verb
from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.model_pictures import preset_note
from rsi_deploy.data.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.evaluation.accuracy import evaluate_all
from rsi_deploy.exporting.timing.profile import write_dense

SIDE, CLASSES = 8, 6
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((SIDE * SIDE, CLASSES)).astype(np.float32)
PRESET = Preprocessing(resize=10, crop=(SIDE, SIDE), mean=(0.4,), std=(0.25,))
OFF = Preprocessing(resize=None, crop=None)
NONE = ("--resize", "none", "--crop", "none")


def images(count=40, side=SIDE, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), np.uint8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Write a linear model of gray pictures with stored preprocessing, and data that it classifies right without it."""
    monkeypatch.chdir(tmp_path)
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "weight"], ["y"])]
    takes = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, SIDE, SIDE])
    gives = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])
    graph = helper.make_graph(nodes, "g", [takes], [gives], [numpy_helper.from_array(WEIGHT, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, "bare.onnx")
    helper.set_model_props(model, {METADATA_KEY: PRESET.to_metadata()})
    onnx.save(model, "m.onnx")
    inputs = OFF.over(PRESET).apply(images()[..., None])
    np.savez("d.npz", images=images(), labels=(inputs.reshape(40, -1) @ WEIGHT).argmax(axis=1))
    np.savez("c.npz", images=images(64, seed=2))
    np.savez("large.npz", images=images(side=12), labels=np.arange(40) % CLASSES)
    return tmp_path


def noted(notes, *words):
    return any(all(word in note for word in words) for note in notes)


def test_stored_steps_are_noted_and_can_be_turned_off(here):
    found = evaluate("m.onnx", "d.npz")
    assert found.top1 < 100
    assert noted(found.notes, "the preprocessing of m.onnx", "shorter side to 10", "centre 8 x 8", " ".join(NONE))
    assert noted(found.notes, "every picture already had the size", " ".join(NONE))
    off = evaluate("m.onnx", "d.npz", preprocessing=OFF)
    assert (off.top1, off.notes) == (100, ())
    assert "0.4" in off.preprocessing, "the model's own mean is still subtracted"
    assert evaluate("m.onnx", "d.npz", preprocessing=Preprocessing(resize=None)).top1 == 100


def test_the_note_does_not_claim_a_wrong_size(here):
    found = evaluate("m.onnx", "large.npz")
    assert noted(found.notes, "the preprocessing of m.onnx")
    assert not noted(found.notes, "already")


def test_stored_steps_that_change_no_size_have_no_note(here):
    steps = Preprocessing(resize=None, crop=(SIDE, SIDE), mean=(0.5,), std=(0.5,))
    assert not evaluate("bare.onnx", "d.npz", preprocessing=steps).notes
    assert not evaluate("bare.onnx", "d.npz", preprocessing=Preprocessing(resize=SIDE)).notes


def test_options_are_no_stored_steps():
    assert preset_note(PRESET, None, "m")[0].endswith("--resize none --crop none turns it off")
    (crop,) = preset_note(Preprocessing(resize=9).over(PRESET), Preprocessing(resize=9), "m")
    assert "shorter side" not in crop
    assert crop.endswith("; --crop none turns it off")
    assert preset_note(OFF.over(PRESET), OFF, "m") == preset_note(None, None, "m") == []


def test_each_of_several_models_has_one_note(here, capsys):
    assert cli.run(["eval", "m.onnx", "--reference", "bare.onnx", "--data", "d.npz"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("the preprocessing of m.onnx") == text.count("already had the size") == 1
    first, second = evaluate_all(["bare.onnx", "m.onnx"], "d.npz", preprocessing=OFF)
    assert first.top1 == second.top1 == 100


@pytest.mark.parametrize("verb", [export_verb, sweep_verb, evaluate_verb, profile_verb, bench])
def test_every_verb_that_reads_pictures_has_the_options(verb):
    assert {"mean", "std", "resize", "crop", "layout"} <= {parameter.name for parameter in verb.params}


@pytest.mark.parametrize("function", [export, sweep, profile, evaluate])
def test_every_function_that_reads_pictures_has_the_preprocessing(function):
    assert "preprocessing" in inspect.signature(function).parameters


def test_export_notes_and_stores_its_steps(here):
    quick = {"rank": 2, "measure": False, "always_split": True}
    for data in ({"data": "d.npz"}, {"calib": "c.npz"}):
        report = export("m.onnx", f"b-{next(iter(data))}", **quick, **data)
        option = f"--{next(iter(data))}"
        assert noted(report.notes, "the preprocessing of m.onnx", "shorter side to 10")
        assert noted(report.notes, f"{option}: every picture already had the size")
        assert report.preprocessing == PRESET
    report = export("m.onnx", "b-off", **quick, data="d.npz", calib="c.npz", preprocessing=OFF)
    assert report.preprocessing == OFF.over(PRESET)
    assert report.accuracy.dense.top1 == 100
    assert not noted(report.notes, "shorter side")


def test_sweep_has_the_options_and_one_note(here, capsys):
    common = ["sweep", "m.onnx", "--calib", "c.npz", "--data", "d.npz", "--points", "2", "--no-bench"]
    common += ["--allow-slower", "--highest", "0.9", "--lowest", "0.5"]
    assert cli.run([*common, "-o", "s"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "shorter side to 10" in text
    assert "every picture already had the size" in text
    assert cli.run([*common, "-o", "off", *NONE, "--json"]) == 0
    text = capsys.readouterr().out
    assert "shorter side" not in text
    assert '"dense_top1": 100.0' in text
    assert cli.run([*common, "-o", "off", *NONE, "--json"]) == 0, "the same command goes on with it"
    assert cli.run([*common, "-o", "off"]) == 2, "without the options it is another sweep"


def test_profile_and_export_make_the_same_model(here):
    for steps, stored in ((None, PRESET), (OFF, OFF.over(PRESET))):
        write_dense("m.onnx", here / "dense.onnx", "DEFAULT", None, None, 0, steps)
        metadata = {entry.key: entry.value for entry in onnx.load("dense.onnx").metadata_props}
        assert metadata[METADATA_KEY] == stored.to_metadata()
    assert cli.run(["profile", "bare.onnx", "-o", "cost.json", "--budget", "1s", "--mean", "0.5", "--std", "0.5"]) == 0


def test_bench_has_the_options_only_with_data(here, capsys):
    quick = ["--seconds", "0.05", "--json"]
    assert cli.run(["bench", "bare.onnx", "--data", "d.npz", "--mean", "0.4", "--std", "0.25", *quick]) == 0
    assert '"top1": 100.0' in capsys.readouterr().out
    assert cli.run(["bench", "m.onnx", *NONE, *quick]) == 2
    assert "add --data" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no", "0", "8x", "none x none", ""])
def test_words_other_than_none_are_refused(here, capsys, text):
    assert cli.run(["eval", "m.onnx", "--data", "d.npz", "--resize", text]) == 2
    assert "or none, but got" in capsys.readouterr().err


def test_none_with_ready_inputs_is_refused(here):
    np.savez("ready.npz", x=np.zeros((4, 1, SIDE, SIDE), np.float32), labels=np.zeros(4, int))
    with pytest.raises(UsageError, match="--resize"):
        evaluate("m.onnx", "ready.npz", preprocessing=OFF)
