import numpy as np
import onnx
import pytest
from models import bundle_of, graph, mixing, mlp_bundle, pooled, tokens, weight
from nets import mlp_onnx
from onnx import TensorProto, helper

from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.packaging.servable import read_dense, read_servable


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return mlp_bundle(tmp_path_factory.mktemp("mlp"))


def test_tensors_are_as_onnxruntime_has_them(mlp, tmp_path):
    model = read_servable(mlp)
    assert [str(tensor) for tensor in (*model.inputs, *model.outputs)] == [
        "input: float (batch, 12)",
        "output: float (batch, 10)",
    ]
    assert model.notes == ()
    made = bundle_of(tokens(tmp_path / "t.onnx"), tmp_path / "t", input_shape=["ids=2x7"])
    shapes = {tensor.name: (tensor.type, tensor.shape) for tensor in read_servable(made).outputs}
    assert shapes == {
        "vector": ("float", ("batch", 32)),
        "score": ("float", ("batch",)),
        "same": ("int64", ("batch", "length")),
    }


def test_independent_samples_may_be_batched(mlp, tmp_path):
    assert read_servable(mlp).unbatchable == ""
    made = bundle_of(tokens(tmp_path / "t.onnx"), tmp_path / "t", input_shape=["ids=2x7"])
    assert read_servable(made).unbatchable == ""


def test_dependent_samples_are_found(tmp_path):
    made = bundle_of(mixing(tmp_path / "m.onnx"), tmp_path / "m")
    assert "ReduceMean 'm' reduces over the batch axis (axis 0 of 'p')" in read_servable(made).unbatchable
    rng = np.random.default_rng(0)
    given = read_servable(made, {"x": rng.standard_normal((2, 32)).astype(np.float32)})
    assert "ReduceMean 'm'" in given.unbatchable


def test_dimensions_that_forbid_a_batch_are_named(tmp_path):
    fixed = bundle_of(mlp_onnx(tmp_path / "f.onnx", batch=2), tmp_path / "f")
    assert read_servable(fixed).unbatchable == "input input (2, 12) has no dynamic first dimension"
    summed = bundle_of(pooled(tmp_path / "p.onnx"), tmp_path / "p")
    assert read_servable(summed).unbatchable == "output y () has no dynamic first dimension"


def test_one_given_sample_is_not_enough(mlp):
    one = {"input": np.ones((1, 12), np.float32)}
    assert "--feeds FILE.npz with two or more" in read_servable(mlp, one).unbatchable
    two = {"input": np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)}
    assert read_servable(mlp, two).unbatchable == ""


def test_a_changed_bundle_is_refused(tmp_path):
    made = mlp_bundle(tmp_path)
    (made / "README.md").write_text("mine")
    with pytest.raises(GateError, match=r"not the bundle that was written: changed: README\.md"):
        read_servable(made)
    (made / "manifest.json").unlink()
    assert "written before bundles had one" in read_servable(made).notes[0]
    with pytest.raises(UsageError, match="no bundle"):
        read_servable(tmp_path)


def test_feeds_that_do_not_fit_are_refused(mlp):
    with pytest.raises(UsageError, match="takes input: float32"):
        read_servable(mlp, {"input": np.ones((2, 13), np.float32)})


def test_the_dense_model_must_have_the_same_inputs_and_outputs(mlp, tmp_path):
    compressed = read_servable(mlp)
    dense = read_dense(mlp.parent / "mlp.onnx", compressed)
    assert (dense.inputs, dense.outputs, dense.unbatchable) == (compressed.inputs, compressed.outputs, "")
    assert dense.model == mlp.parent / "mlp.onnx"
    with pytest.raises(
        UsageError, match=r"--dense .*p\.onnx takes x: float \(n, 32\), the bundle's model input: float"
    ):
        read_dense(pooled(tmp_path / "p.onnx"), compressed)
    with pytest.raises(UsageError, match="gives output"):
        read_dense(mlp_onnx(tmp_path / "o.onnx", sizes=(12, 8, 9)), compressed)


def test_a_dense_model_whose_output_is_no_tensor_is_refused(mlp, tmp_path):
    x = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 12])
    y = helper.make_tensor_sequence_value_info("pair", TensorProto.FLOAT, None)
    pair = helper.make_graph([helper.make_node("SequenceConstruct", ["input", "input"], ["pair"])], "g", [x], [y])
    onnx.save(helper.make_model(pair, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "s.onnx")
    with pytest.raises(UsageError, match=r"gives pair: seq\(tensor\(float\)\)"):
        read_dense(tmp_path / "s.onnx", read_servable(mlp))


def test_a_model_that_random_inputs_break_needs_feeds(tmp_path):
    """The table has one row, so the random id 1 is invalid."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
    values = [[("ids", TensorProto.INT64, ["n"])], [("y", TensorProto.FLOAT, ["n", 32])]]
    path = graph(tmp_path / "m.onnx", nodes, *values, [weight(1, 32, "table"), weight(32, 32)])
    feeds = {"ids": np.zeros(8, np.int64)}
    made = bundle_of(path, tmp_path / "b", feeds=feeds)
    assert read_servable(made, feeds).feeds_given
    with pytest.raises(
        UsageError, match=r"the run failed: .*random inputs may be invalid for the model: add --feeds FILE\.npz"
    ):
        read_servable(made)
    with pytest.raises(ModelError, match="the run failed"):
        read_servable(made, {"ids": np.ones(8, np.int64)})
