"""The dense model of a report is the user's file: its bytes and parameters decide what is smaller."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import mlp_onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import rsi_deploy
from graph_passes import count_parameters
from rsi_deploy.cli import run
from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.onnx_file import file_bytes, read_onnx
from rsi_deploy.report.schema import read_report

ONNX, CONTRIB = helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)


def weight(*shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def saved(path, nodes, shapes, constants, *, functions=(), domains=(), **how):
    """Write a model with inputs and outputs of these shapes, float32 except those called `ids`."""
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    made = {name for node in nodes for name in node.output}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [value for name, value in values.items() if name not in made],
        [value for name, value in values.items() if name in made],
        [a if isinstance(a, TensorProto) else numpy_helper.from_array(a, name) for name, a in constants.items()],
    )
    opsets = [ONNX, CONTRIB, *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions), path, **how)
    return path


def products(path, constants, **how):
    """Write a model that multiplies `x` by each matrix of the constants; other constants are unused."""
    names = [name for name, array in constants.items() if array.ndim == 2]
    values = ["x", *(f"a{i}" for i in range(len(names) - 1)), "y"]
    nodes = [helper.make_node("MatMul", [values[i], name], [values[i + 1]]) for i, name in enumerate(names)]
    shapes = {"x": [1, constants[names[0]].shape[0]], "y": [1, constants[names[-1]].shape[1]]}
    return saved(path, nodes, shapes, constants, **how)


def exported(path, rank="25%", **options):
    return rsi_deploy.export(str(path), path.parent / "b", rank=rank, measure=False, force=True, **options)


@pytest.mark.parametrize("external", [False, True])
def test_bytes_are_those_of_the_file_that_was_given(tmp_path, external):
    constants = {f"w{i}": weight(32, 32, seed=i) for i in range(12)}
    how = {"save_as_external_data": True, "location": "other.bin", "size_threshold": 0} if external else {}
    path = products(tmp_path / "m.onnx", constants, **how)
    files = [path, tmp_path / "other.bin"] if external else [path]
    report = exported(path)
    bundle = file_bytes(tmp_path / "b" / "model.onnx")
    assert report.dense.bytes == sum(file.stat().st_size for file in files)
    assert report.compressed.bytes == bundle
    assert f"{report.dense.bytes / bundle:.2f}x smaller" in (tmp_path / "b" / "README.md").read_text()


def test_a_torch_model_is_counted_as_one_file(tmp_path):
    report = rsi_deploy.export(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(),
        tmp_path / "b",
        rank="25%",
        input_shape=(1, 64),
        measure=False,
        keep_dense=True,
    )
    whole = onnx.load(tmp_path / "b" / "dense.onnx")  # with its external data
    for tensor in whole.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    assert report.dense.bytes == pytest.approx(whole.ByteSize(), abs=16)
    assert report.dense.params == 2 * (64 * 64 + 64)


def test_a_fold_does_not_change_the_dense_model(tmp_path):
    vectors = {name: np.abs(weight(32, seed=i)) + 0.1 for i, name in enumerate("sbmv")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", *"sbmv"], ["y"]),
    ]
    path = saved(
        tmp_path / "m.onnx", nodes, {"x": [1, 16, 8, 8], "y": [1, 32, 8, 8]}, {"w": weight(32, 16, 3, 3), **vectors}
    )
    report = exported(path)
    assert (report.dense.bytes, report.dense.params) == (path.stat().st_size, 32 * 16 * 9 + 4 * 32)
    assert report.compressed.params == 8 * (32 + 16 * 9) + 32  # the statistics became a bias
    assert report.dense.macs == 8 * 8 * 32 * 16 * 9


def in_function(path, calls=1):
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(weight(64, 64), "k"))
    body = [constant, helper.make_node("MatMul", ["X", "k"], ["Y"])]
    function = helper.make_function("my", "B", ["X"], ["Y"], body, [ONNX])
    values = ["x", *(f"a{i}" for i in range(calls - 1)), "y"]
    nodes = [helper.make_node("B", [values[i]], [values[i + 1]], domain="my") for i in range(calls)]
    return saved(path, nodes, {"x": [1, 64], "y": [1, 64]}, {}, functions=[function], domains=["my"])


@pytest.mark.parametrize("calls", [1, 2])
def test_a_weight_in_a_function_counts_once(tmp_path, calls):
    report = exported(in_function(tmp_path / "m.onnx", calls))
    assert (report.dense.params, report.compressed.params) == (64 * 64, 16 * 128)


def test_a_quantized_model_keeps_its_parameters(tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="q"),
        helper.make_node("MatMul", ["a", "v"], ["y"], "f"),
    ]
    saved(tmp_path / "f.onnx", nodes, {"x": [1, 64], "y": [1, 40]}, {"w": weight(64, 512), "v": weight(512, 40)})
    quantize_dynamic(tmp_path / "f.onnx", tmp_path / "m.onnx", nodes_to_exclude=["f"])
    report = exported(tmp_path / "m.onnx")
    assert report.dense.params == 64 * 512 + 512 * 40
    assert report.compressed.params == 64 * 512 + 10 * (512 + 40)


def branch(name, nodes, out, constants=()):
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(out, 1, [1, 4])], list(constants))


def node(*arguments, **attributes):
    return helper.make_node(*arguments, **attributes)


W8 = np.arange(32, dtype=np.int8).reshape(8, 4)
ONE, ZERO = np.float32(1), np.int8(0)
YES = np.array(True)
VALUE = numpy_helper.from_array(weight(8, 4), "v")
OWN = numpy_helper.from_array(weight(8, 4, seed=3), "own")


@pytest.mark.parametrize(
    ("nodes", "constants", "expected"),
    [
        pytest.param([node("MatMul", ["x", "w"], ["y"])], {"w": weight(8, 4)}, 32, id="initializer"),
        pytest.param(
            [node("Constant", [], ["w"], value=VALUE), node("MatMul", ["x", "w"], ["y"])],
            {},
            32,
            id="constant node",
        ),
        pytest.param(
            [node("Constant", [], ["b"], value_floats=[1.0, 2, 3, 4]), node("Gemm", ["x", "w", "b"], ["y"])],
            {"w": weight(8, 4)},
            36,
            id="value_floats",
        ),
        pytest.param(
            [node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1), node("MatMul", ["x", "w"], ["y"])],
            {"q": W8, "s": np.ones(4, np.float32), "z": np.zeros(4, np.int8)},
            32,
            id="dequantized, a scale a channel",
        ),
        pytest.param(
            [
                node("DequantizeLinear", ["q", "s"], ["w"]),
                node("DequantizeLinear", ["c", "s"], ["b"]),
                node("Gemm", ["x", "w", "b"], ["y"]),
            ],
            {"q": W8, "s": ONE, "c": np.arange(4, dtype=np.int32)},
            36,
            id="with a quantized bias",
        ),
        pytest.param(
            [node("MatMulNBits", ["x", "q", "s"], ["y"], K=8, N=4, bits=4, block_size=16, domain="com.microsoft")],
            {"q": np.zeros((4, 1, 8), np.uint8), "s": np.ones(4, np.float32)},
            32,
            id="two numbers in a byte, rows padded",
        ),
        pytest.param(
            [node("Gather", ["t", "ids"], ["i"]), node("Cast", ["i"], ["f"], to=1), node("MatMul", ["f", "w"], ["y"])],
            {"t": np.ones((50, 8), np.int32), "w": weight(8, 4)},
            50 * 8 + 32,
            id="integer table",
        ),
        pytest.param(
            [
                node("Reshape", ["x", "n"], ["r"]),
                node("MatMul", ["r", "w"], ["m"]),
                node("Unsqueeze", ["m", "ax"], ["u"]),
                node("Squeeze", ["u", "ax"], ["y"]),
            ],
            {"n": np.array([1, 8]), "ax": np.array([0]), "w": weight(8, 4)},
            32,
            id="no shapes, no axes",
        ),
        pytest.param(
            [
                node(
                    "If",
                    ["yes"],
                    ["y"],
                    then_branch=branch("t", [node("MatMul", ["x", "w"], ["p"])], "p"),
                    else_branch=branch(
                        "e",
                        [
                            node("MatMul", ["x", "own"], ["q"]),
                        ],
                        "q",
                        [OWN],
                    ),
                )
            ],
            {"w": weight(8, 4), "yes": YES},
            64,
            id="subgraphs, one with its own",
        ),
        pytest.param(
            [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["x", "w"], ["b"]), node("Add", ["a", "b"], ["y"])],
            {"w": weight(8, 4)},
            32,
            id="used twice",
        ),
        pytest.param([node("MatMul", ["x", "w"], ["y"])], {"w": weight(8, 4), "idle": weight(9, 9)}, 32, id="unused"),
    ],
)
def test_what_counts_as_a_parameter(tmp_path, nodes, constants, expected):
    shapes = {"ids": [1], "y": [1, 4]} if any("ids" in n.input for n in nodes) else {"x": [1, 8], "y": [1, 4]}
    path = saved(tmp_path / "m.onnx", nodes, shapes, constants)
    onnx.checker.check_model(path)
    assert count_parameters(read_onnx(path)) == expected


def test_unused_initializers_are_dropped_with_a_note(tmp_path):
    constants = {"w": weight(64, 64), "idle": np.ones(50_000, np.float32)}
    path = products(tmp_path / "m.onnx", constants)
    report = exported(path)
    assert report.dense.bytes == path.stat().st_size
    assert (report.dense.params, report.compressed.params) == (64 * 64, 16 * 128)
    assert any("idle" in note and "200,000 bytes" in note for note in report.notes)
    assert "idle" not in {tensor.name for tensor in onnx.load(tmp_path / "b" / "model.onnx").graph.initializer}


def grown(folder):
    """Export a model whose splits save fewer bytes than their nodes and names add."""
    return products(folder / "m.onnx", {"w": weight(10, 10)})


def test_a_larger_model_is_not_delivered(tmp_path, capsys):
    path = grown(tmp_path)
    assert run(["export", str(path), "--rank", "4", "--no-bench", "-o", str(tmp_path / "b")]) == 3
    message = capsys.readouterr().err
    assert f"{path.stat().st_size:,} bytes" in message
    assert "--allow-larger" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("options", [{"allow_larger": True}, {"always_split": True}])
def test_a_larger_model_is_called_larger(tmp_path, options):
    path = grown(tmp_path)
    report = exported(path, rank=4, **options)
    assert report.compressed.bytes > report.dense.bytes == path.stat().st_size
    change = f"{report.compressed.bytes / report.dense.bytes:.2f}x larger"
    for name in ("README.md", "report.html"):
        text = (tmp_path / "b" / name).read_text()
        assert change in text
        assert "x smaller" not in text


def test_rewrite_refuses_too(tmp_path):
    path = grown(tmp_path)
    with pytest.raises(ModelError, match="allow-larger"):
        rsi_deploy.rewrite(path, tmp_path / "small.onnx", rank=4)
    assert not (tmp_path / "small.onnx").exists()
    rsi_deploy.rewrite(path, tmp_path / "small.onnx", rank=4, allow_larger=True)
    assert (tmp_path / "small.onnx").stat().st_size > path.stat().st_size


def test_a_sweep_drops_a_point_that_is_larger_than_the_file(tmp_path):
    path = mlp_onnx(tmp_path / "m.onnx", sizes=(12, 48, 40, 10))
    calib = {"x": np.random.default_rng(1).standard_normal((64, 12)).astype(np.float32)}
    np.savez(tmp_path / "c.npz", **calib)
    sweep = rsi_deploy.sweep(
        str(path), tmp_path / "s", calib=tmp_path / "c.npz", points=2, highest=0.99, lowest=0.4, measure=False
    )
    first, last = sweep.points
    assert "allow-larger" in first.problem
    assert not (tmp_path / "s" / "point-01").exists()
    assert last.size.bytes < sweep.dense.bytes == path.stat().st_size


def test_a_report_is_read_from_a_path_in_a_string(tmp_path):
    report = exported(products(tmp_path / "m.onnx", {"w": weight(64, 64)}))
    assert read_report(str(tmp_path / "b")) == read_report(Path(tmp_path / "b")) == report
    assert json.loads((tmp_path / "b" / "report.json").read_text())["dense"]["params"] == 64 * 64
