"""A failure on a model that onnx's checker refuses is the model's; on a valid one it is ours, and stays what it is."""

import onnx
import pytest
from onnx import TensorProto, helper

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.onnx_checks.broken_models import checker_error, explains_broken_models


def model_of(op_type, path):
    """A model of one node."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node(op_type, ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@explains_broken_models
def fails(model, error):
    """What a verb may do."""
    raise error


@pytest.mark.parametrize("spelled", [str, lambda path: path])
def test_a_failure_on_an_invalid_model_is_the_models(tmp_path, spelled):
    path = model_of("NoSuchOperator", tmp_path / "m.onnx")
    with pytest.raises(
        ModelError, match=r"m.onnx is not valid ONNX: .*NoSuchOperator.*KeyError: 'lost'.*export"
    ) as met:
        fails(spelled(path), KeyError("lost"))
    assert isinstance(met.value.__cause__, KeyError)


def test_a_failure_on_a_valid_model_stays_what_it_is(tmp_path):
    path = model_of("Relu", tmp_path / "m.onnx")
    assert checker_error(path) is None
    with pytest.raises(KeyError, match="lost"):
        fails(path, KeyError("lost"))


@pytest.mark.parametrize("error", [UsageError("refused"), OSError("no space"), MemoryError()])
def test_errors_that_say_enough_are_passed_on(tmp_path, error):
    path = model_of("NoSuchOperator", tmp_path / "m.onnx")
    with pytest.raises(type(error)) as met:
        fails(path, error)
    assert met.value is error


@pytest.mark.parametrize("model", ["torchvision:resnet18", "nowhere.onnx", None, object()])
def test_paths_that_are_not_files_are_refused(model):
    with pytest.raises(KeyError):
        fails(model, KeyError("lost"))
