"""Batches that are batches, and first axes that only look like one."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from served import linear, running_sum, tokens, value, write

from rsi_deploy.runtime.batch_independence import (
    TOLERANCE,
    count_samples,
    why_not_batchable,
    why_not_batchable_on,
    why_not_proved,
    why_runs_differ,
)

MIXED = "rows of output y depend on the other rows of their batch"


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def reason(path, known=(), count=3):
    return why_not_batchable(path, session_of(path), dict(known), count)


def tried(path, count=3):
    """What the runs alone say."""
    rows = np.random.default_rng(0).standard_normal((count, *session_of(path).get_inputs()[0].shape[1:]), np.float32)
    return why_runs_differ(session_of(path), {"x": rows}, {"x": rows[::-1]})


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


def leveled(path):
    """`y = x / max(1, |x / 10|.max())`: samples mix where one of them is large."""
    nodes = [
        helper.make_node("Mul", ["x", "tenth"], ["s"]),
        helper.make_node("Abs", ["s"], ["a"]),
        helper.make_node("ReduceMax", ["a"], ["m"], keepdims=0),
        helper.make_node("Max", ["m", "one"], ["d"]),
        helper.make_node("Div", ["s", "d"], ["y"]),
    ]
    return of_rows(path, nodes, [("tenth", np.float32(0.1)), ("one", np.float32(1))])


def test_rows_that_are_independent(tmp_path):
    assert reason(linear(tmp_path / "m.onnx")) == ""
    assert reason(tokens(tmp_path / "t.onnx"), {"ids": (1, 9), "mask": (1, 9)}) == ""
    assert reason(tokens(tmp_path / "t.onnx")) == ""  # nobody knows the length: OPEN_SIZE


def test_the_proof_names_the_operator(tmp_path):
    why = reason(leveled(tmp_path / "m.onnx"))
    assert "ReduceMax 'm' reduces over the batch axis (axis 0 of 'a')" in why


@pytest.mark.parametrize("count", [2, 3])
def test_rows_that_look_at_each_other(tmp_path, count):
    softmax = of_rows(tmp_path / "s.onnx", [helper.make_node("Softmax", ["x"], ["y"], axis=0)])
    for path in (softmax, running_sum(tmp_path / "c.onnx"), leveled(tmp_path / "l.onnx")):
        assert tried(path, count) == MIXED  # of the running sum row 0 is as it is alone
        assert "not proved" in reason(path, count=count)


def test_how_little_the_runs_notice(tmp_path):
    assert tried(leaking(tmp_path / "a.onnx", 20 * TOLERANCE[4])) == MIXED
    small = leaking(tmp_path / "b.onnx", TOLERANCE[4] / 1e5)
    assert tried(small) == ""  # as rounding would
    assert "ReduceMean 'mean'" in why_not_proved(small)  # what the runs miss, the proof does not


def test_axes_that_are_no_batch_are_named(tmp_path):
    fixed = [value(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "y")]
    path = write(tmp_path / "f.onnx", [helper.make_node("Relu", ["x"], ["y"])], fixed[:1], fixed[1:], [])
    assert reason(path, count=2) == "input x (2, 4) has no dynamic first dimension"
    whole = of_rows(tmp_path / "w.onnx", [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], out=())
    assert reason(whole) == "output y () has no dynamic first dimension"
    double = of_rows(tmp_path / "d.onnx", [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)], out=("k", 4))
    assert tried(double) == "output y has shape (6, 4) for 3 samples"
    assert "joins along the batch axis" in reason(double)


def test_whole_numbers_must_be_equal(tmp_path):
    nodes = [
        helper.make_node("ArgMax", ["x"], ["top"], axis=0, keepdims=1),
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Add", ["whole", "top"], ["y"]),
    ]
    x, y = value("x", TensorProto.FLOAT, ["n", 40]), value("y", TensorProto.INT64, ["n", 40])
    assert tried(write(tmp_path / "m.onnx", nodes, [x], [y], [])) == MIXED


def test_a_model_that_refuses_the_samples(tmp_path):
    few = tokens(tmp_path / "t.onnx", words=1)  # whole numbers are drawn from 0 and 1
    assert reason(few).startswith("the model does not run on these samples")


def test_samples_that_are_given(tmp_path):
    path = leaking(tmp_path / "m.onnx", 0.5)
    rows = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    assert why_runs_differ(session_of(path), {"x": rows}, {"x": rows}) == MIXED
    assert why_runs_differ(session_of(path), {"x": 0 * rows}, {"x": rows}) == ""  # nothing leaks from nothing
    assert "ReduceMean 'mean'" in why_not_batchable_on(path, session_of(path), {"x": rows})
    assert (
        why_not_batchable_on(linear(tmp_path / "l.onnx"), session_of(tmp_path / "l.onnx"), {"x": np.ones((2, 12), "f")})
        == ""
    )


@pytest.mark.parametrize(
    ("dims", "shape", "samples"),
    [(["n", 4], (3, 4), 3), ([4, "n"], (4, 3), 3), ([5, 4], (5, 4), 5), ([4], (4,), 1), ([], (), 1)],
)
def test_samples_are_counted_along_the_batch(tmp_path, dims, shape, samples):
    nodes = [helper.make_node("MatMul", ["x", "w"] if dims[-1:] == [4] else ["w", "x"], ["y"])]
    nodes = nodes if dims else [helper.make_node("Neg", ["x"], ["y"])]
    x, y = value("x", TensorProto.FLOAT, dims), value("y", TensorProto.FLOAT, [None] * len(dims))
    path = write(tmp_path / "m.onnx", nodes, [x], [y], [numpy_helper.from_array(np.ones((4, 4), "f"), "w")])
    assert count_samples(path, {"x": np.zeros(shape, np.float32)}) == samples
