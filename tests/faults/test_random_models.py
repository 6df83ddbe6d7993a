"""A model whose outputs change in every run is refused for that reason."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

import rsi_deploy
from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.runtime.parity import check_repeatable, explain_random_models


def written(path, nodes, opset=17, **initializers):
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((64, 48)).astype("f4"), **initializers}
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    value = helper.make_tensor_value_info
    inputs, outputs = [value("x", TensorProto.FLOAT, [2, 64])], [value("y", TensorProto.FLOAT, [2, 48])]
    graph = helper.make_graph([*nodes, helper.make_node("MatMul", ["a", "w"], ["y"])], "g", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def dropout(mode):
    node = helper.make_node("Dropout", ["x", "ratio", "mode"], ["a"], name="drop")
    return [node], {"ratio": np.float32(0.5), "mode": np.bool_(mode)}


def noise(operator):
    nodes = [helper.make_node(operator, ["x"], ["n"], name="drop"), helper.make_node("Add", ["x", "n"], ["a"])]
    return nodes, {}


def test_random_numbers_that_a_new_session_repeats_are_noted(tmp_path):
    nodes, initializers = noise("RandomNormalLike")
    path = written(tmp_path / "m.onnx", nodes, **initializers)
    report = rsi_deploy.export(str(path), tmp_path / "b", rank="50%", measure=False)
    assert any("RandomNormalLike 'drop'" in note for note in report.notes)


def test_a_check_that_fails_on_random_numbers_names_them(tmp_path):
    """onnxruntime seeds such a node by its position, which a split before it changes."""
    nodes, initializers = noise("RandomNormalLike")
    path = written(tmp_path / "m.onnx", nodes, **initializers)
    feeds = {"x": np.ones((2, 64), "f4")}
    with pytest.raises(ModelError, match="'drop'"), explain_random_models(path, feeds, "m"):
        raise GateError("surgery gate")
    nodes, initializers = noise("Neg")
    path = written(tmp_path / "m.onnx", nodes, **initializers)
    with pytest.raises(GateError, match="surgery gate"), explain_random_models(path, feeds, "m"):
        raise GateError("surgery gate")


@pytest.mark.parametrize("opset", [None, 18])
def test_a_random_model_is_named_as_the_cause(opset, tmp_path):
    nodes, initializers = dropout(True)
    path = written(tmp_path / "m.onnx", nodes, **initializers)
    with pytest.raises(ModelError, match=r"m\.onnx gives other outputs in every run.*'drop'"):
        rsi_deploy.export(str(path), tmp_path / "b", rank="50%", measure=False, opset=opset)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("source", [dropout(False), noise("Neg")])
def test_a_model_that_repeats_itself_is_exported(source, tmp_path):
    nodes, initializers = source
    path = written(tmp_path / "m.onnx", nodes, **initializers)
    assert rsi_deploy.export(str(path), tmp_path / "b", rank="50%", measure=False).sites[0].rank


class Dropping(nn.Module):
    input_shape = (1, 32)

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        return self.fc(functional.dropout(x, 0.5))  # its default is training mode


def test_a_random_torch_module_is_named_as_the_cause(tmp_path):
    with pytest.raises(ModelError, match="Dropping gives other outputs in every run"):
        rsi_deploy.export(Dropping(), tmp_path / "b", rank="25%", measure=False)


class Wrong(nn.Module):
    """A deterministic module whose export differs from it."""

    input_shape = (1, 32)

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        return self.fc(x) if torch.compiler.is_exporting() else -self.fc(x)


def test_another_error_of_the_exporter_keeps_its_message(tmp_path):
    with pytest.raises(GateError, match="exporter gate"):
        rsi_deploy.export(Wrong(), tmp_path / "b", rank="25%", measure=False)


def test_the_check_accepts_rounding_alone(tmp_path):
    nodes, initializers = dropout(False)
    path = written(tmp_path / "m.onnx", nodes, **initializers)
    feeds = {"x": np.ones((2, 64), "f4")}
    tensor = next(t for t in onnx.load(path).graph.initializer if t.name == "w")
    exact = feeds["x"] @ numpy_helper.to_array(tensor)
    check_repeatable(path, feeds, "m", [exact * np.float32(1 + 1e-6)])
    with pytest.raises(ModelError, match="other outputs"):
        check_repeatable(path, feeds, "m", [exact * np.float32(1.001)])
