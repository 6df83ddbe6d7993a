"""Caches of decoders: layouts, the feeds of a first and of a next run, and probes that run both."""

import numpy as np
import onnx
import pytest
import tiny_decoder
from onnx import helper

from rsi_deploy.core.errors import GateError
from rsi_deploy.runtime.feeds.cache_widths import cache_widths
from rsi_deploy.runtime.feeds.caches import PROBE_TOKENS, Caches
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.probe import probe_feeds
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.parity import compare_outputs
from rsi_deploy.runtime.probe_runs import probe_names, run_probe
from rsi_deploy.runtime.sessions import make_session

IDS = ("input_ids", np.int64, ("batch", "tokens"))
MASK = ("attention_mask", np.int64, ("batch", "total"))
POSITIONS = ("position_ids", np.int64, ("batch", "tokens"))
FLAG = ("use_cache_branch", np.bool_, (1,))
KEY = ("past_key_values.0.key", np.float16, ("batch", 3, "past", 64))
VALUE = ("past_key_values.0.value", np.float16, ("batch", 3, "past", 64))
STACKED = ("past_0", np.float32, (2, "batch", 3, "past", 64))


def specs(*inputs):
    return [InputSpec(name=name, dtype=np.dtype(dtype), shape=shape) for name, dtype, shape in inputs]


@pytest.mark.parametrize(
    ("inputs", "outputs", "shape"),
    [
        ((IDS, MASK, KEY, VALUE), ("present.0.key", "present.0.value"), (4, 3, 0, 64)),
        ((IDS, MASK, POSITIONS, KEY, VALUE, FLAG), ("present.0.key", "present.0.value"), (4, 3, 0, 64)),
        ((STACKED, IDS, POSITIONS), ("present_0",), (2, 4, 3, 0, 64)),
    ],
)
def test_feeds_of_known_layouts(inputs, outputs, shape):
    caches = Caches.of(specs(*inputs))
    feeds = caches.prefill(np.full((4, 5), 7))
    names = [each[0] for each in inputs]
    assert feeds.keys() == set(names)
    presents = caches.presents(["logits", *outputs])
    assert set(presents.values()) == set(outputs)
    assert {feeds[name].shape for name in presents} == {shape}
    full = tuple(5 if size == 0 else size for size in shape)
    made = {output: np.full(full, 1 + place, np.float32) for place, output in enumerate(outputs)}
    following = caches.decode(feeds, made, np.full((4, 1), 9))
    assert following["input_ids"].tolist() == [[9]] * 4
    assert all(following[name] is made[output] for name, output in presents.items())
    for name, first, then in (
        ("attention_mask", np.ones((4, 5)), np.ones((4, 6))),
        ("position_ids", [[0, 1, 2, 3, 4]] * 4, [[5]] * 4),
        ("use_cache_branch", [False], [True]),
    ):
        if name in names:
            assert np.array_equal(feeds[name], first)
            assert np.array_equal(following[name], then)
            assert feeds[name].dtype == following[name].dtype
    assert caches.presents(["logits", *outputs[1:]]) is None


@pytest.mark.parametrize(
    "inputs",
    [
        (IDS, MASK),
        (MASK, KEY),
        (IDS, MASK, ("past_key_values.0.key", np.float32, ("batch", 3, 512, 64))),
        (IDS, MASK, ("past_key_values.0.key", np.float32, ("batch", 3, "past", "width"))),
        (IDS, MASK, ("cache.0.key", np.float32, ("batch", 3, "past", 64))),
        (IDS, MASK, KEY, ("encoder_hidden_states", np.float32, ("batch", "n", 64))),
    ],
)
def test_other_layouts_are_not_guessed(inputs):
    assert Caches.of(specs(*inputs)) is None


def test_sizes_that_are_known_are_kept():
    found = specs(IDS, MASK, POSITIONS, KEY, VALUE)
    feeds = random_feeds(found, 2, 0)
    assert feeds["input_ids"].shape == feeds["attention_mask"].shape == (2, PROBE_TOKENS)
    assert feeds["past_key_values.0.value"].shape == (2, 3, 0, 64)
    feeds = random_feeds(found, 1, 0, {"past_key_values.0.key": (1, 3, 6, 64), "input_ids": (1, 2)})
    assert feeds["attention_mask"].tolist() == [[1] * 8]
    assert feeds["position_ids"].tolist() == [[6, 7]]
    assert feeds["past_key_values.0.value"].shape == (1, 3, 6, 64)
    assert random_feeds(found, 3, 0, {"attention_mask": (3, 9)})["input_ids"].shape == (3, 9)


@pytest.mark.parametrize("typed", [True, False])
def test_an_open_width_is_that_of_the_heads(tmp_path, typed):
    model = tiny_decoder.decoder()
    if typed:  # the types of values are enough, and so are the weights
        model = onnx.shape_inference.infer_shapes(model)
    assert set(cache_widths(model).values()) == {tiny_decoder.HEAD}
    onnx.save(model, tmp_path / "m.onnx")
    read = model_inputs(tmp_path / "m.onnx")
    assert read == model_inputs(make_session(tmp_path / "m.onnx"))
    assert {spec.shape[-1] for spec in read[2:]} == {tiny_decoder.HEAD}
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(helper.make_attribute("k_quant_type", "PER_TENSOR"))
    assert cache_widths(model) == {}


def outputs_of(model, path):
    """Outputs of a model's runs on its probe inputs by name, and those inputs."""
    onnx.save(model, path)
    session, feeds = make_session(path), probe_feeds(path, 0)
    values = run_probe(session, feeds, "it")
    return dict(zip(probe_names(session, values), values, strict=True)), feeds, session


def test_a_probe_decodes_a_token_with_the_caches_of_its_first_run(tmp_path):
    found, feeds, session = outputs_of(tiny_decoder.decoder(), tmp_path / "m.onnx")
    assert len(found) == 2 * len(session.get_outputs())
    tokens = np.concatenate([feeds["input_ids"], feeds["input_ids"][:, -1:]], axis=1)
    whole = session.run(["logits"], feeds | {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})[0]
    last = found["logits (decode)"]
    assert last.shape == (2, 1, tiny_decoder.text_models.ROWS)
    assert np.allclose(whole[:, -1:], last, atol=1e-5)
    alone = {"input_ids": tokens[:, -1:], "attention_mask": np.ones((2, 1), np.int64)}
    assert np.abs(session.run(["logits"], feeds | alone)[0] - last).max() > 0.1


def test_a_model_that_forgets_its_past_differs_in_the_decode_step_alone(tmp_path):
    model, forgetful = (tiny_decoder.decoder(width=tiny_decoder.HEAD) for _ in range(2))
    forgetful.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    for node in forgetful.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[4] = "forgotten"
            value = helper.make_node("Mul", ["past_key_values.0.value", "zero"], ["forgotten"])
    forgetful.graph.node.insert(0, value)
    (dense, *_), (other, *_) = (outputs_of(each, tmp_path / f"{at}.onnx") for at, each in enumerate((model, forgetful)))
    count = len(dense) // 2
    first, second = list(dense.values()), list(other.values())
    assert compare_outputs(first[:count], second[:count], what="prefill", tolerance=1e-6).relative_l2 < 1e-6
    with pytest.raises(GateError):
        compare_outputs(first, second, what="both", tolerance=1e-2)


def test_other_models_run_once(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(tiny_decoder.text_models.model(length=6), path)
    session = make_session(path)
    values = run_probe(session, probe_feeds(path, 0), "it")
    assert len(values) == 1
    assert probe_names(session, values) == ["y"]
