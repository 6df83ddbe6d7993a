import weakref

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.data.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.data.sources import ArrayData, NamedData
from rsi_deploy.evaluation.accuracy import AccuracyResult, check_data, evaluate, evaluate_all
from rsi_deploy.evaluation.scores import divergence
from rsi_deploy.runtime.providers import available_providers

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


def test_a_comparison_with_a_reference_needs_no_labels(model):
    result = evaluate(model, ArrayData(INPUTS), reference=model)
    assert (result.top1, result.top1_interval, result.top5, result.agreement) == (None, None, None, 100)
    with pytest.raises(UsageError, match="no labels"):
        evaluate(model, ArrayData(INPUTS))


def test_probabilities_are_not_squashed_again(model, tmp_path):
    soft = save(tmp_path / "soft.onnx", softmax=True)
    assert evaluate(soft, DATA, reference=model).divergence == pytest.approx(0, abs=1e-6)


def test_few_classes_have_no_top5(tmp_path):
    result = evaluate(save(tmp_path / "m.onnx", WEIGHT[:, :5]), ArrayData(INPUTS, LABELS % 5))
    assert result.top5 is None
    assert result.top1 is not None


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
    with pytest.raises(UsageError, match=r"other\.onnx takes x.*data are int64"):
        evaluate(other, ArrayData(INPUTS.astype(np.int64), LABELS))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (ArrayData(INPUTS[:, :5], LABELS), r"m\.onnx takes x: float32 \(N, 6\).*\(samples, 5\)"),
        (ArrayData(INPUTS[:, :, None], LABELS), r"\(samples, 6, 1\)"),
        (ArrayData(INPUTS, LABELS + 1), r"8 classes.*to 8"),
        (ArrayData(INPUTS, LABELS - 1), "from -1"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_long_run(model, data, named):
    seen = []
    with pytest.raises(UsageError, match=named):
        evaluate(model, data, batch_size=5, progress=lambda *done: seen.append(done))
    assert seen == []


@pytest.mark.skipif(
    "AzureExecutionProvider" not in available_providers(), reason="needs a provider that runs no node here"
)
def test_a_provider_that_runs_nothing_is_refused(model):
    with pytest.raises(UsageError, match=r"Azure.* was requested.*ran no node"):
        evaluate(model, DATA, provider="azure")


def test_models_that_do_not_fit_are_named(model, tmp_path):
    with pytest.raises(UsageError, match=r"two\.onnx has the inputs x, z, but the data hold one array; give an \.npz"):
        evaluate(save(tmp_path / "two.onnx", count=2), DATA)
    with pytest.raises(UsageError, match=r"5 classes.*reference .*m\.onnx 8"):
        evaluate(save(tmp_path / "five.onnx", WEIGHT[:, :5]), ArrayData(INPUTS, LABELS % 5), reference=model)
    with pytest.raises(ModelError, match=r"nan\.onnx.*NaN"):
        evaluate(save(tmp_path / "nan.onnx", WEIGHT * np.nan), DATA)
    with pytest.raises(ModelError, match=r"one\.onnx.*class scores.*\(50, 1\)"):
        evaluate(save(tmp_path / "one.onnx", WEIGHT[:, :1]), DATA)
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        evaluate(tmp_path / "absent.onnx", DATA)


# -- against a reference: intervals, the paired test, values


def test_intervals_hold_what_they_are_of(model, tmp_path):
    noisy = WEIGHT + 0.8 * RNG.standard_normal(WEIGHT.shape).astype(np.float32)
    found = evaluate(save(tmp_path / "noisy.onnx", noisy), DATA, reference=model)
    for name in ("top1", "top5", "agreement", "divergence"):
        low, high = getattr(found, f"{name}_interval")
        assert low < getattr(found, name) < high, name
    alone = evaluate(model, DATA)
    assert (alone.agreement_interval, alone.divergence_interval, alone.paired, alone.values) == (None, None, None, ())


def test_the_paired_test_counts_answers_that_became_wrong(model, tmp_path):
    noisy = WEIGHT + 0.8 * RNG.standard_normal(WEIGHT.shape).astype(np.float32)
    before, after = SCORES.argmax(axis=1) == LABELS, (INPUTS @ noisy).argmax(axis=1) == LABELS
    paired = evaluate(save(tmp_path / "noisy.onnx", noisy), DATA, reference=model, batch_size=7).paired
    assert (paired.lost, paired.won) == ((before & ~after).sum(), (after & ~before).sum())
    assert paired.lost > paired.won, "the noise must lose answers for this test to say something"
    assert paired.change == pytest.approx(100 * (after.mean() - before.mean()))
    assert evaluate(model, DATA, reference=model).paired.verdict == "the same answers are right of 50"


def test_models_in_one_pass_have_the_same_results_as_one_by_one(model, tmp_path):
    noisy = save(tmp_path / "noisy.onnx", WEIGHT + 0.5)
    fixed = save(tmp_path / "fixed.onnx", -WEIGHT, batch=7)
    alone = [evaluate(model, DATA), *(evaluate(m, DATA, reference=model) for m in (noisy, fixed))]
    assert evaluate_all([model, noisy, fixed], DATA) == alone


def test_embeddings_are_compared_by_angle_and_distance(tmp_path):
    unit = INPUTS / np.linalg.norm(INPUTS, axis=1, keepdims=True)
    rotated, _ = np.linalg.qr(np.eye(6) + 0.3 * RNG.standard_normal((6, 6)))
    dense = save(tmp_path / "dense.onnx", np.eye(6, dtype=np.float32))
    other = save(tmp_path / "other.onnx", rotated.astype(np.float32))
    found = evaluate(other, ArrayData(unit), reference=dense)
    (values,) = found.values
    angles = (unit * (unit @ rotated)).sum(axis=1)
    assert (found.kind, found.classes, found.top1, found.agreement, found.divergence) == ("values", 0, None, None, None)
    assert values.output == "y"
    np.testing.assert_allclose(values.cosine, angles.mean(), rtol=1e-5)
    np.testing.assert_allclose(values.distance, np.sqrt(2 - 2 * angles).mean(), rtol=1e-5)
    assert values.cosine_interval[0] < values.cosine < values.cosine_interval[1] < 1
    assert AccuracyResult.model_validate_json(found.model_dump_json()) == found
    (same,) = evaluate(dense, ArrayData(unit), reference=dense).values
    assert (same.cosine, same.distance) == (pytest.approx(1), 0)


def test_a_regression_has_values_and_the_user_may_say_what_outputs_are(model, tmp_path):
    one = save(tmp_path / "one.onnx", WEIGHT[:, :1])
    assert evaluate(one, ArrayData(INPUTS), reference=one).values[0].distance == 0
    assert evaluate(one, DATA, reference=one, outputs="values").kind == "values", "its labels are none of these"
    found = evaluate(model, ArrayData(INPUTS), reference=model, outputs="classes")
    assert (found.kind, found.agreement, found.values) == ("classes", 100, ())
    guessed = evaluate(model, ArrayData(INPUTS), reference=model)
    assert guessed.agreement == 100
    assert guessed.values[0].cosine == pytest.approx(1)
    with pytest.raises(ModelError, match=r"one\.onnx.*class scores.*--outputs values"):
        evaluate(one, ArrayData(INPUTS), reference=one, outputs="classes")
    with pytest.raises(UsageError, match="need a reference.*--reference"):
        evaluate(one, DATA, outputs="values")
    with pytest.raises(UsageError, match=r"one\.onnx gives outputs \[\(50, 1\)\], but the reference .*\[\(50, 8\)\]"):
        evaluate(one, ArrayData(INPUTS), reference=model, outputs="values")


IDS = RNG.integers(0, 20, (30, 5))
MASK = np.arange(5) < RNG.integers(1, 6, (30, 1))
TABLE = RNG.standard_normal((20, 4)).astype(np.float32)
TEXTS = {"ids": IDS, "mask": MASK.astype(np.int64)}


def encoder(path, table=TABLE, *, pooled=False):
    """`hidden = table[ids] (n, 5, 4)`, or its masked sum `(n, 4)`."""
    shape = ["N", 4] if pooled else ["N", 5, 4]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h" if pooled else "hidden"]),
        helper.make_node("Cast", ["mask"], ["m"], to=1),
    ]
    if pooled:
        nodes += [
            helper.make_node("Unsqueeze", ["m", "two"], ["m3"]),
            helper.make_node("Mul", ["h", "m3"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "one"], ["hidden"], keepdims=0),
        ]
    inputs = [helper.make_tensor_value_info(name, 7, ["N", 5]) for name in ("ids", "mask")]
    weights = [numpy_helper.from_array(table, "table")]
    weights += [numpy_helper.from_array(np.array([v]), n) for v, n in ((2, "two"), (1, "one"))]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("hidden", 1, shape)], weights)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_several_inputs_are_fed_by_their_names(tmp_path):
    net = encoder(tmp_path / "m.onnx", pooled=True)
    pooled = (TABLE[IDS] * MASK[..., None]).sum(axis=1)
    np.savez(tmp_path / "t.npz", **TEXTS, labels=pooled.argmax(axis=1))
    assert evaluate(net, tmp_path / "t.npz").top1 == 100
    unmasked = NamedData({"ids": IDS, "mask": np.ones_like(IDS)}, pooled.argmax(axis=1))
    assert evaluate(net, unmasked).top1 < 100, "the mask must have been fed"
    with pytest.raises(UsageError, match=r"--data: .*m\.onnx has the inputs ids, mask, but the data hold ids, masks"):
        evaluate(net, NamedData({"ids": IDS, "masks": MASK}, np.zeros(30, int)))


def test_positions_that_are_masked_away_do_not_count(tmp_path):
    net = encoder(tmp_path / "m.onnx")
    padded = IDS.copy()
    padded[~MASK] = 0
    assert not MASK.all()
    table = TABLE.copy()
    table[0] += 100  # seen at masked positions, and where 0 is a word
    words = {"ids": np.where(MASK & (IDS == 0), 1, padded), "mask": TEXTS["mask"]}
    other = encoder(tmp_path / "o.onnx", table)
    assert evaluate(other, NamedData(words), reference=net).values[0].distance == 0
    words["mask"] = np.ones_like(IDS)
    assert evaluate(other, NamedData(words), reference=net).values[0].distance > 1


def test_labels_and_classes_that_do_not_match_are_refused_with_both_numbers(model):
    data = ArrayData(INPUTS, LABELS % 3)
    data.classes = ("ant", "bee", "cat", "dog")
    with pytest.raises(UsageError, match=r"has 8 classes, but the data name 4 \(ant, bee, cat, \.\.\.\)"):
        evaluate(model, data)


def test_interrupted_it_tells_what_was_seen(model):
    def stop(done, total):
        if done >= 20:
            raise KeyboardInterrupt

    found = evaluate(model, DATA, reference=model, batch_size=10, progress=stop)
    assert (found.partial, found.samples, found.paired.samples) == (True, 20, 20)
    np.testing.assert_allclose(found.top1, direct(SCORES[:20], LABELS[:20])[0])

    def at_once(*_):
        raise KeyboardInterrupt

    data = ArrayData(INPUTS, LABELS)
    data.batches = at_once
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data)


def test_one_batch_is_in_memory_at_a_time(model):
    """Every batch of the data must be freed when the batch after the next one is read."""
    alive = []

    class Counted(ArrayData):
        def batches(self, *args):
            for inputs, labels in super().batches(*args):
                batch = inputs.copy()
                alive.append(weakref.ref(batch))
                assert sum(ref() is not None for ref in alive) <= 2
                del inputs
                yield batch, labels
                del batch

    assert evaluate(model, Counted(INPUTS, LABELS), reference=model, batch_size=5).samples == 50
    assert len(alive) == 10


def test_errors_are_found_on_one_sample(model):
    check_data([model, model], DATA)
    for data, words in (
        (ArrayData(INPUTS, LABELS + 1), "8 classes.*to 8"),
        (ArrayData(INPUTS[:, :5], LABELS), "takes x"),
        (ArrayData(INPUTS), "no labels"),
    ):
        with pytest.raises(UsageError, match=words):
            check_data([model], data)


def test_several_whole_numbers_a_sample_are_no_answers_to_labels(tmp_path):
    """They are neither scores nor one class id: the model is named, and what it would have to give."""
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.INT64)]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 6])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ["N", 6])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "top.onnx")
    with pytest.raises(ModelError, match=r"top\.onnx: .*one class id per sample, but it returns .*6\)"):
        evaluate(tmp_path / "top.onnx", DATA)
