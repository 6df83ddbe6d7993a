import numpy as np
import pytest
from calibrated_nets import inputs, text_net, texts
from nets import initializers, mlp_onnx, run_onnx

from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.calibration.output_agreement import CHECKED_SAMPLES, output_agreement
from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.evaluation.scores import divergence
from rsi_deploy.runtime.feeds.inputs import model_inputs


@pytest.fixture
def pair(tmp_path):
    """Two MLPs that differ in one weight."""
    a = mlp_onnx(tmp_path / "a.onnx")
    head = initializers(a)["head.weight"]
    noise = np.random.default_rng(0).standard_normal(head.shape).astype(np.float32)
    return a, mlp_onnx(tmp_path / "b.onnx", head=head + 0.1 * noise)


def data_for(model, path, size=1024):
    return CalibrationData(path, model_inputs(model), None, size)


def test_the_record_follows_the_formulas(pair, tmp_path):
    path = inputs(tmp_path / "x.npz", 12, count=100)
    record, _ = output_agreement(*pair, data_for(pair[0], path), "cpu")
    z, w = (run_onnx(model, np.load(path)["x"])[0].astype(np.float64) for model in pair)
    assert record.output_error == pytest.approx(((z - w) ** 2).sum() / ((z - z.mean(0)) ** 2).sum(), rel=1e-5)
    assert record.divergence == pytest.approx(divergence(z, w).mean(), rel=1e-4)
    assert record.agreement == pytest.approx(100 * (z.argmax(1) == w.argmax(1)).mean())
    assert 0 < record.agreement < 100
    assert (record.samples, record.checked) == (100, 100)


def test_a_model_against_itself(pair, tmp_path):
    path = inputs(tmp_path / "x.npz", 12, count=40)
    record, _ = output_agreement(pair[0], pair[0], data_for(pair[0], path), "cpu")
    assert (record.output_error, record.divergence, record.agreement) == (0, 0, 100)


def test_known_outputs_of_the_dense_model_are_not_computed_again(pair, tmp_path):
    path = inputs(tmp_path / "x.npz", 12, count=700)
    data = data_for(pair[0], path)
    record, answers = output_agreement(*pair, data, "cpu")
    assert answers.shape[0] == CHECKED_SAMPLES
    again, same = output_agreement(tmp_path / "nowhere.onnx", pair[1], data, "cpu", answers)
    assert again == record
    assert same is answers
    assert output_agreement(tmp_path / "nowhere.onnx", pair[1], data, "cpu", answers + 1)[0] != record


def test_many_samples_are_not_all_run(pair, tmp_path):
    path = inputs(tmp_path / "x.npz", 12, count=700)
    record, _ = output_agreement(*pair, data_for(pair[0], path), "cpu")
    assert (record.samples, record.checked) == (700, CHECKED_SAMPLES)


def test_the_fingerprint_depends_on_the_samples(pair, tmp_path):
    def fingerprint(path, size=1024):
        return output_agreement(*pair, data_for(pair[0], path, size), "cpu")[0].data_fingerprint

    first = inputs(tmp_path / "x.npz", 12, count=40)
    assert fingerprint(first) == fingerprint(inputs(tmp_path / "same.npz", 12, count=40))
    assert fingerprint(first) != fingerprint(inputs(tmp_path / "other.npz", 12, count=40, seed=2))
    assert fingerprint(first) != fingerprint(first, 39)


def test_embeddings_have_no_scores(tmp_path):
    model = text_net(tmp_path / "t.onnx")
    other = text_net(tmp_path / "u.onnx", seed=1)
    record, _ = output_agreement(model, other, data_for(model, texts(tmp_path / "t.npz")), "cpu")
    assert record.output_error > 0.5
    assert record.divergence is record.agreement is None


def test_outputs_that_are_all_zero_have_no_error(tmp_path):
    zero = mlp_onnx(tmp_path / "z.onnx", head=np.zeros((10, 24)))
    from onnx import load, numpy_helper, save

    model = load(zero)
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(10, np.float32), tensor.name))
    save(model, zero)
    other = mlp_onnx(tmp_path / "o.onnx")
    data = data_for(zero, inputs(tmp_path / "x.npz", 12, count=40))
    assert output_agreement(zero, other, data, "cpu")[0].output_error is None
    assert output_agreement(zero, zero, data, "cpu")[0].output_error == 0


def test_nan_in_the_compressed_model_alone_is_refused(pair, tmp_path):
    broken = mlp_onnx(tmp_path / "n.onnx", head=np.full((10, 24), np.nan))
    data = data_for(pair[0], inputs(tmp_path / "x.npz", 12, count=40))
    with pytest.raises(GateError, match="NaN or infinite outputs on the calibration data"):
        output_agreement(pair[0], broken, data, "cpu")
    record, _ = output_agreement(broken, broken, data, "cpu")
    assert record.output_error == 0


def test_a_model_without_a_floating_output(tmp_path):
    from calibrated_nets import saved
    from onnx import TensorProto, helper

    node = helper.make_node("ArgMax", ["x"], ["y"], "top", axis=1)
    path = saved(
        tmp_path / "m.onnx", [node], {}, {"x": (TensorProto.FLOAT, ["N", 12])}, {"y": (TensorProto.INT64, ["N", 1])}
    )
    data = data_for(path, inputs(tmp_path / "x.npz", 12, count=4))
    with pytest.raises(UsageError, match="no floating output to compare"):
        output_agreement(path, path, data, "cpu")
