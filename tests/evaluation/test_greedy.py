"""Greedy generation through the caches: the tokens of whole runs, of a full-rank split, and of models that differ."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import text_models
import tiny_decoder

import graph_passes as gp
from rsi_deploy.core.errors import ModelError
from rsi_deploy.evaluation.greedy import greedy_tokens
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.runtime.feeds.caches import Caches
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.parity import rotated_identity
from rsi_deploy.runtime.sessions import make_session

STEPS = 64
PROMPTS = np.random.default_rng(0).integers(4, text_models.ROWS, (3, 7))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The file of the dense decoder, and the tokens that it generates."""
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    onnx.save(tiny_decoder.decoder(), path)
    return path, greedy_tokens(make_session(path), PROMPTS, STEPS)


def split(path, factors):
    """Split all products of a model, and return a session of it."""
    model = load_model(path)
    sites = gp.split(model, factors)
    assert sum(isinstance(node, gp.Split) for node in sites) == 5 * tiny_decoder.LAYERS + 1
    target = path.with_name("split.onnx")
    ir.save(model, target)
    return make_session(target)


def half_rank(site):
    """The best factors of half of the full rank."""
    u, s, v = np.linalg.svd(site.load("first")[0], full_matrices=False)
    rank = len(s) // 2
    return gp.SplitFactors(left=(u * s)[None, :, :rank], right=v[None, :rank], form="first")


def test_tokens_are_those_of_whole_runs(dense):
    path, tokens = dense
    assert tokens.shape == (3, STEPS)
    assert len(np.unique(tokens)) > 10  # else it says little that they are equal
    session, texts = make_session(path), PROMPTS
    caches = Caches.of(model_inputs(path))
    for _ in range(STEPS):
        logits = session.run(["logits"], caches.prefill(texts))[0]
        texts = np.concatenate([texts, logits[:, -1].argmax(axis=1)[:, None]], axis=1)
    assert np.array_equal(texts[:, PROMPTS.shape[1] :], tokens)
    alone = greedy_tokens(session, PROMPTS[1:2], STEPS)
    assert np.array_equal(alone, tokens[1:2])


def test_a_full_rank_split_generates_the_same_tokens(dense):
    path, tokens = dense
    assert np.array_equal(greedy_tokens(split(path, rotated_identity), PROMPTS, STEPS), tokens)


def test_a_model_of_half_the_rank_generates_others(dense):
    path, tokens = dense
    assert not np.array_equal(greedy_tokens(split(path, half_rank), PROMPTS, STEPS), tokens)


def test_a_past_that_is_not_fed_changes_the_tokens(dense, monkeypatch):
    path, tokens = dense
    monkeypatch.setattr(Caches, "decode", lambda self, feeds, outputs, following: self.prefill(following))
    found = greedy_tokens(make_session(path), PROMPTS, STEPS)
    assert np.array_equal(found[:, 0], tokens[:, 0])
    assert not np.array_equal(found[:, :8], tokens[:, :8])


def test_a_model_without_caches_is_refused(tmp_path):
    onnx.save(text_models.model(), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="past_key_values"):
        greedy_tokens(make_session(tmp_path / "m.onnx"), PROMPTS, 2)
