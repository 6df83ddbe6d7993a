"""Arrays are assigned to inputs by name, and inputs without a batch axis are fed once."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import evaluate, export
from rsi_deploy.benchmark.variants import make_feeds
from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.cli import run
from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.dataset import for_inputs
from rsi_deploy.data.feeding import Feeding
from rsi_deploy.data.sources import open_data
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs

RNG = np.random.default_rng(0)
X, Y = (RNG.standard_normal((40, 16)).astype(np.float32) for _ in range(2))
LABELS = np.arange(40) % 12


def spec(name, *shape, dtype=np.float32):
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


def model(path, nodes, inputs, outputs, **weights):
    """Write a model of nodes (op, inputs, outputs, attributes)."""
    made = [helper.make_node(op, ins.split(), outs.split(), **more) for op, ins, outs, more in nodes]
    values = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in these.items()]
        for these in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(made, "g", *values, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def weight(*shape):
    return (RNG.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def two_inputs(path, first="x", second="y"):
    nodes = [
        ("MatMul", f"{first} w", "a", {}),
        ("MatMul", f"{second} v", "b", {}),
        ("Add", "a b", "z", {}),
    ]
    inputs = {first: (TensorProto.FLOAT, ["n", 16]), second: (TensorProto.FLOAT, ["n", 16])}
    weights = {"w": weight(16, 12), "v": weight(16, 12)}
    return model(path, nodes, inputs, {"z": (TensorProto.FLOAT, ["n", 12])}, **weights)


def scaled(path):
    """Write a model z = k x w with a scalar k."""
    inputs = {"k": (TensorProto.FLOAT, []), "x": (TensorProto.FLOAT, ["n", 16])}
    nodes = [("MatMul", "x w", "a", {}), ("Mul", "a k", "z", {})]
    return model(path, nodes, inputs, {"z": (TensorProto.FLOAT, ["n", 12])}, w=weight(16, 12))


def fed(dataset, specs, size=7):
    feeding = Feeding(dataset, specs, None)
    return feeding.axes.joined([feeds for feeds, _ in feeding.batches(size)])


# -- names


@pytest.mark.parametrize("names", [("x", "y"), ("x", "labels"), ("images", "label"), ("x", "images"), ("y", "labels")])
def test_input_names_win_over_usual_names(here, names):
    np.savez("d.npz", **dict(zip(names, (X, Y), strict=True)))
    specs = [spec(name, "n", 16) for name in names]
    found = open_data("d.npz", specs=specs)
    assert found.labels is None, "each array is an input"
    for name, expected in zip(names, (X, Y), strict=True):
        np.testing.assert_array_equal(fed(found, specs)[name], expected)


def test_labels_have_the_remaining_usual_name(here):
    numbers = np.arange(40) % 10
    for other in ("labels", "label"):
        np.savez("d.npz", x=X, y=numbers, **{other: LABELS})
        found = open_data("d.npz", specs=[spec("x", "n", 16), spec("y", "n", dtype=np.int64)])
        np.testing.assert_array_equal(found.labels, LABELS)
        np.testing.assert_array_equal(fed(found, [spec("x", "n", 16), spec("y", "n", dtype=np.int64)])["y"], numbers)
    np.savez("d.npz", x=X, y=numbers)
    np.testing.assert_array_equal(open_data("d.npz", specs=[spec("x", "n", 16)]).labels, numbers)


def test_several_possible_labels_are_refused(here):
    np.savez("d.npz", x=X, y=Y, labels=LABELS, label=LABELS)
    with pytest.raises(UsageError, match=r"labels, label may be the labels; rename"):
        open_data("d.npz", specs=[spec("x", "n", 16), spec("y", "n", 16)])


def test_names_in_tables_and_in_functions(here, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": list(X), "y": list(Y), "labels": LABELS}), "d.parquet")
    pq.write_table(pa.table({"x": list(X), "y": list(Y)}), "none.parquet")
    (here / "own_data.py").write_text(
        "import numpy as np\nX = np.ones((9, 16), np.float32)\n"
        "def batches(): return [({'x': X, 'y': X + 1, 'k': 3.0}, np.zeros(9, int))]\n"
    )
    monkeypatch.setitem(sys.modules, "own_data", None)
    del sys.modules["own_data"]
    specs = [spec("x", "n", 16), spec("y", "n", 16)]
    table = open_data("d.parquet", specs=specs)
    np.testing.assert_array_equal(fed(table, specs)["y"], Y)
    np.testing.assert_array_equal(table.labels, LABELS)
    assert open_data("none.parquet", specs=specs).labels is None
    found = fed(open_data("own_data:batches", specs=specs), [*specs, spec("k", dtype=np.float64)])
    assert (found["y"] == 2).all()
    assert found["k"].shape == ()
    assert found["k"] == 3


def test_export_evaluation_and_verification_of_inputs_called_x_and_y(here, capsys):
    two_inputs("m.onnx")
    np.savez("c.npz", x=X, y=Y)
    np.savez("d.npz", x=X[::-1], y=Y, labels=LABELS)
    report = export(
        "m.onnx", "b", calib="c.npz", data="d.npz", keep_macs=0.7, measure=False, keep_dense=True, allow_larger=True
    )
    assert report.compressed.macs <= 0.7 * report.dense.macs
    assert report.accuracy.dense.samples == 40
    assert run(["verify", "b", "--calib", "c.npz", "--data", "d.npz"]) == 0
    assert "not checked  accuracy" not in capsys.readouterr().out
    assert evaluate("m.onnx", "d.npz").top1 == report.accuracy.dense.top1
    assert run(["eval", "m.onnx", "--data", "c.npz"]) == 2
    assert "under the name labels (y is an input of the model)" in capsys.readouterr().err


def test_a_misspelled_name_is_named_with_the_right_one(here):
    np.savez("d.npz", input_id=X, mask=Y)
    with pytest.raises(UsageError, match=r"input_ids, mask, but the data hold input_id, mask.*input_id is input_ids"):
        Feeding(open_data("d.npz"), [spec("input_ids", "n", 16), spec("mask", "n", 16)], None)


def test_regression_targets_do_not_prevent_calibration(here):
    np.savez("d.npz", x=X, y=Y[:, 0])
    assert CalibrationData("d.npz", [spec("x", "n", 16)], None, 100).samples == 32
    with pytest.raises(UsageError, match=r"labels must be integers.*float32"):
        evaluate(model_of_one(here), "d.npz")


def model_of_one(folder):
    inputs, outputs = {"x": (TensorProto.FLOAT, ["n", 16])}, {"z": (TensorProto.FLOAT, ["n", 12])}
    return model(folder / "one.onnx", [("MatMul", "x w", "z", {})], inputs, outputs, w=weight(16, 12))


# -- inputs without a batch axis


@pytest.mark.parametrize(
    ("shapes", "axes", "fixed"),
    [
        ({"x": ("n", 64), "k": (), "mean": (3,)}, [0, None, None], None),
        ({"x": ("n", 64), "mask": (1, 64)}, [0, None], None),
        ({"x": ("time", "batch", 8), "state": (2, "batch", 8)}, [1, 1], None),
        ({"x": ("t", "m", 8), "state": (2, "m", 8)}, [1, 1], None),
        ({"ids": ("n", "s"), "mask": ("n", "s")}, [0, 0], None),
        ({"past": ("p", "b", 48), "x": ("b", "s", 64)}, [1, 0], None),
        ({"ids": (1, "n")}, [0], 1),
        ({"x": (4, 64), "k": (3,)}, [0, None], 4),
        ({"state": (2, 1, 8), "x": (1, 8)}, [1, 0], 1),
        ({"k": ()}, [None], None),
    ],
)
def test_where_the_batch_is(shapes, axes, fixed):
    found = BatchAxes.of(shapes)
    assert ([found.axes[name] for name in shapes], found.fixed) == (axes, fixed)


K, X_SPEC, STATE = spec("k"), spec("x", "n", 16), spec("state", 2, "n", 5)
STATES = RNG.standard_normal((2, 40, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        (np.float32(2), K, np.float32(2)),
        (np.array([2], np.float32), K, np.float32(2)),
        (np.full(40, 2, np.float32), K, np.float32(2)),
        (np.arange(3.0), spec("k", 3), np.arange(3)),
        (np.tile(np.arange(3.0), (40, 1)), spec("k", 3), np.arange(3)),
        (X[:1], spec("k", 1, 16), X[:1]),
        (STATES, STATE, STATES),
        (np.moveaxis(STATES, 1, 0), STATE, STATES),
        (STATES[:, :1], STATE, np.repeat(STATES[:, :1], 40, axis=1)),
        (STATES[:, 0], STATE, np.repeat(STATES[:, :1], 40, axis=1)),
    ],
)
def test_every_form_of_an_input_without_a_batch_axis(here, given, wanted, expected):
    np.savez("d.npz", **{"x": X, wanted.name: given})
    specs = [wanted, X_SPEC]
    found = fed(open_data("d.npz", specs=specs), specs)
    np.testing.assert_array_equal(found[wanted.name], expected)
    np.testing.assert_array_equal(found["x"], X)
    data = CalibrationData("d.npz", specs, None, 100)
    assert (data.samples, [data.axes.samples(feeds) for feeds in data.feeds()]) == (32, [8, 8, 8, 8])
    assert len(data.digests()) == 40
    again = for_inputs(for_inputs(open_data("d.npz", specs=specs), specs), specs)
    np.testing.assert_array_equal(fed(again, specs)[wanted.name], expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.arange(40, dtype=np.float32), r"k: float32 \(\) once for a whole run.*several values: 0\. and 1\."),
        (np.full(30, 2, np.float32), r"k: float32 \(\) has no batch axis.*\(30,\) for 40 samples"),
        (np.int64(2), r"k: float32 \(\).*int64 \(\).*array\.astype\('float32'\)"),
    ],
)
def test_invalid_values_for_a_whole_run(here, given, words):
    np.savez("d.npz", x=X, k=given)
    with pytest.raises(UsageError, match=words):
        fed(open_data("d.npz", specs=[X_SPEC, K]), [X_SPEC, K])


def test_inputs_of_different_lengths_are_named(here):
    np.savez("d.npz", x=X, y=Y[:30])
    with pytest.raises(UsageError, match=r"the same number of samples.*\{'x': 40, 'y': 30\}"):
        open_data("d.npz", specs=[spec("x", "n", 16), spec("y", "n", 16)])


@pytest.mark.parametrize("k", [np.float32(2), np.full(40, 2, np.float32)])
def test_a_scalar_in_every_verb(here, capsys, k):
    scaled("m.onnx")
    np.savez("d.npz", x=X, k=k, labels=LABELS)
    np.savez("f.npz", x=X[:4], k=k if k.ndim == 0 else k[:4])
    shared = ["--calib", "d.npz", "--data", "d.npz", "--allow-shared-data", "--keep-macs", "0.7", "--no-bench"]
    assert run(["export", "m.onnx", *shared, "-o", "b", "--keep-dense", "--allow-larger"]) == 0
    assert run(["verify", "b", "--calib", "d.npz", "--data", "d.npz"]) == 0
    assert run(["eval", "m.onnx", "--data", "d.npz", "--reference", "b/model.onnx"]) == 0
    for source in (["--feeds", "f.npz"], ["--data", "d.npz"]):
        assert run(["bench", "m.onnx", "b/model.onnx", "--seconds", "0.1", *source]) == 0
    capsys.readouterr()


def test_feeds_are_cut_along_their_batch_axes(here):
    specs = model_inputs(scaled("m.onnx"))
    for k in (np.float32(2), np.full(4, 2, np.float32)):
        feeds, batch = make_feeds(specs, batch=3, seed=0, given={"k": k, "x": X[:4]}, shapes=None)
        assert (batch, feeds["k"].shape, feeds["x"].shape) == (3, (), (3, 16))
    with pytest.raises(UsageError, match="once for a whole run"):
        make_feeds(specs, batch=0, seed=0, given={"k": np.arange(4, dtype=np.float32), "x": X[:4]}, shapes=None)
    with pytest.raises(UsageError, match=r"float64.*array\.astype\('float32'\)"):
        make_feeds(specs, batch=0, seed=0, given={"k": np.float64(2), "x": X[:4]}, shapes=None)


def test_a_fixed_batch_with_a_scalar_before_the_samples(here):
    inputs = {"k": (TensorProto.FLOAT, []), "x": (TensorProto.FLOAT, [8, 16])}
    nodes = [("MatMul", "x w", "a", {}), ("Mul", "a k", "z", {})]
    model("m.onnx", nodes, inputs, {"z": (TensorProto.FLOAT, [8, 12])}, w=weight(16, 12))
    np.savez("d.npz", x=X[:30], k=np.float32(2), labels=LABELS[:30])
    assert evaluate("m.onnx", "d.npz").samples == 30
    data = CalibrationData("d.npz", model_inputs("m.onnx"), None, 100)
    assert (data.batch, data.samples, data.check.samples) == (8, 16, 8)


def test_a_batch_that_is_not_the_first_axis(here):
    """A time-major model: samples and answers lie along the second axis."""
    nodes = [("MatMul", "x w", "z", {})]
    inputs, outputs = {"x": (TensorProto.FLOAT, ["t", "batch", 16])}, {"z": (TensorProto.FLOAT, ["t", "batch", 12])}
    model("m.onnx", nodes, inputs, outputs, w=weight(16, 12))
    steps = RNG.standard_normal((3, 40, 16)).astype(np.float32)
    for given in (steps, np.moveaxis(steps, 1, 0)):
        np.savez("d.npz", x=given, labels=LABELS)
        specs = model_inputs("m.onnx")
        np.testing.assert_array_equal(fed(open_data("d.npz", specs=specs), specs)["x"], steps)
    np.savez("c.npz", x=steps)
    found = evaluate("m.onnx", "c.npz", reference="m.onnx", batch_size=7)
    assert (found.samples, found.values[0].distance) == (40, 0)
