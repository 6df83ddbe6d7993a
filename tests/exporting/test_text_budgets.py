"""Exports of decoders whose size the perplexity, or the share of equal next tokens, decides on calibration text."""

import numpy as np
import pytest
import text_models

from rsi_deploy import export
from rsi_deploy.calibration import output_agreement
from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.calibration.output_agreement import dense_outputs, measures_of, output_quality
from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.data.text_data import TextOptions, with_text
from rsi_deploy.evaluation.accuracy import evaluate_all
from rsi_deploy.exporting.calibrated.candidates import loss_shown
from rsi_deploy.report.summary import plan_lines, quality_words
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.verifying.api import verify

pytest.importorskip("tokenizers", reason="needs rsi-deploy[text]")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a decoder and a text that it has drawn."""
    folder = tmp_path_factory.mktemp("work")
    text_models.write_decoder(folder / "dense")
    proto = text_models.decoder(**text_models.decoder_weights())
    text_models.write_own_text(folder / "calib.txt", proto, documents=60)
    text_models.write_own_text(folder / "test.txt", proto, documents=60, seed=9)
    return folder


def exported(work, name, **options):
    settings = {"measure": False, "force": True, "precision": "float32", "keep_dense": True} | options
    return export(str(work / "dense"), work / name, calib=str(work / "calib.txt"), **settings)


def test_more_perplexity_buys_a_smaller_model(work):
    small, large = exported(work, "small", max_perplexity="+50%"), exported(work, "large", max_perplexity="+5%")
    assert small.compressed.params < large.compressed.params < large.dense.params
    for report, limit in ((small, 1.5), (large, 1.05)):
        checked = report.calibration.checked
        assert 1 < checked.perplexity_ratio < checked.perplexity_ratio_at_most <= limit
        assert checked.tokens == 15 * checked.samples
        assert report.plan.next_smaller.value > limit >= min(t.value for t in report.plan.trials if t.holds)
    assert small.calibration.checked.perplexity_ratio > 1.1, "all of a budget is not left unused"
    data = with_text(str(work / "test.txt"), TextOptions(), str(work / "dense"))
    found = evaluate_all([work / f"{name}/model.onnx" for name in ("dense", "large", "small")], data)
    assert 1 < found[1].text.ratio <= 1.05
    assert 1.05 < found[2].text.ratio <= 1.5
    assert "--max-perplexity +5%" in plan_lines(large)[0]
    assert "times dense" in quality_words(large.calibration.checked)[0]
    claims = {claim.name: claim.status for claim in verify(work / "large", calib=str(work / "calib.txt")).claims}
    assert (claims["budget"], claims["calibration"]) == ("holds", "holds")


def test_without_a_rise_the_dense_model_is_delivered(work):
    report = exported(work, "none", max_perplexity="+0%")
    assert report.plan.delivers_dense
    assert report.compressed.params == report.dense.params
    assert report.calibration.checked.perplexity_ratio == 1
    assert report.calibration.checked.divergence == 0


def test_an_absolute_perplexity(work):
    dense = exported(work, "none", max_perplexity="+0%").calibration.checked.perplexity
    report = exported(work, "abs", max_perplexity=round(1.2 * dense, 2))
    checked = report.calibration.checked
    assert dense < checked.perplexity < checked.perplexity_at_most <= 1.2 * dense + 0.01
    assert checked.perplexity == pytest.approx(dense * checked.perplexity_ratio)
    assert report.compressed.params < report.dense.params
    with pytest.raises(GateError, match=f"the dense model has a perplexity of {dense:.4g}"):
        exported(work, "x", max_perplexity=round(0.9 * dense, 2))


def test_an_agreement_counts_next_tokens(work):
    report = exported(work, "same", min_agreement="80%")
    checked = report.calibration.checked
    assert 80 <= checked.agreement_at_least < checked.agreement < 90
    assert report.plan.next_smaller.value < 0.8
    assert report.compressed.params < report.dense.params


def test_text_alone_takes_the_default_perplexity(work):
    report = exported(work, "default", precision=None)
    assert (report.settings.budget, report.plan.is_default) == ("--max-perplexity +5%", True)
    assert report.calibration.checked.perplexity_ratio_at_most <= 1.05
    assert report.compressed.bytes < report.dense.bytes / 2
    assert 'max_perplexity = "+5%"' in report.recipe


def test_measures_of_other_models_are_refused(work):
    folder = text_models.write_folder(work / "encoder")
    text = text_models.write_text(work / "texts.txt")
    with pytest.raises(UsageError, match="--max-perplexity is for decoders"):
        export(str(folder), work / "x", calib=str(text), max_perplexity="+5%", measure=False)
    with pytest.raises(UsageError, match="--min-cosine is for embeddings.*type --max-perplexity or --min-agreement"):
        exported(work, "x", min_cosine=0.9)


# -- the numbers on a part of the data


def part_of(work):
    source = with_text(str(work / "calib.txt"), TextOptions(), str(work / "dense"))
    return CalibrationData(source, model_inputs(work / "dense/model.onnx"), None, 64).check


def noisy(work, scale):
    weights = text_models.decoder_weights()
    noise = scale * np.random.default_rng(1).standard_normal(weights["head"].shape)
    return (
        text_models.write_decoder(work / "noisy", text_models.decoder(**weights | {"head": weights["head"] + noise}))
        / "model.onnx"
    )


def test_few_positions_of_logits_change_no_perplexity(work, monkeypatch):
    part, other = part_of(work), noisy(work, 0.1)
    whole = output_quality(dense_outputs(work / "dense/model.onnx", part, "cpu"), other, part, "cpu")
    monkeypatch.setattr(output_agreement, "LOGIT_BYTES", 3 * 4 * text_models.ROWS * part.samples)
    outputs = dense_outputs(work / "dense/model.onnx", part, "cpu")
    assert all(batch.shape[1:] == (3, text_models.ROWS) for batch in outputs.batches)
    assert measures_of(outputs)[0] == "perplexity_ratio"
    some = output_quality(outputs, other, part, "cpu")
    exact = ("tokens", "perplexity", "perplexity_ratio", "perplexity_ratio_at_most", "agreement", "agreement_at_least")
    for name in exact:
        assert getattr(some, name) == getattr(whole, name)
    assert some.divergence == pytest.approx(whole.divergence, rel=0.2)
    assert some.divergence != whole.divergence
    assert loss_shown(some) == some.output_error


def test_a_broken_decoder_is_told_by_its_perplexity(work):
    part = part_of(work)
    dense = dense_outputs(work / "dense/model.onnx", part, "cpu")
    assert not output_quality(dense, noisy(work, 0.2), part, "cpu").is_broken
    assert output_quality(dense, noisy(work, 5), part, "cpu").is_broken
    with pytest.raises(GateError, match="NaN or infinite"):
        output_quality(dense, noisy(work, np.inf), part, "cpu")
