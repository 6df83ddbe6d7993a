"""Models whose output is class ids: accuracy counts them, and calibration reads the scores before them."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import evaluate, export
from rsi_deploy.cli import run
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.evaluation.answer_outputs import class_ids, with_readable_output
from rsi_deploy.evaluation.scores import id_ranks
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.runtime.parity import compare_outputs

RNG = np.random.default_rng(0)
CLASSES = 10
X = RNG.standard_normal((60, 16)).astype(np.float32)
W, V = (RNG.standard_normal(shape).astype(np.float32) / 4 for shape in ((16, 24), (24, CLASSES)))
SCORES = np.maximum(X @ W, 0) @ V
BEST = SCORES.argsort(axis=1)[:, ::-1]
INT64, INT32, FLOAT = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT

# name -> (nodes after the scores "l", outputs, weights, ids a sample, the value to be read)
ENDS = {
    "ArgMax": ([("ArgMax", "l", "ids", {"axis": -1, "keepdims": 0})], {"ids": (INT64, ["n"])}, {}, 1, "l"),
    "kept axis": ([("ArgMax", "l", "ids", {"axis": 1})], {"ids": (INT64, ["n", 1])}, {}, 1, "l"),
    "Squeeze, Cast": (
        [("ArgMax", "l", "i", {"axis": 1}), ("Squeeze", "i one", "s", {}), ("Cast", "s", "ids", {"to": INT32})],
        {"ids": (INT32, ["n"])},
        {"one": np.array([1])},
        1,
        "l",
    ),
    "TopK": (
        [("Softmax", "l", "p", {"axis": 1}), ("TopK", "p five", "best ids", {"axis": 1})],
        {"best": (FLOAT, ["n", 5]), "ids": (INT64, ["n", 5])},
        {"five": np.array([5])},
        5,
        "p",
    ),
    "TopK ids alone": (
        [("TopK", "l three", "best ids", {})],
        {"ids": (INT64, ["n", 3])},
        {"three": np.array([3])},
        3,
        "l",
    ),
    "largest and ArgMax": (
        [("ReduceMax", "l", "best", {"axes": [1], "keepdims": 0}), ("ArgMax", "l", "ids", {"axis": 1, "keepdims": 0})],
        {"best": (FLOAT, ["n"]), "ids": (INT64, ["n"])},
        {},
        1,
        "l",
    ),
}


def save(path, nodes, outputs, weights=()):
    base = [("MatMul", "x w", "a", {}), ("Relu", "a", "r", {}), ("MatMul", "r v", "l", {})]
    made = [helper.make_node(op, ins.split(), outs.split(), **more) for op, ins, outs, more in [*base, *nodes]]
    values = [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()]
    stored = [numpy_helper.from_array(a, name) for name, a in {"w": W, "v": V, **dict(weights)}.items()]
    graph = helper.make_graph(made, "g", [helper.make_tensor_value_info("x", FLOAT, ["n", 16])], values, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(params=list(ENDS))
def ending(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nodes, outputs, weights, places, read = ENDS[request.param]
    return save(tmp_path / "m.onnx", nodes, outputs, weights), places, read


def labels_of(right, second):
    """Return labels: the first ones are right, the next are the second best class, the rest the worst."""
    places = np.repeat([0, 1, CLASSES - 1], [right, second, len(X) - right - second])
    return np.take_along_axis(BEST, places[:, None], axis=1)[:, 0]


def test_top_answers_of_ids(ending):
    path, places, _ = ending
    np.savez("d.npz", x=X, labels=labels_of(30, 12))
    found = evaluate(path, "d.npz", batch_size=7)
    assert (found.kind, found.top1) == ("classes", 50)
    assert found.top5 == (70 if places >= 5 else None)
    np.savez("d.npz", x=X, labels=labels_of(60, 0))
    assert evaluate(path, "d.npz").top1 == 100
    np.savez("d.npz", x=X, labels=labels_of(60, 0) + 1)
    with pytest.raises(UsageError, match=r"10 classes.*labels range from"):
        evaluate(path, "d.npz")


def test_agreement_of_ids(ending, tmp_path):
    path, _, _ = ending
    np.savez("d.npz", x=X)
    assert evaluate(path, "d.npz", reference=path).agreement == 100
    scores = save(tmp_path / "scores.onnx", [], {"l": (FLOAT, ["n", CLASSES])})
    assert evaluate(path, "d.npz", reference=scores).agreement == 100, "the best score is the id"
    changed = [("Mul", "l turn", "m", {}), ("ArgMax", "m", "ids", {"axis": 1, "keepdims": 0})]
    turn = {"turn": np.where(np.arange(CLASSES) < 5, 1, -1).astype(np.float32)}
    other = save(tmp_path / "other.onnx", changed, {"ids": (INT64, ["n"])}, turn)
    expected = 100 * np.mean((SCORES * turn["turn"]).argmax(axis=1) == BEST[:, 0])
    assert evaluate(other, "d.npz", reference=path).agreement == pytest.approx(expected)
    assert expected < 90


def test_the_scores_are_found(ending):
    path, places, read = ending
    proto = read_proto(path)
    found = class_ids(proto)
    assert (found.output, found.source, found.classes) == ("ids", read, CLASSES)
    assert found.ranked == (places > 1)
    assert with_readable_output(proto).graph.output[0].name == read


def test_calibration_uses_the_scores(ending, capsys):
    path, _, _ = ending
    np.savez("c.npz", x=X)
    np.savez("d.npz", x=-X, labels=LABELS_OF_NEGATIVE)
    report = export(
        path.name, "b", calib="c.npz", data="d.npz", keep_macs=0.6, measure=False, keep_dense=True, allow_larger=True
    )
    assert report.compressed.macs <= 0.6 * report.dense.macs
    assert report.calibration.quality.divergence is not None, "class scores were compared, not ids"
    assert 0 < report.calibration.quality.output_error < 1
    assert report.accuracy.dense.top1 == 100
    model = onnxruntime.InferenceSession("b/model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in onnx.load(path).graph.output]
    assert [value.name for value in model.get_outputs()] == names, "the model itself gives what it gave"
    assert run(["verify", "b", "--calib", "c.npz", "--data", "d.npz"]) == 0
    assert " broken " not in capsys.readouterr().out


LABELS_OF_NEGATIVE = (np.maximum(-X @ W, 0) @ V).argmax(axis=1)


def test_scores_that_are_an_output_are_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nodes = [("Softmax", "l", "p", {"axis": 1}), ("ArgMax", "p", "ids", {"axis": 1, "keepdims": 0})]
    outputs = {"ids": (INT64, ["n"]), "r": (FLOAT, ["n", 24]), "l": (FLOAT, ["n", CLASSES])}
    path = save(tmp_path / "m.onnx", nodes, outputs)
    np.savez("d.npz", x=X, labels=labels_of(30, 12))
    found = evaluate(path, "d.npz", reference=path)
    assert (found.top1, found.top5, found.classes) == (50, 70, CLASSES)
    assert found.divergence == pytest.approx(0, abs=1e-9)


def test_ids_of_every_position_are_not_compared_with_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = helper.make_node("ArgMax", ["x"], ["ids"], axis=1, keepdims=0)
    values = [
        [helper.make_tensor_value_info("x", FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("ids", INT64, ["n", 4, 4])],
    ]
    graph = helper.make_graph([node], "g", *values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "m.onnx")
    x = RNG.standard_normal((6, 3, 4, 4)).astype(np.float32)
    np.savez("d.npz", x=x)
    assert evaluate("m.onnx", "d.npz", reference="m.onnx").agreement == 100
    np.savez("d.npz", x=x, labels=np.zeros(6, int))
    with pytest.raises(ModelError, match=r"one class id per sample, but it returns integers of shape \(6, 4, 4\)"):
        evaluate("m.onnx", "d.npz")


def test_scores_before_a_comparison_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nodes = [("Greater", "l zero", "b", {}), ("Cast", "b", "y", {"to": INT64})]
    save("m.onnx", nodes, {"y": (INT64, ["n", CLASSES])}, {"zero": np.zeros(1, np.float32)})
    np.savez("c.npz", x=X)
    assert (
        run(
            [
                "export",
                "m.onnx",
                "--calib",
                "c.npz",
                "--keep-macs",
                "0.6",
                "--no-bench",
                "-o",
                "b",
                "--allow-larger",
                "--json",
            ]
        )
        == 0
    )
    assert 0 < json.loads(capsys.readouterr().out)["calibration"]["checked"]["output_error"] < 1


def test_a_model_without_scores_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = helper.make_node("Identity", ["t"], ["y"])
    values = [
        [helper.make_tensor_value_info("t", INT64, ["n", 3])],
        [helper.make_tensor_value_info("y", INT64, ["n", 3])],
    ]
    onnx.save(
        helper.make_model(
            helper.make_graph([node], "g", *values), ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
        ),
        "m.onnx",
    )
    assert with_readable_output(read_proto("m.onnx")).graph.output[0].name == "y"
    np.savez("d.npz", t=np.ones((4, 3), int), labels=np.zeros(4, int))
    with pytest.raises(ModelError, match="one class id per sample"):
        evaluate("m.onnx", "d.npz")


def test_ranks_of_ids():
    ids = np.array([[3, 1, 2], [3, 1, 2], [3, 1, 2]])
    assert id_ranks(ids, np.array([3, 2, 9])).tolist() == [0, 2, 3]


def test_parity_compares_ids_and_not_their_size():
    """One of a hundred ids differs: its share counts, not the difference of the numbers."""
    ids = np.full(100, 900)
    other = ids.copy()
    other[0] = 0
    assert compare_outputs([ids], [other], what="gate").relative_l2 == pytest.approx(0.01)
    assert compare_outputs([ids * 1.0], [other * 1.0], what="gate").relative_l2 == pytest.approx(0.1)
    assert compare_outputs([ids], [ids - 1], what="gate").relative_l2 == pytest.approx(1 / 900)
