from dataclasses import replace

import numpy as np
import pytest
from calibrated_nets import inputs, saved, text_net, texts
from nets import initializers, mlp_onnx, run_onnx

from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.calibration.output_agreement import _moved, calibration_record, dense_outputs, output_quality
from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.evaluation.accumulator import shown_positions
from rsi_deploy.evaluation.scores import divergence
from rsi_deploy.runtime.feeds.inputs import model_inputs


@pytest.fixture
def pair(tmp_path):
    """Two MLPs that differ in one weight."""
    a = mlp_onnx(tmp_path / "a.onnx")
    head = initializers(a)["head.weight"]
    noise = np.random.default_rng(0).standard_normal(head.shape).astype(np.float32)
    return a, mlp_onnx(tmp_path / "b.onnx", head=head + 0.1 * noise)


def data_for(model, path, size=1024, **parts):
    return CalibrationData(path, model_inputs(model), None, size, **parts)


def quality_of(dense, compressed, part):
    return output_quality(dense_outputs(dense, part, "cpu"), compressed, part, "cpu")


def values_of(model, part):
    return np.concatenate([run_onnx(model, feeds)[0] for feeds in part.feeds()]).astype(np.float64)


def test_the_check_part_alone_gives_its_values(pair, tmp_path):
    data = data_for(pair[0], inputs(tmp_path / "x.npz", 12, count=500))
    record, _ = calibration_record(*pair, data, "cpu")
    assert (record.samples, record.check_samples, record.in_sample.samples) == (400, 100, 400)
    for quality, part in ((record.checked, data.check), (record.in_sample, data.in_sample)):
        z, w = (values_of(model, part) for model in pair)
        assert quality.output_error == pytest.approx(((z - w) ** 2).sum() / ((z - z.mean(0)) ** 2).sum(), rel=1e-5)
        assert quality.divergence == pytest.approx(divergence(z, w).mean(), rel=1e-4)
        assert quality.agreement == pytest.approx(100 * (z.argmax(1) == w.argmax(1)).mean())
        assert 0 < quality.agreement < 100
        scores = np.exp(z - z.max(axis=1, keepdims=True))
        assert quality.confidence == pytest.approx((scores.max(axis=1) / scores.sum(axis=1)).mean(), rel=1e-5)
    assert record.quality is record.checked != record.in_sample


def test_a_single_sample_has_in_sample_values_alone(pair, tmp_path):
    record, _ = calibration_record(*pair, data_for(pair[0], inputs(tmp_path / "x.npz", 12, count=1)), "cpu")
    assert record.checked is None
    assert (record.check_samples, record.needed) == (0, 128)
    assert record.quality is record.in_sample


def test_a_model_against_itself(pair, tmp_path):
    data = data_for(pair[0], inputs(tmp_path / "x.npz", 12, count=200))
    quality = quality_of(pair[0], pair[0], data.check)
    assert (quality.output_error, quality.divergence, quality.agreement) == (0, 0, 100)
    assert quality.agreement_at_least < 100, "64 samples cannot show more than 95 %"
    assert not quality.is_broken


def test_known_outputs_of_the_dense_model_are_not_computed_again(pair, tmp_path):
    data = data_for(pair[0], inputs(tmp_path / "x.npz", 12, count=700))
    record, outputs = calibration_record(*pair, data, "cpu")
    again, same = calibration_record(tmp_path / "nowhere.onnx", pair[1], data, "cpu", outputs)
    assert (again, same) == (record, outputs)
    other = {name: replace(part, batches=tuple(b + 1 for b in part.batches)) for name, part in outputs.items()}
    assert calibration_record(tmp_path / "nowhere.onnx", pair[1], data, "cpu", other)[0] != record


def test_the_fingerprint_depends_on_the_samples(pair, tmp_path):
    def fingerprint(path, **parts):
        return calibration_record(*pair, data_for(pair[0], path, **parts), "cpu")[0].checked.data_fingerprint

    first = inputs(tmp_path / "x.npz", 12, count=140)
    assert fingerprint(first) == fingerprint(inputs(tmp_path / "same.npz", 12, count=140))
    assert fingerprint(first) != fingerprint(inputs(tmp_path / "other.npz", 12, count=140, seed=2))
    assert fingerprint(first) != fingerprint(first, seed=1)
    assert fingerprint(first) != fingerprint(first, check_size=63)


# -- embeddings


def test_embeddings_have_cosines_and_neighbours(tmp_path):
    model, other = text_net(tmp_path / "t.onnx"), text_net(tmp_path / "u.onnx", seed=1)
    data = data_for(model, texts(tmp_path / "t.npz"))
    quality = quality_of(model, other, data.check)
    assert quality.divergence is quality.agreement is quality.confidence is None
    z, w = (np.concatenate([run_onnx(each, feeds)[0] for feeds in data.check.feeds()]) for each in (model, other))
    angles = (z * w).sum(axis=1)
    assert quality.cosine == pytest.approx(angles.mean(), abs=1e-5)
    assert quality.worst_cosine == pytest.approx(np.percentile(angles, 1), abs=1e-5)
    assert quality.cosine_at_least < quality.cosine
    assert quality.neighbours < 90
    assert quality.is_broken
    same = quality_of(model, model, data.check)
    assert (same.neighbours, same.is_broken) == (100, False)
    record, _ = calibration_record(model, other, data, "cpu")
    assert len(data.check.rows) < len(data.in_sample.rows)
    assert abs(record.in_sample.neighbours - record.checked.neighbours) < 15, "both are among as many samples"
    assert quality_of(model, other, data.in_sample).neighbours < record.in_sample.neighbours
    assert same.cosine == pytest.approx(1)


# -- intervals


def noisy(tmp_path, count):
    """Outputs with noise of a known size: x against x + noise that stands in a second input."""
    from onnx import TensorProto, helper

    shapes = {"x": (TensorProto.FLOAT, ["N", 3, 2]), "noise": (TensorProto.FLOAT, ["N", 3, 2])}
    out = {"y": (TensorProto.FLOAT, ["N", 3, 2])}
    zero = {"zero": np.zeros(1, np.float32), "one": np.ones(1, np.float32)}
    paths = []
    for name, factor in (("dense", "zero"), ("moved", "one")):
        nodes = [helper.make_node("Mul", ["noise", factor], ["n"]), helper.make_node("Add", ["x", "n"], ["y"])]
        paths.append(saved(tmp_path / f"{name}.onnx", nodes, zero, shapes, out))
    return paths


def test_intervals_of_the_output_error_hold_the_truth(tmp_path):
    """Noise of standard deviation 0.3 on outputs of 1 has an output error of 0.09; some samples have more noise."""
    dense, moved = noisy(tmp_path, 100)
    held = limits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        size = rng.choice([0.1, 0.4], (200, 1, 1), p=[7 / 15, 8 / 15])  # mean square 0.09
        arrays = {"x": rng.standard_normal((200, 3, 2)), "noise": size * rng.standard_normal((200, 3, 2))}
        data = data_for(dense, {name: array.astype(np.float32) for name, array in arrays.items()}, check_size=100)
        quality = quality_of(dense, moved, data.check)
        low, high = quality.output_error_interval
        held += low <= 0.09 <= high
        limits += quality.output_error_at_most >= 0.09
        assert low < quality.output_error < quality.output_error_at_most < high
    assert held >= 34
    assert limits >= 34


def test_what_is_broken():
    def quality(**values):
        return OutputQuality(samples=100, data_fingerprint="", **{"output_error": 0.1} | values)

    assert quality(agreement=30, agreement_interval=(22, 40)).is_broken
    assert not quality(agreement=45, agreement_interval=(35.6, 54.8), output_error=3).is_broken, "it may be 54 %"
    assert quality(cosine=0.4).is_broken
    assert not quality(cosine=0.6, output_error=0.8).is_broken
    assert quality(output_error=0.6).is_broken
    assert not quality(output_error=0.4).is_broken


def test_an_overfitted_model_is_seen_on_the_check_part_alone(tmp_path):
    """A wide classifier of 40 random samples: its fit is nearly perfect, and worthless elsewhere."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((10, 256))
    model = mlp_onnx(tmp_path / "m.onnx", sizes=(256, 10), head=weight)
    fitted, other = (rng.standard_normal((count, 256)).astype(np.float32) for count in (40, 200))
    np.savez(tmp_path / "fit.npz", x=fitted)
    np.savez(tmp_path / "other.npz", x=other)
    rank = np.linalg.pinv(fitted) @ fitted  # what a fit to these samples alone keeps of the inputs
    worse = mlp_onnx(tmp_path / "w.onnx", sizes=(256, 10), head=weight @ rank)
    data = data_for(model, tmp_path / "fit.npz", check_source=tmp_path / "other.npz")
    record, _ = calibration_record(model, worse, data, "cpu")
    assert record.in_sample.agreement > 95
    assert record.checked.agreement < 70
    assert record.checked.output_error > 0.5


def test_outputs_that_are_all_zero_have_no_error(tmp_path):
    zero = mlp_onnx(tmp_path / "z.onnx", head=np.zeros((10, 24)))
    from onnx import load, numpy_helper, save

    model = load(zero)
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(10, np.float32), tensor.name))
    save(model, zero)
    other = mlp_onnx(tmp_path / "o.onnx")
    part = data_for(zero, inputs(tmp_path / "x.npz", 12, count=40)).check
    assert quality_of(zero, other, part).output_error is None
    assert quality_of(zero, zero, part).output_error == 0


def test_nan_in_the_compressed_model_alone_is_refused(pair, tmp_path):
    broken = mlp_onnx(tmp_path / "n.onnx", head=np.full((10, 24), np.nan))
    part = data_for(pair[0], inputs(tmp_path / "x.npz", 12, count=40)).check
    with pytest.raises(GateError, match="NaN or infinite outputs on the calibration data"):
        quality_of(pair[0], broken, part)
    assert quality_of(broken, broken, part).output_error == 0


def test_a_model_without_a_floating_output(tmp_path):
    from onnx import TensorProto, helper

    node = helper.make_node("ArgMax", ["x"], ["y"], "top", axis=1)
    path = saved(
        tmp_path / "m.onnx", [node], {}, {"x": (TensorProto.FLOAT, ["N", 12])}, {"y": (TensorProto.INT64, ["N", 1])}
    )
    data = data_for(path, inputs(tmp_path / "x.npz", 12, count=4))
    with pytest.raises(UsageError, match="no floating output to compare"):
        quality_of(path, path, data.check)


def test_padding_does_not_count():
    """What a model gives at positions that the mask hides is no error, and no variance either."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((40, 6, 5)).astype(np.float32)
    mask = (np.arange(6) < rng.integers(2, 7, (40, 1))).astype(np.int64)
    w = z + 0.1 * rng.standard_normal(z.shape).astype(np.float32)
    wild = np.where(mask[..., None] == 1, w, 100)
    errors = []
    for feeds in ({"attention_mask": mask}, {}):
        shown = shown_positions(z, feeds)
        moved, spread = _moved([(z * shown, wild * shown, shown)])
        errors.append(moved.sum() / spread.sum())
    rows, others = z[mask == 1], w[mask == 1]
    by_hand = np.square(others - rows).sum() / np.square(rows - rows.mean(0)).sum()
    assert errors[0] == pytest.approx(by_hand, rel=0.1)
    assert errors[1] > 1000 * errors[0]
