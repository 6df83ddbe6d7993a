"""bench/untrained: nets with random weights compute what nets of their kind compute, and are written once."""

import pytest
import torch

from bench import untrained
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.sessions import make_session, run_session

SMALL = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def test_tokens_one_by_one_give_the_logits_of_the_prompt(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(untrained, "SMOLLM2", SMALL)
    torch.manual_seed(0)
    decode = untrained.transformer("smollm2_decode").eval()
    prefill = untrained.Prefill(decode.model)
    prompt = torch.randint(50, (3, 5))
    cache = torch.zeros(3, 2, 2, 2, 0, 6)
    with torch.inference_mode():
        for token in prompt.split(1, dim=1):
            logits, new = decode(token, cache)
            cache = torch.cat([cache, new], dim=4)
        expected = prefill(prompt)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        wrong, _ = decode(prompt[:, -1:], cache[..., :3, :])  # without the last token but one
    assert not torch.allclose(wrong, expected, rtol=1e-2, atol=1e-2)


def test_a_net_is_written_once_and_runs_at_any_batch(tmp_path):
    path = untrained.written("mlp_mnist", tmp_path)
    stamp = path.stat().st_mtime_ns
    assert untrained.written("mlp_mnist", tmp_path) == path
    assert path.stat().st_mtime_ns == stamp
    (output,) = run_session(make_session(path), random_feeds(model_inputs(path), 3, 0), "the net")
    assert output.shape == (3, 10)


def test_nets_that_cannot_be_written_are_named(tmp_path, capfd):
    assert untrained.main([str(tmp_path), "mlp_mnist", "no_such_net"]) == 1
    assert "no_such_net" in capfd.readouterr().out.splitlines()[-1]
    assert (tmp_path / "mlp_mnist.onnx").exists()
