"""Short inner names: the same answers from a smaller file, with all names that users and reports know."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from calibrated_nets import branch_net, conv_net, text_net
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy.precision.compact import compact_
from rsi_deploy.precision.quantizers import quantize
from rsi_deploy.precision.schemes import DYNAMIC, static


def run(model, values):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, values)


def signature(model):
    return [[value.SerializeToString() for value in values] for values in (model.graph.input, model.graph.output)]


@pytest.fixture(params=["images", "texts"])
def case(request, tmp_path):
    """A quantized model, inputs, and the names of the float model's nodes."""
    if request.param == "images":
        source, scheme = conv_net(tmp_path / "m.onnx"), static("minmax")
        values = {"input": np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(np.float32)}
    else:
        source, scheme = text_net(tmp_path / "m.onnx"), DYNAMIC
        values = {"ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}
    quantize(source, tmp_path / "q.onnx", scheme, lambda: iter([values]))
    return onnx.load(tmp_path / "q.onnx"), values, frozenset(node.name for node in onnx.load(source).graph.node)


def test_answers_and_known_names_stay(case):
    model, values, names = case
    before = onnx.ModelProto()
    before.CopyFrom(model)
    compact_(model, names)
    onnx.checker.check_model(model)
    assert all(np.array_equal(a, b) for a, b in zip(run(model, values), run(before, values), strict=True))
    assert signature(model) == signature(before)
    kept = [node.name for node in before.graph.node if node.name in names]
    assert kept
    assert [node.name for node in model.graph.node if node.name] == kept
    assert model.ByteSize() < before.ByteSize() - 1000
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    inner = {name for node in model.graph.node for name in (*node.input, *node.output)} - ends - {""}
    assert max(map(len, inner)) <= 2
    assert not inner & ends


def test_the_comparison_sees_a_changed_weight(case):
    model, values, names = case
    expected = run(model, values)
    compact_(model, names)
    large = [t for t in model.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    large[0].raw_data = large[0].raw_data[::-1]
    assert not all(np.array_equal(a, b) for a, b in zip(run(model, values), expected, strict=True))


def test_a_second_time_changes_nothing(case):
    model, _, names = case
    compact_(model, names)
    once = model.SerializeToString(deterministic=True)
    compact_(model, names)
    assert model.SerializeToString(deterministic=True) == once


def test_models_with_subgraphs_or_functions_are_untouched(tmp_path):
    model = onnx.load(branch_net(tmp_path / "m.onnx"))
    before = model.SerializeToString(deterministic=True)
    compact_(model, frozenset())
    assert model.SerializeToString(deterministic=True) == before
    plain = onnx.load(conv_net(tmp_path / "c.onnx"))
    relu = helper.make_node("Relu", ["a"], ["b"])
    plain.functions.append(helper.make_function("mine", "F", ["a"], ["b"], [relu], plain.opset_import))
    before = plain.SerializeToString(deterministic=True)
    compact_(plain, frozenset())
    assert plain.SerializeToString(deterministic=True) == before


def small_model(first, second):
    """Add two constants to an input named like a short name."""
    nodes = [helper.make_node("Add", ["a", "first"], ["sum"], "n"), helper.make_node("Add", ["sum", "second"], ["b"])]
    infos = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])] for name in ("a", "b")]
    tensors = [numpy_helper.from_array(array, name) for name, array in (("first", first), ("second", second))]
    return helper.make_model(
        helper.make_graph(nodes, "g", *infos, tensors), ir_version=10, opset_imports=[helper.make_opsetid("", 20)]
    )


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        (np.array([1, 2], np.float32), 1),
        (np.array([1, 3], np.float32), 2),
        (np.array([[1, 2]], np.float32)[0:1], 2),  # equal numbers of another shape
    ],
)
def test_equal_constants_are_stored_once_and_inputs_named_like_short_names_stay(second, kept):
    first = np.array([1, 2], np.float32)
    model = small_model(first, second)
    if second.ndim == 2:
        model.graph.output[0].type.tensor_type.shape.dim.insert(0, model.graph.output[0].type.tensor_type.shape.dim[0])
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    compact_(model, frozenset())
    assert len(model.graph.initializer) == kept
    x = np.array([5, 7], np.float32)
    assert np.array_equal(run(model, {"a": x})[0], x + first + second)
    assert len({*(t.name for t in model.graph.initializer), "a", "b"}) == kept + 2
