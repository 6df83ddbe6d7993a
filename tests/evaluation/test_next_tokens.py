"""Perplexity, and the other numbers of decoders that continue texts."""

import json

import numpy as np
import onnx
import pytest
import text_models
import tiny_decoder
from click.testing import CliRunner

from rsi_deploy.cli import cli
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.data.text_data import TextOptions, with_text
from rsi_deploy.evaluation.accuracy import evaluate, evaluate_all
from rsi_deploy.evaluation.greedy import greedy_tokens
from rsi_deploy.evaluation.next_tokens import TokenScorer, TokenSums, divergences, predicted, prompts_of, surprisals
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.sessions import make_session

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 50, (2, 21))


def logits_of(seed=0, scale=2.0, shape=(2, 21, 50)):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def scored(*logits, documents=(0, 1), ids=IDS, **feeds):
    """The statistics of each model."""
    scorer = TokenScorer([str(number) for number in range(len(logits))], "input_ids", np.array(documents))
    batch = [{"logits": array} for array in logits]
    scorer.check(batch)
    sums = scorer.score(batch, None, {"input_ids": ids} | feeds)
    return [own.statistics(sums[0] if place else None) for place, own in enumerate(sums)]


def eval_text(folder, text, *, reference=None, **options):
    models = [reference, folder] if reference else [folder]
    data = with_text(str(text), TextOptions(), str(folder))
    return evaluate_all([model / "model.onnx" for model in models], data, **options)[-1]


@pytest.fixture
def text(tmp_path):
    return text_models.write_own_text(tmp_path / "t.txt", text_models.decoder(**text_models.decoder_weights()))


# -- the numbers


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    for level in (0, 3.5):
        (found,) = scored(np.full((2, 21, 50), level, np.float32))
        assert found["text"].perplexity == pytest.approx(50, rel=1e-6)
        assert found["text"].tokens == 40
        assert found["text"].documents == 2


def test_surprisal_and_divergence_have_the_closed_form():
    x, y = logits_of(1).astype(np.float64), logits_of(2).astype(np.float64)
    log_p, log_q = (z - np.log(np.exp(z).sum(axis=2, keepdims=True)) for z in (x, y))
    expected = -np.take_along_axis(log_p[:, :-1], IDS[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(surprisals(x.astype(np.float32), IDS), expected, rtol=1e-5)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=2)
    np.testing.assert_allclose(divergences(x.astype(np.float32), y.astype(np.float32)), kl, rtol=1e-5)
    assert not np.allclose(surprisals(x, np.roll(IDS, 1, axis=1)), expected)


def test_large_logits_stay_finite():
    logits = np.full((1, 3, 4), -1e4, np.float32)
    logits[:, :, 2] = 1e4
    found = surprisals(logits, np.array([[2, 2, 1]]))
    np.testing.assert_allclose(found, [[0, 2e4]])
    (sums,) = scored(logits, ids=np.array([[2, 2, 1]]), documents=(0,))
    assert np.isfinite(sums["text"].perplexity)
    assert sums["text"].perplexity_interval is None


def test_padding_does_not_count():
    ids, logits = IDS.copy(), logits_of(3)
    mask = np.ones_like(ids)
    mask[0, :4], mask[1, 9:] = 0, 0
    kept = predicted(logits, {"input_ids": ids, "attention_mask": mask})
    assert kept.sum(axis=1).tolist() == [16, 8]
    (before,) = scored(logits, ids=ids, attention_mask=mask)
    other = logits.copy()
    other[mask == 0] = 17
    ids[mask == 0] = 3
    (after,) = scored(other, ids=ids, attention_mask=mask)
    assert after == before
    assert before["text"].tokens == 24
    (whole,) = scored(other, ids=ids)
    assert whole["text"].perplexity != before["text"].perplexity


def test_equal_models_have_no_divergence_and_others_have():
    x = logits_of(1)
    _, same, shifted, near, far = scored(x, x, x + 3, x + 0.01 * logits_of(2), logits_of(2))
    assert same["divergence"] == 0
    assert same["agreement"] == 100
    assert same["text"].ratio == 1
    assert same["text"].ratio_interval == (1, 1)
    assert shifted["divergence"] == pytest.approx(0, abs=1e-6)
    assert 1e-5 < near["divergence"] < 1e-3
    assert far["divergence"] > 1
    assert far["agreement"] < 20
    assert far["text"].ratio == pytest.approx(far["text"].perplexity / same["text"].perplexity)


def test_the_ratio_is_paired_by_documents():
    count = 60
    rng = np.random.default_rng(5)
    base = TokenSums(
        documents=np.repeat(np.arange(count), 2),
        tokens=np.full(2 * count, 100.0),
        surprisal=100 * np.repeat(rng.uniform(2, 4, count), 2),
        divergence=np.empty(0),
        same=np.empty(0),
        vocabulary=50,
    )
    worse = TokenSums(**vars(base) | {"surprisal": base.surprisal + 100 * np.log(1.05) + rng.standard_normal(120)})
    ratio, (low, high) = worse.by_document().ratio(base.by_document())
    assert low < ratio < high
    assert ratio == pytest.approx(1.05, abs=0.005)
    assert high - low < 0.01
    shuffled = TokenSums(**vars(base) | {"surprisal": rng.permutation(base.surprisal)})
    _, (wide_low, wide_high) = worse.by_document().ratio(shuffled.by_document())
    assert wide_high - wide_low > 10 * (high - low), "pairs of other documents would be noticed"


def test_the_interval_covers_the_expectation():
    """Documents differ, so intervals over windows would be too narrow."""
    rng, covered, narrow = np.random.default_rng(7), 0, 0
    for _ in range(100):
        documents = np.repeat(np.arange(30), 8)
        surprisal = 50 * (3 + np.repeat(0.4 * rng.standard_normal(30), 8) + 0.1 * rng.standard_normal(240))
        sums = {"surprisal": surprisal, "divergence": np.empty(0), "same": np.empty(0), "tokens": np.full(240, 50.0)}
        made = TokenSums(documents=documents, vocabulary=9, **sums)
        low, high = made.by_document().perplexity()[1]
        covered += low <= np.exp(3) <= high
        low, high = made.perplexity()[1]
        narrow += low <= np.exp(3) <= high
    assert covered >= 87
    assert narrow < 75


# -- models


def test_a_model_with_known_probabilities(tmp_path):
    """After every word comes w1 with 1/2, w2 with 1/4 and w3 with 1/4."""
    table = np.full((text_models.ROWS, text_models.ROWS), -30.0)
    table[:, 5], table[:, 6:8] = np.log(0.5), np.log(0.25)
    folder = text_models.write_decoder(tmp_path / "m", text_models.decoder(table), length=4)
    text = tmp_path / "t.txt"
    text.write_text("w1 w1 w2 w3\nw2 w1 w1 w1\n")
    found = eval_text(folder, text)
    assert found.kind == "tokens"
    assert (found.samples, found.text.tokens, found.text.documents) == (2, 6, 2)
    assert found.text.perplexity == pytest.approx(np.exp((4 * np.log(2) + 2 * np.log(4)) / 6), rel=1e-6)
    assert found.classes == text_models.ROWS


def test_a_worse_model_is_shown_to_be_worse(tmp_path, text):
    weights = text_models.decoder_weights()
    dense = text_models.write_decoder(tmp_path / "dense")
    noise = 0.1 * np.random.default_rng(1).standard_normal(weights["head"].shape)
    worse = text_models.write_decoder(
        tmp_path / "worse", text_models.decoder(**weights | {"head": weights["head"] + noise})
    )
    own, same = eval_text(dense, text), eval_text(dense, text, reference=dense)
    assert own.text.perplexity == same.text.perplexity
    assert own.agreement is None
    assert (same.agreement, same.divergence, same.text.ratio) == (100, 0, 1)
    found = eval_text(worse, text, reference=dense)
    assert found.text.ratio_interval[0] > 1, "the text was drawn from the dense model"
    assert np.log(found.text.ratio) == pytest.approx(found.divergence, rel=0.35)
    assert found.agreement < 100
    fewer = eval_text(dense, text, limit=10)
    assert fewer.samples == 10
    assert fewer.text.documents == 10, "samples are spaced evenly over the data"


def test_a_fixed_batch_gives_the_same(tmp_path, text):
    proto = text_models.decoder(**text_models.decoder_weights())
    dense = text_models.write_decoder(tmp_path / "dense", proto)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 7
    fixed = text_models.write_decoder(tmp_path / "fixed", proto)
    expected, found = (eval_text(folder, text, limit=11) for folder in (dense, fixed))
    assert found.text.tokens == expected.text.tokens
    assert found.text.perplexity == pytest.approx(expected.text.perplexity, rel=1e-6)


# -- greedy tokens


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """A folder of two decoders with caches, and a text of documents of several windows."""
    folder = tmp_path_factory.mktemp("generators")
    for name, seed in (("dense", 0), ("other", 1)):
        tiny_decoder.write_folder(folder / name, seed=seed)
    text_models.write_own_text(folder / "t.txt", text_models.decoder(**text_models.decoder_weights()), 20, 300)
    return folder


def test_equal_greedy_tokens_are_counted_place_by_place(generators):
    dense, other = generators / "dense", generators / "other"
    same = eval_text(dense, generators / "t.txt", reference=dense)
    assert (same.text.prompts, same.text.greedy, same.text.greedy_interval) == (16, 100, (100, 100))
    found = eval_text(other, generators / "t.txt", reference=dense)
    text = with_text(str(generators / "t.txt"), TextOptions(), str(dense)).for_inputs(
        model_inputs(dense / "model.onnx")
    )
    prompts = prompts_of(text, np.arange(len(text)))
    assert prompts.shape == (16, 32)
    assert len({tuple(prompt) for prompt in prompts}) == 16
    first, second = (greedy_tokens(make_session(folder / "model.onnx"), prompts, 64) for folder in (dense, other))
    assert found.text.greedy == pytest.approx(100 * (first == second).mean())
    assert found.text.greedy < 50
    low, high = found.text.greedy_interval
    assert low <= found.text.greedy <= high
    assert eval_text(dense, generators / "t.txt").text.prompts == 0, "nothing to compare with"


def test_few_documents_give_few_prompts_and_short_windows_none(generators):
    dense = generators / "dense"
    few = eval_text(dense, generators / "t.txt", reference=dense, limit=3)
    assert few.text.prompts == few.text.documents == 3
    data = with_text(str(generators / "t.txt"), TextOptions(sequence_length=95), str(dense))
    short = evaluate_all([dense / "model.onnx"] * 2, data, limit=3)[-1]
    assert (short.text.prompts, short.text.greedy) == (0, None)


# -- what is refused


def test_another_vocabulary_is_refused(tmp_path, text):
    dense = text_models.write_decoder(tmp_path / "dense")
    weights = text_models.decoder_weights()
    more = {name: np.concatenate([weights[name]] * 2, axis=axis) for name, axis in (("table", 0), ("head", 1))}
    other = text_models.write_decoder(tmp_path / "other", text_models.decoder(**weights | more))
    with pytest.raises(UsageError, match=r"128.* but the reference .* 64"):
        eval_text(other, text, reference=dense)
    few = text_models.decoder(**weights | {"head": weights["head"][:, :20]})
    with pytest.raises(ModelError, match="do not fit token ids"):
        eval_text(text_models.write_decoder(tmp_path / "few", few), text)


def test_logits_that_are_not_finite_are_refused(tmp_path, text):
    weights = text_models.decoder_weights()
    weights["head"][3, 3] = np.inf
    broken = text_models.write_decoder(tmp_path / "m", text_models.decoder(**weights))
    with pytest.raises(ModelError, match="NaN or infinite"):
        eval_text(broken, text)


def test_a_decoder_without_logits_needs_a_reference(tmp_path, text):
    proto = text_models.decoder(**text_models.decoder_weights())
    proto.graph.node.append(onnx.helper.make_node("ReduceMax", ["logits"], ["y"], axes=[1], keepdims=0))
    proto.opset_import[0].version = 17
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", 1, ["batch", text_models.ROWS]))
    folder = text_models.write_decoder(tmp_path / "m", proto)
    with pytest.raises(UsageError, match="no labels and there is no reference"):
        eval_text(folder, text)
    assert eval_text(folder, text, reference=folder).text is None


def test_values_may_still_be_compared(tmp_path, text):
    dense = text_models.write_decoder(tmp_path / "dense")
    found = eval_text(dense, text, reference=dense, outputs="values")
    assert (found.kind, found.text) == ("values", None)
    assert found.values[0].distance == 0
    with pytest.raises(UsageError, match="--reference"):
        evaluate(dense / "model.onnx", with_text(str(text), TextOptions(), str(dense)), outputs="values")


def test_the_verb_shows_the_numbers(tmp_path, text):
    dense = text_models.write_decoder(tmp_path / "dense")
    shown = CliRunner().invoke(cli, ["eval", str(dense), "--data", str(text), "--reference", str(dense), "--json"])
    found = json.loads(shown.stdout)
    assert found["text"]["ratio"] == 1
    table = CliRunner().invoke(cli, ["eval", str(dense), "--data", str(text)])
    assert f"{found['text']['perplexity']:.2f}" in table.stdout
