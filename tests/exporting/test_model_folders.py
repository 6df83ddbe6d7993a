"""A folder in, a folder out: the files beside the model, text as calibration data, and the verbs that read a folder."""

import json

import numpy as np
import pytest
import text_models

from rsi_deploy import export, sweep, verify
from rsi_deploy.core.errors import UsageError
from rsi_deploy.io import onnx_file
from rsi_deploy.runtime.sessions import make_session, run_session

pytest.importorskip("tokenizers", reason="needs rsi-deploy[text]")

QUICK = {"measure": False, "joint": False, "allow_larger": True}
FITTED = {**QUICK, "rank": "40%"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as optimum writes it, with external weights, and a text."""
    root = tmp_path_factory.mktemp("folder")
    text_models.write_folder(root / "encoder", external=True)
    (root / "encoder" / "1_Pooling").mkdir()
    (root / "encoder" / "1_Pooling" / "config.json").write_text("{}")
    text_models.write_text(root / "text.txt")
    return root


@pytest.fixture(scope="module")
def bundle(folder):
    export(str(folder / "encoder"), folder / "bundle", calib=folder / "text.txt", keep_dense=True, **FITTED)
    return folder / "bundle"


def statuses(result):
    return {claim.name: claim.status for claim in result.claims}


def test_the_bundle_is_a_drop_in(folder, bundle):
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
        assert (bundle / name).read_bytes() == (folder / "encoder" / name).read_bytes()
    report = json.loads((bundle / "report.json").read_text())
    assert report["source"]["model"] == "encoder"
    assert any(site["rank"] for site in report["sites"])
    assert report["calibration"]["check_samples"] >= 30
    assert any("text.txt: 160 rows" in note for note in report["notes"])
    assert {"tokenizer.json", "1_Pooling/config.json"} <= json.loads((bundle / "manifest.json").read_text())[
        "files"
    ].keys()


def test_verify_knows_the_files_and_the_text(folder, bundle, tmp_path):
    found = statuses(verify(bundle, calib=folder / "text.txt"))
    assert found["manifest"] == found["calibration"] == "holds"
    assert "broken" not in found.values()
    other = text_models.write_text(tmp_path / "other.txt", seed=1)
    assert statuses(verify(bundle, calib=other))["calibration"] == "not checked"
    tokenizer = (bundle / "tokenizer.json").read_bytes()
    try:
        (bundle / "tokenizer.json").write_bytes(tokenizer + b" ")
        assert statuses(verify(bundle))["manifest"] == "broken"
    finally:
        (bundle / "tokenizer.json").write_bytes(tokenizer)


def test_operators_of_onnxruntime_alone_are_no_fault(folder, tmp_path):
    text_models.write_folder(tmp_path / "decoder", norm=True)
    export(str(tmp_path / "decoder"), tmp_path / "b", calib=folder / "text.txt", **FITTED)
    found = statuses(verify(tmp_path / "b"))
    assert found["graph"] == "not checked"
    assert found["ranks"] == "holds"
    assert "broken" not in found.values()


def test_a_bundle_is_a_model_again(folder, tmp_path):
    one = {"rank": "30%", "input_shape": "input_ids=1x8", **QUICK}
    export(str(folder / "encoder"), tmp_path / "first", exclude="down", **one)
    export(str(tmp_path / "first"), tmp_path / "again", **one)
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("first", "again")]
    assert files[0] == files[1] >= {"tokenizer.json", "model.onnx"}
    assert json.loads((tmp_path / "again" / "report.json").read_text())["source"]["model"] == "first"


def test_weights_above_the_limit_stay_beside_the_model(folder, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 1000)
    export(str(folder / "encoder"), tmp_path / "large", calib=folder / "text.txt", **FITTED)
    assert (tmp_path / "large" / "model.onnx.data").is_file()
    ids = np.ones((2, 6), np.int64)
    feeds = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    pairs = [run_session(make_session(path / "model.onnx"), feeds, "")[0] for path in (bundle, tmp_path / "large")]
    assert np.array_equal(*pairs)
    dense = run_session(make_session(bundle / "dense.onnx"), feeds, "")[0]
    assert not np.array_equal(pairs[0], dense)


def test_the_options_of_text_reach_the_data(folder, tmp_path):
    options = {"sequence_length": 6, "calib_tokens": 300}
    report = export(str(folder / "encoder"), tmp_path / "b", calib=folder / "text.txt", **options, **FITTED)
    assert report.probe_shapes["input_ids"][1] == 6
    assert report.calibration.samples < 100
    assert "sequence_length = 6" in (tmp_path / "b" / "recipe.toml").read_text()


def test_a_sweep_takes_a_folder(folder, tmp_path):
    found = sweep(
        str(folder / "encoder"), tmp_path / "s", calib=folder / "text.txt", by="params", points=2, lowest=0.8,
        highest=0.9, measure=False,
    )  # fmt: skip
    assert len(found.points) == 2
    for point in found.points:
        assert (tmp_path / "s" / point.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["encoder", "encoder/onnx/model.onnx"])
def test_every_verb_reads_the_folder(folder, bundle, tmp_path, ran, name):
    model, text = folder / name, folder / "text.txt"
    assert "MatMul" in ran("inspect", model)
    assert "unseen data keep" in ran("inspect", model, "--calib", text, "--no-spectra")
    assert "160 rows" in ran("eval", bundle, "--reference", model, "--data", text)
    assert "bundle" in ran("bench", model, bundle, "--seconds", 0.2, "--data", text)
    ran("profile", model, "--input-shape", "input_ids=1x8", "--budget", "1s", "-o", tmp_path / "costs.json")


def test_a_file_takes_nothing_along(folder, tmp_path):
    export(str(folder / "encoder/onnx/model.onnx"), tmp_path / "b", calib=folder / "text.txt", **FITTED)
    assert not (tmp_path / "b" / "tokenizer.json").exists()


@pytest.mark.parametrize("settings", [{"data": "text.txt", "rank": "50%"}, {"calib": "short.txt", "rank": "50%"}])
def test_bad_text_is_refused_before_any_work(folder, tmp_path, settings):
    (folder / "short.txt").write_text("\n \n")
    named = {name: str(folder / value) if value.endswith(".txt") else value for name, value in settings.items()}
    with pytest.raises(UsageError, match="text"):
        export(str(folder / "encoder"), tmp_path / "b", **named)
    assert not (tmp_path / "b").exists()


def test_caches_are_named(folder, tmp_path):
    text_models.write_folder(tmp_path / "decoder", inputs=("input_ids", "past_key_values.0.key"), length="past")
    with pytest.raises(UsageError, match=r"past_key_values.0.key.*--feeds"):
        export(str(tmp_path / "decoder"), tmp_path / "b", calib=folder / "text.txt", **FITTED)
    with pytest.raises(UsageError, match=r"past_key_values.0.key.*--feeds"):
        export(str(tmp_path / "decoder"), tmp_path / "b", rank="50%", **QUICK)
