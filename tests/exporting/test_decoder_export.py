"""Decoders with caches: text and random inputs feed them, and the delivered model is proved in both kinds of runs."""

import json

import numpy as np
import onnx
import pytest
import text_models
import tiny_decoder

from rsi_deploy.benchmark.latency import bench
from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.text_data import TextOptions, with_text
from rsi_deploy.evaluation.greedy import greedy_tokens
from rsi_deploy.exporting.api import export
from rsi_deploy.report.schema import read_report
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.sessions import make_session
from rsi_deploy.verifying.api import verify

pytest.importorskip("tokenizers", reason="needs rsi-deploy[text]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a decoder whose head and table share a weight."""
    return tiny_decoder.write_folder(tmp_path_factory.mktemp("decoder") / "model", tied=True)


@pytest.fixture(scope="module")
def bundle(folder):
    """A bundle that was fitted to text, with the dense model."""
    text, target = text_models.write_text(folder.parent / "t.txt"), folder.parent / "bundle"
    export(
        str(folder),
        target,
        calib=str(text),
        sequence_length=8,
        calib_size=32,
        rank="50%",
        keep_dense=True,
        measure=False,
    )
    return target


def test_text_feeds_empty_caches(folder):
    text = text_models.write_text(folder.parent / "rows.txt")
    source = with_text(str(text), TextOptions(sequence_length=8), str(folder))
    rows = source.for_inputs(model_inputs(folder / "model.onnx"))
    feeds, _ = next(rows.batches(3, None))
    assert feeds["input_ids"].shape == (3, 8)
    assert feeds["attention_mask"].all()
    caches = [array for name, array in feeds.items() if name.startswith("past")]
    assert {(array.shape, array.dtype.name) for array in caches} == {((3, 2, 0, 16), "float32")}
    assert len(caches) == 2 * tiny_decoder.LAYERS


def test_a_layout_that_is_not_known_is_named(tmp_path):
    folder = tiny_decoder.write_folder(tmp_path / "model")
    model = onnx.load(folder / "model.onnx")
    for value in model.graph.input[2:]:
        value.type.tensor_type.shape.dim[2].dim_value = 512
    onnx.save(model, folder / "model.onnx")
    text = text_models.write_text(tmp_path / "t.txt")
    with pytest.raises(UsageError, match=r"past_key_values\.0\.key: float32 .*512.*--feeds"):
        export(str(folder), tmp_path / "bundle", calib=str(text), rank="50%")
    with pytest.raises(UsageError, match=r"past_key_values|attention_mask.*--feeds"):
        export(str(folder), tmp_path / "bundle", rank="50%")


def test_the_bundle_is_verified_in_prefill_and_decode(bundle):
    report = read_report(bundle)
    names = [output.name for output in report.probe]
    assert "logits" in names
    assert "logits (decode)" in names
    assert report.verification.surgery.relative_l2 < 2e-5
    assert report.split_sites
    dims = onnx.load(bundle / "model.onnx").graph.input[2].type.tensor_type.shape.dim
    assert dims[3].dim_value == tiny_decoder.HEAD  # open in the folder, lost in models of few bits
    claims = {claim.name: claim for claim in verify(bundle, calib=str(bundle.parent / "t.txt")).claims}
    for name in ("outputs", "parity", "calibration", "MACs", "ranks"):
        assert claims[name].status == "holds", claims[name]


def test_a_change_in_the_decode_step_alone_is_found(bundle, tmp_path):
    """The report of a model whose decode step gave other logits, as one that forgets its past does."""
    report = json.loads((bundle / "report.json").read_text())
    changed = next(output for output in report["probe"] if output["name"] == "logits (decode)")
    changed["norm"] *= 1.01
    target = tmp_path / "bundle"
    target.mkdir()
    for path in bundle.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    (target / "report.json").write_text(json.dumps(report))
    claims = {claim.name: claim for claim in verify(target).claims}
    assert claims["outputs"].status == "broken"


def test_the_bundle_generates(folder, bundle):
    prompts = np.random.default_rng(1).integers(4, text_models.ROWS, (2, 6))
    dense, again, made = (
        greedy_tokens(make_session(path), prompts, 32)
        for path in (folder / "model.onnx", bundle / "dense.onnx", bundle / "model.onnx")
    )
    assert np.array_equal(dense, again)
    assert made.shape == dense.shape
    assert not np.array_equal(dense, made)


def test_a_decoder_is_timed_without_shapes(folder):
    result = bench([str(folder / "model.onnx")], batch=2, seconds=0.05)
    assert result.arms[0].median_ms > 0
