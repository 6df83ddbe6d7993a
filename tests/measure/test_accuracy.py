import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.measure.accuracy import (
    AccuracyResult,
    divergence,
    evaluate,
    label_ranks,
    log_probabilities,
    wilson_interval,
)
from rsi_deploy.measure.data import ArrayData
from rsi_deploy.measure.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.measure.providers import available

RNG = np.random.default_rng(0)
CLASSES = 8
INPUTS = RNG.standard_normal((50, 6)).astype(np.float32)
WEIGHT = RNG.standard_normal((6, CLASSES)).astype(np.float32)
SCORES = INPUTS @ WEIGHT
LABELS = np.where(RNG.random(50) < 0.6, SCORES.argmax(axis=1), RNG.integers(0, CLASSES, 50))


def save(path, weight=WEIGHT, *, batch="N", dtype=np.float32, flat=None, metadata=None, softmax=False, count=1):
    """`scores = x @ weight`; `flat` is the shape of one picture that is flattened first."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    work = dtype if np.dtype(dtype).kind == "f" else np.float32
    nodes, shape = [], [batch, *(flat or weight.shape[:1])]
    nodes.append(helper.make_node("Cast", ["x"], ["c"], to=helper.np_dtype_to_tensor_dtype(np.dtype(work))))
    nodes.append(helper.make_node("Flatten", ["c"], ["f"]))
    nodes.append(helper.make_node("MatMul", ["f", "w"], ["s"]))
    nodes.append(helper.make_node("Softmax" if softmax else "Identity", ["s"], ["y"]))
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "z")[:count]]
    out = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(work)), [None, weight.shape[1]])
    graph = helper.make_graph(nodes, "g", inputs, [out], [numpy_helper.from_array(weight.astype(work), "w")])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    if metadata is not None:
        helper.set_model_props(model, {METADATA_KEY: metadata})
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "m.onnx")


DATA = ArrayData(INPUTS, LABELS)


def direct(scores, labels):
    """Top-1 and top-5 by sorting, in percent."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return 100 * np.mean(order[:, 0] == labels), 100 * np.mean((order[:, :5] == labels[:, None]).any(axis=1))


@pytest.mark.parametrize("batch_size", [1, 7, 50, 99])
def test_shares_are_those_of_a_direct_count(model, batch_size):
    result = evaluate(model, DATA, batch_size=batch_size)
    np.testing.assert_allclose((result.top1, result.top5), direct(SCORES, LABELS), rtol=1e-12)
    assert (result.samples, result.classes, result.agreement, result.divergence) == (50, CLASSES, None, None)
    assert result.top1_interval[0] < result.top1 < result.top1_interval[1]
    assert result.data_fingerprint == DATA.fingerprint()
    wrong = evaluate(model, ArrayData(INPUTS, (LABELS + 1) % CLASSES), batch_size=batch_size)
    assert wrong.top1 < result.top1
    assert AccuracyResult.model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize("fixed", [1, 7, 64])
def test_a_fixed_batch_is_filled_up_and_the_filling_is_dropped(model, tmp_path, fixed):
    other = save(tmp_path / "fixed.onnx", batch=fixed)
    assert evaluate(other, DATA) == evaluate(model, DATA)
    assert evaluate(model, DATA, reference=other).agreement == 100


def test_data_from_a_file_and_a_limit(model, tmp_path):
    np.savez(tmp_path / "d.npz", x=INPUTS, y=LABELS)
    assert evaluate(model, tmp_path / "d.npz") == evaluate(model, DATA)
    seen = []
    result = evaluate(model, DATA, limit=25, batch_size=10, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 25), (20, 25), (25, 25)]
    np.testing.assert_allclose(result.top1, direct(SCORES[::2], LABELS[::2])[0], rtol=1e-12)


def test_agreement_and_divergence(model, tmp_path):
    same = evaluate(model, DATA, reference=model)
    assert (same.agreement, same.divergence) == (100, 0)
    noisy = WEIGHT + 0.8 * RNG.standard_normal(WEIGHT.shape).astype(np.float32)
    other = evaluate(save(tmp_path / "noisy.onnx", noisy), DATA, reference=model)
    expected = 100 * np.mean((INPUTS @ noisy).argmax(axis=1) == SCORES.argmax(axis=1))
    assert other.agreement == pytest.approx(expected, rel=1e-12)
    assert other.agreement < 100
    assert other.divergence > 0.01
    np.testing.assert_allclose(other.divergence, divergence(SCORES, INPUTS @ noisy).mean(), rtol=1e-4)


def test_a_reference_alone_needs_no_labels(model):
    result = evaluate(model, ArrayData(INPUTS), reference=model)
    assert (result.top1, result.top1_interval, result.top5, result.agreement) == (None, None, None, 100)
    with pytest.raises(UsageError, match="no labels"):
        evaluate(model, ArrayData(INPUTS))


def test_probabilities_are_not_squashed_again(model, tmp_path):
    soft = save(tmp_path / "soft.onnx", softmax=True)
    assert evaluate(soft, DATA, reference=model).divergence == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(np.exp(log_probabilities(SCORES)).sum(axis=1), 1, rtol=1e-12)
    uniform = np.full((1, 4), 0.25)
    assert divergence(np.array([[0.7, 0.1, 0.1, 0.1]]), uniform)[0] == pytest.approx(
        0.7 * np.log(2.8) + 0.3 * np.log(0.4)
    )


def test_few_classes_have_no_top5(tmp_path):
    result = evaluate(save(tmp_path / "m.onnx", WEIGHT[:, :5]), ArrayData(INPUTS, LABELS % 5))
    assert result.top5 is None
    assert result.top1 is not None


def test_equal_scores_rank_by_class_number():
    scores = np.array([[1.0, 1, 1, 0], [0, 2, 1, 2]])
    assert label_ranks(scores, np.array([2, 3])).tolist() == [2, 1]
    assert label_ranks(scores, np.array([0, 0])).tolist() == [0, 3]


def test_wilson_interval_covers_and_stays_inside():
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 100
    assert wilson_interval(0, 10)[1] == pytest.approx(27.75, abs=0.01)
    hits = np.random.default_rng(0).binomial(200, 0.93, 2000)
    covered = np.mean([wilson_interval(int(h), 200)[0] <= 93 <= wilson_interval(int(h), 200)[1] for h in hits])
    assert 0.93 < covered < 0.98
    assert wilson_interval(930, 1000)[1] < wilson_interval(93, 100)[1]


PICTURES = RNG.integers(0, 256, (40, 3, 4, 2), dtype=np.uint8)[:, :, :, [0, 1, 1]]
PIXELS = RNG.standard_normal((36, CLASSES)).astype(np.float32)
STEPS = Preprocessing(mean=(0.5,), std=(0.2,))
PICTURE_DATA = ArrayData(PICTURES, (STEPS.apply(PICTURES).reshape(40, -1) @ PIXELS).argmax(axis=1))


def test_preprocessing_comes_from_the_caller_or_the_model(tmp_path):
    bare = save(tmp_path / "bare.onnx", PIXELS, flat=(3, 3, 4))
    stored = save(tmp_path / "stored.onnx", PIXELS, flat=(3, 3, 4), metadata=STEPS.to_metadata())
    assert evaluate(bare, PICTURE_DATA, preprocessing=STEPS).top1 == 100
    result = evaluate(stored, PICTURE_DATA)
    assert (result.top1, result.preprocessing) == (100, STEPS.describe())
    wrong = Preprocessing(mean=(0.0,), std=(-1.0,))
    assert evaluate(stored, PICTURE_DATA, preprocessing=wrong).top1 < 100
    with pytest.raises(UsageError, match=r"bare\.onnx.*does not say how"):
        evaluate(bare, PICTURE_DATA)
    with pytest.raises(UsageError, match="none"):
        evaluate(save(tmp_path / "m.onnx"), DATA, preprocessing=STEPS)


def test_a_model_that_takes_8_bit_pictures_gets_them(tmp_path):
    raw = save(tmp_path / "raw.onnx", PIXELS, flat=(3, 4, 3), dtype=np.uint8)
    labels = (PICTURES.reshape(40, -1).astype(np.float32) @ PIXELS).argmax(axis=1)
    result = evaluate(raw, ArrayData(PICTURES, labels))
    assert (result.top1, result.preprocessing) == (100, None)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_floats_become_the_models_floats_and_nothing_else_does(tmp_path, model, dtype):
    other = save(tmp_path / "other.onnx", dtype=dtype)
    assert evaluate(other, DATA, reference=model).agreement >= 98
    with pytest.raises(UsageError, match=r"other\.onnx takes x.*data give int64"):
        evaluate(other, ArrayData(INPUTS.astype(np.int64), LABELS))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (ArrayData(INPUTS[:, :5], LABELS), r"m\.onnx takes x: float32 \(N, 6\).*\(batch, 5\)"),
        (ArrayData(INPUTS[:, :, None], LABELS), r"\(batch, 6, 1\)"),
        (ArrayData(INPUTS, LABELS + 1), r"8 classes.*to 8"),
        (ArrayData(INPUTS, LABELS - 1), "from -1"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_long_run(model, data, named):
    seen = []
    with pytest.raises(UsageError, match=named):
        evaluate(model, data, batch_size=5, progress=lambda *done: seen.append(done))
    assert seen == []


@pytest.mark.skipif("AzureExecutionProvider" not in available(), reason="needs a provider that runs no node here")
def test_a_provider_that_runs_nothing_is_refused(model):
    with pytest.raises(UsageError, match=r"asked for Azure.*ran no node"):
        evaluate(model, DATA, provider="azure")


def test_models_that_do_not_fit_are_named(model, tmp_path):
    with pytest.raises(UsageError, match=r"two\.onnx takes 2 inputs.*z"):
        evaluate(save(tmp_path / "two.onnx", count=2), DATA)
    with pytest.raises(UsageError, match=r"5 classes.*reference .*m\.onnx 8"):
        evaluate(save(tmp_path / "five.onnx", WEIGHT[:, :5]), ArrayData(INPUTS, LABELS % 5), reference=model)
    with pytest.raises(ModelError, match=r"nan\.onnx.*NaN"):
        evaluate(save(tmp_path / "nan.onnx", WEIGHT * np.nan), DATA)
    with pytest.raises(ModelError, match=r"one\.onnx.*class scores.*\(50, 1\)"):
        evaluate(save(tmp_path / "one.onnx", WEIGHT[:, :1]), DATA)
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        evaluate(tmp_path / "absent.onnx", DATA)
