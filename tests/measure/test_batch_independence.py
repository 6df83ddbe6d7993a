"""Batches that are batches, and first axes that only look like one."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from served import linear, running_sum, tokens, value, write

from rsi_deploy.measure.batch_independence import TOLERANCE, why_alone, why_alone_on

MIXED = "rows of output y depend on the other rows of their batch"


def asked(path, known=(), count=3):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return why_alone(session, dict(known), count)


def of_rows(path, nodes, weights=(), out=("n", 4)):
    x, y = value("x", TensorProto.FLOAT, ["n", 4]), value("y", TensorProto.FLOAT, list(out))
    return write(path, nodes, [x], [y], [numpy_helper.from_array(np.asarray(a), name) for name, a in weights])


def leaking(path, share):
    """`y = x + share * mean of x over the batch`."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axis"], ["mean"], keepdims=1),
        helper.make_node("Mul", ["mean", "share"], ["leak"]),
        helper.make_node("Add", ["x", "leak"], ["y"]),
    ]
    return of_rows(path, nodes, [("axis", np.array([0])), ("share", np.float32(share))])


def test_rows_that_stand_alone(tmp_path):
    assert asked(linear(tmp_path / "m.onnx")) == ""
    assert asked(tokens(tmp_path / "t.onnx"), {"ids": (1, 9), "mask": (1, 9)}) == ""
    assert asked(tokens(tmp_path / "t.onnx")) == ""  # nobody knows the length: OPEN_SIZE


@pytest.mark.parametrize("count", [2, 3])
def test_rows_that_look_at_each_other(tmp_path, count):
    softmax = of_rows(tmp_path / "s.onnx", [helper.make_node("Softmax", ["x"], ["y"], axis=0)])
    assert asked(softmax, count=count) == MIXED
    assert asked(running_sum(tmp_path / "c.onnx"), count=count) == MIXED  # row 0 is as it is alone


def test_how_little_is_noticed(tmp_path):
    assert asked(leaking(tmp_path / "a.onnx", 20 * TOLERANCE[4])) == MIXED
    assert asked(leaking(tmp_path / "b.onnx", TOLERANCE[4] / 20)) == ""  # as rounding would


def test_axes_that_are_no_batch_are_named(tmp_path):
    fixed = [value(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "y")]
    path = write(tmp_path / "f.onnx", [helper.make_node("Relu", ["x"], ["y"])], fixed[:1], fixed[1:], [])
    assert asked(path, count=2) == "input x (2, 4) has no dynamic first dimension"
    whole = of_rows(tmp_path / "w.onnx", [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], out=())
    assert asked(whole) == "output y () has no dynamic first dimension"
    double = of_rows(tmp_path / "d.onnx", [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)], out=("k", 4))
    assert asked(double) == "output y has shape (6, 4) for 3 samples"


def test_whole_numbers_must_be_equal(tmp_path):
    nodes = [
        helper.make_node("ArgMax", ["x"], ["top"], axis=0, keepdims=1),
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Add", ["whole", "top"], ["y"]),
    ]
    x, y = value("x", TensorProto.FLOAT, ["n", 40]), value("y", TensorProto.INT64, ["n", 40])
    assert asked(write(tmp_path / "m.onnx", nodes, [x], [y], [])) == MIXED


def test_a_model_that_refuses_the_samples(tmp_path):
    few = tokens(tmp_path / "t.onnx", words=1)  # whole numbers are drawn from 0 and 1
    assert asked(few).startswith("it does not run on these samples, so that a batch cannot be tried")


def test_samples_that_are_given(tmp_path):
    session = onnxruntime.InferenceSession(str(leaking(tmp_path / "m.onnx", 0.5)), providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    assert why_alone_on(session, {"x": rows}) == MIXED
    assert why_alone_on(session, {"x": 0 * rows}) == ""  # nothing leaks from nothing: the samples matter
