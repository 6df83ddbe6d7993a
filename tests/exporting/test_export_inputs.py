"""What a user types becomes what the steps take, or is refused with what to type."""

import numpy as np
import onnx
import pytest
from nets import mlp, mlp_onnx

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.data.sources import open_data
from rsi_deploy.exporting.inputs import (
    Origin,
    device_named,
    evaluation_data,
)
from rsi_deploy.runtime.feeds.shapes import input_shapes

TOLD = Preprocessing(mean=(0.25,), std=(2.0,))


def origin(model, **given):
    rest = {"weights": "DEFAULT", "checkpoint": None, "shape": None, "seed": 0, "preprocessing": None, "opset": None}
    return Origin(**{"model": model, **rest, **given})


def own(path):
    """The preprocessing in an ONNX file's metadata."""
    return Preprocessing.stored(onnx_metadata(path))


def onnx_metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.fixture
def telling(tmp_path):
    """An ONNX file whose metadata tell a preprocessing."""
    path = mlp_onnx(tmp_path / "m.onnx")
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {METADATA_KEY: TOLD.to_metadata()})
    onnx.save(proto, path)
    return str(path)


def test_what_is_given_goes_over_what_the_model_tells(telling):
    cropped, other = Preprocessing(crop=(3, 4)), Preprocessing(mean=(0.5,), std=(1.0,))
    for given, steps in [
        (None, TOLD),
        (cropped, Preprocessing(mean=(0.25,), std=(2.0,), crop=(3, 4))),
        (other, other),
    ]:
        assert origin(telling, preprocessing=given).over(own(telling)) == steps
    assert TOLD.over(other) == TOLD != other, "the other way round differs"


def test_a_model_that_tells_nothing_has_what_is_given(tmp_path):
    silent = str(mlp_onnx(tmp_path / "silent.onnx"))
    assert origin(silent).over(own(silent)) is None
    assert origin(silent, preprocessing=TOLD).over(own(silent)) == TOLD


def test_a_module_is_loaded_as_it_is():
    net = mlp()
    source = origin(net, shape="1x12").load()
    assert source.module is net
    assert source.onnx is None


def test_shapes_by_name_are_apart_from_the_one_without():
    assert input_shapes([]) == (None, {})
    assert input_shapes(["1x8", "ids=1x128", "mask=1x128"]) == ("1x8", {"ids": (1, 128), "mask": (1, 128)})
    with pytest.raises(UsageError, match="with the input's name"):
        input_shapes(["=1x8"])


def test_evaluation_data_have_labels(tmp_path):
    rows = np.zeros((4, 12), np.float32)
    np.savez(tmp_path / "bare.npz", x=rows)
    np.savez(tmp_path / "whole.npz", x=rows, y=np.zeros(4, np.int64))
    assert evaluation_data(None, TOLD) is None
    opened = open_data(tmp_path / "whole.npz")
    assert evaluation_data(opened, None) is opened
    with pytest.raises(UsageError, match="has no labels"):
        evaluation_data(tmp_path / "bare.npz", None)
    with pytest.raises(UsageError, match="no preprocessing applies"):
        evaluation_data(tmp_path / "whole.npz", TOLD)


def test_devices_have_names():
    assert device_named("cpu").type == "cpu"
    assert device_named("auto").type in ("cpu", "cuda")
