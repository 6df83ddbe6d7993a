"""Lowering: every weight is stored in the bits of its site, and the same request writes the same bytes."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from calibrated_nets import IMAGE, branch_net, conv_net, inputs, saved, text_net, weight
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import export
from rsi_deploy.precision.lowering import CalibrationFeeds, Lowering, lower
from rsi_deploy.precision.schemes import DYNAMIC, FEW_BITS, FLOAT16, static

STATIC = static("minmax")
RANKS = {"conv1": ("separable", 7), "conv2": ("input", 6), "head": ("gemm", 4)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A net, the same net with splits, and data."""
    root = tmp_path_factory.mktemp("images")
    source = conv_net(root / "dense.onnx")
    plan = {site: {"form": form, "rank": rank} for site, (form, rank) in RANKS.items()}
    (root / "plan.json").write_text(json.dumps({"schema_version": 1, "tool": "", "sites": plan}))
    export(str(source), root / "split", plan=root / "plan.json", measure=False)
    x = np.load(inputs(root / "c.npz", *IMAGE, count=32, low_rank=4))["x"]
    return source, root / "split" / "model.onnx", CalibrationFeeds(feeds=lambda: iter([{"input": x}]), samples=32), x


def run(path, values):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, values)[0]


def weight_types(path):
    """Name of each Conv, Gemm and product -> the type of numbers that its weight is stored in."""
    model = onnx.load(path)
    made = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def type_of(name):
        while name not in stored:
            name = made[name].input[0]
        return TensorProto.DataType.Name(stored[name].data_type)

    products = ("Conv", "Gemm", "MatMul", "MatMulInteger")
    return {node.name: type_of(node.input[1]) for node in model.graph.node if node.op_type in products}


def test_each_site_has_its_bits(images, tmp_path):
    source, _, data, _ = images
    found = lower(source, tmp_path / "q.onnx", Lowering(scheme=STATIC, bits={"conv2": 4, "head": 32}), data)
    assert found == {"conv2": 4}
    assert weight_types(tmp_path / "q.onnx") == {"conv1": "INT8", "conv2": "INT4", "grouped": "INT8", "head": "FLOAT"}
    head = numpy_helper.to_array(next(t for t in onnx.load(source).graph.initializer if t.name == "head.weight"))
    assert any(np.array_equal(numpy_helper.to_array(t), head) for t in onnx.load(tmp_path / "q.onnx").graph.initializer)


def test_sites_of_a_dynamic_model_have_their_bits(images, tmp_path):
    source, _, _, x = images
    lower(source, tmp_path / "q.onnx", Lowering(scheme=DYNAMIC, bits={"head": 4}), None)
    kinds = {name.removesuffix("_MatMul"): kind for name, kind in weight_types(tmp_path / "q.onnx").items()}
    assert kinds == {
        "conv1": "INT8",
        "conv2": "INT8",
        "grouped": "INT8",
        "head": "INT4",
    }  # float products of convolutions
    all_sites = dict.fromkeys(("conv1", "conv2", "grouped", "head"), 32)
    lower(source, tmp_path / "f.onnx", Lowering(scheme=DYNAMIC, bits=all_sites), None)
    assert np.array_equal(run(tmp_path / "f.onnx", {"input": x}), run(source, {"input": x}))


@pytest.mark.parametrize(("bits", "kind"), [(4, "INT4"), (8, "INT8"), (32, "FLOAT")])
def test_both_factors_follow_the_bits_of_their_site(images, tmp_path, bits, kind):
    _, split, data, _ = images
    lower(split, tmp_path / "q.onnx", Lowering(scheme=STATIC, bits={} if bits == 8 else {"conv2": bits}), data)
    kinds = weight_types(tmp_path / "q.onnx")
    assert {name: k for name, k in kinds.items() if name.startswith("conv2")} == {
        "conv2/right": kind,
        "conv2/left": kind,
    }
    assert {k for name, k in kinds.items() if not name.startswith("conv2")} == {"INT8"}


def test_a_site_with_float_products_has_its_bits(images, tmp_path):
    source, _, data, x = images
    bits, expected = {"conv2": 3, "head": 4, "conv1": 32}, run(source, {"input": x})
    sites = frozenset(("conv1", "conv2", "grouped", "head"))
    kinds = {"conv1": "FLOAT", "conv2": "UINT16", "grouped": "INT8", "head": "INT4"}
    errors = {}
    for name, scheme, in_float in (
        ("few", FEW_BITS, ()),
        ("static", STATIC, ()),
        ("two", STATIC, ("conv2", "head")),
        ("all", STATIC, sites),
    ):
        path = tmp_path / f"{name}.onnx"
        found = lower(source, path, Lowering(scheme=scheme, bits=bits, in_float=frozenset(in_float)), data)
        assert weight_types(path) == kinds
        assert found.items() >= {"conv2": 3, "head": 4}.items()
        errors[name] = np.linalg.norm(run(path, {"input": x}) - expected)
    assert errors["few"] < errors["two"] < errors["static"]
    quantized = [node.op_type for node in onnx.load(tmp_path / "few.onnx").graph.node]
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(quantized)
    assert max(errors["few"], errors["all"]) < 2 * min(errors["few"], errors["all"])


def test_a_repair_brings_the_answers_nearer(images, tmp_path):
    source, _, data, x = images
    expected, bits = run(source, {"input": x}), dict.fromkeys(("conv1", "conv2", "head"), 3)
    errors = []
    for name, ranks in (("plain", {}), ("repaired", {"conv1": 4, "conv2": 8, "head": 2})):
        lower(source, tmp_path / f"{name}.onnx", Lowering(scheme=FEW_BITS, bits=bits, repairs=ranks), data)
        errors.append(np.linalg.norm(run(tmp_path / f"{name}.onnx", {"input": x}) - expected))
    assert errors[1] < 0.8 * errors[0]


def test_names_and_marks_of_splits_stay(images, tmp_path):
    _, split, data, _ = images
    lower(split, tmp_path / "q.onnx", Lowering(scheme=STATIC, bits={"conv1": 4}), data)
    before = {n.name: [(p.key, p.value) for p in n.metadata_props] for n in onnx.load(split).graph.node}
    after = {n.name: [(p.key, p.value) for p in n.metadata_props] for n in onnx.load(tmp_path / "q.onnx").graph.node}
    marked = {name: marks for name, marks in before.items() if marks}
    assert marked
    assert {name: after[name] for name in marked} == marked


def test_data_make_four_bits_answer_better(images, tmp_path):
    source, _, data, x = images
    bits, expected = dict.fromkeys(("conv1", "conv2", "grouped", "head"), 4), run(source, {"input": x})
    errors = {}
    lower(source, tmp_path / "fitted.onnx", Lowering(scheme=STATIC, bits=bits), data)
    noise = np.random.default_rng(9).standard_normal(x.shape).astype(np.float32) * np.abs(x).max() / 4
    other = CalibrationFeeds(feeds=lambda: iter([{"input": noise}]), samples=32)
    lower(source, tmp_path / "other.onnx", Lowering(scheme=STATIC, bits=bits), other)
    for name in ("fitted", "other"):
        errors[name] = np.linalg.norm(run(tmp_path / f"{name}.onnx", {"input": x}) - expected)
    assert errors["fitted"] < 0.8 * errors["other"]


def test_the_same_request_writes_the_same_bytes(images, tmp_path):
    _, split, data, _ = images
    lowering = Lowering(scheme=STATIC, bits={"conv1": 4, "head": 4})
    for name in ("a", "b"):
        lower(split, tmp_path / f"{name}.onnx", lowering, data)
    lower(split, tmp_path / "c.onnx", Lowering(scheme=STATIC, bits={"conv1": 4}), data)
    first, second, other = ((tmp_path / f"{name}.onnx").read_bytes() for name in "abc")
    assert first == second != other
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "b.onnx", "c.onnx"}  # no leftovers


def factor_net(path):
    """Write two products whose weights have names like factors, and nodes without metadata."""
    rng = np.random.default_rng(0)
    weights = {"fc.right": weight(rng, 24, 16).T.copy(), "fc.left": weight(rng, 10, 24).T.copy()}
    nodes = [
        helper.make_node("MatMul", ["input", "fc.right"], ["a"], "fc/right"),
        helper.make_node("MatMul", ["a", "fc.left"], ["output"], "fc/left"),
    ]
    infos = {"input": (TensorProto.FLOAT, ["N", 16])}, {"output": (TensorProto.FLOAT, ["N", 10])}
    return saved(path, nodes, weights, *infos)


def test_factors_without_marks_are_stored_in_four_bits_too(tmp_path):
    source = factor_net(tmp_path / "m.onnx")
    found = lower(source, tmp_path / "q.onnx", Lowering(scheme=DYNAMIC, bits={"fc": 4}), None)
    assert found == {"fc/right": 4, "fc/left": 4}
    assert set(weight_types(tmp_path / "q.onnx").values()) == {"INT4"}
    x = np.random.default_rng(3).standard_normal((4, 16)).astype(np.float32)
    expected = run(source, {"input": x})
    assert np.linalg.norm(run(tmp_path / "q.onnx", {"input": x}) - expected) < 0.3 * np.linalg.norm(expected)


def table_net(path):
    """Write an embedding of 400 rows of 32 numbers, and a product."""
    rng = np.random.default_rng(0)
    weights = {"table": weight(rng, 400, 32, gain=4), "fc": weight(rng, 32, 32).T.copy()}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], "embed"),
        helper.make_node("MatMul", ["x", "fc"], ["output"], "fc"),
    ]
    infos = {"ids": (TensorProto.INT64, ["N"])}, {"output": (TensorProto.FLOAT, ["N", 32])}
    return saved(path, nodes, weights, *infos)


def test_tables_have_their_bits(tmp_path):
    source, sizes, errors = table_net(tmp_path / "m.onnx"), {}, {}
    ids = {"ids": np.arange(0, 400, 7)}
    for bits in (4, 8, 32):
        lower(source, tmp_path / "q.onnx", Lowering(scheme=DYNAMIC, bits={"fc": 32}, tables={"table": bits}), None)
        sizes[bits] = (tmp_path / "q.onnx").stat().st_size
        errors[bits] = np.linalg.norm(run(tmp_path / "q.onnx", ids) - run(source, ids))
        gathers = [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node if "Gather" in n.op_type]
        assert gathers == ["Gather" if bits == 32 else "GatherBlockQuantized"]
    assert errors[32] == 0 < errors[8] < 0.1 * errors[4]
    assert sizes[4] < 0.7 * sizes[8]
    assert sizes[8] < 0.4 * sizes[32]


def test_a_model_of_text_with_everything_in_four_bits(tmp_path):
    source = text_net(tmp_path / "m.onnx")
    found = lower(source, tmp_path / "q.onnx", Lowering(scheme=DYNAMIC, bits={"grow": 4, "shrink": 4}), None)
    assert found == {"grow": 4, "shrink": 4}
    values = {"ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}
    expected = run(source, values)
    assert np.linalg.norm(run(tmp_path / "q.onnx", values) - expected) < 0.3 * np.linalg.norm(expected)


def test_splits_in_branches_are_read_by_their_new_names(tmp_path):
    export(str(branch_net(tmp_path / "m.onnx")), tmp_path / "split", rank=4, measure=False)
    split = tmp_path / "split" / "model.onnx"
    lower(split, tmp_path / "q.onnx", Lowering(scheme=FLOAT16), None)
    for sign in (1, -1):  # each takes another branch
        x = {"input": sign * np.abs(np.random.default_rng(3).standard_normal((1, 16))).astype(np.float32)}
        expected = run(split, x)
        assert 0 < np.linalg.norm(run(tmp_path / "q.onnx", x) - expected) < 0.01 * np.linalg.norm(expected)


def optimized(path, target):
    """The model as onnxruntime runs it."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(target)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(target).graph


def test_weights_that_stay_float_are_multiplied_as_float(images, tmp_path, monkeypatch):
    """onnxruntime rounds float weights behind a DequantizeLinear as it loads a model; a Clip in front prevents it."""
    source, _, data, _ = images
    weight_of = {t.name: numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}["conv2.weight"]

    def runs_float():
        lower(source, tmp_path / "q.onnx", Lowering(scheme=STATIC, bits={"conv2": 32}), data)
        stored = map(numpy_helper.to_array, optimized(tmp_path / "q.onnx", tmp_path / "o.onnx").initializer)
        return any(np.array_equal(array, weight_of) for array in stored)

    assert runs_float()
    monkeypatch.setattr("rsi_deploy.precision.lowering.stay_float_", lambda model, names: None)
    assert not runs_float()


@pytest.mark.parametrize("bits", [4, 8])
def test_products_behind_a_table_are_computed_in_int8(tmp_path, bits):
    """Without the type of the rows, onnxruntime's quantizer takes the product behind them for none of float."""
    source = table_net(tmp_path / "m.onnx")
    ids = {"ids": np.arange(0, 400, 7)}
    data = CalibrationFeeds(feeds=lambda: iter([ids]), samples=len(ids["ids"]))
    lower(source, tmp_path / "q.onnx", Lowering(scheme=STATIC, tables={"table": bits}), data)
    operators = [node.op_type for node in optimized(tmp_path / "q.onnx", tmp_path / "o.onnx").node]
    assert "QLinearMatMul" in operators
    assert "GatherBlockQuantized" in operators


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (4, 4)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_products_of_one_input_or_output_are_unpacked(tmp_path, shape, bits):
    """A weight of one row is its own transpose but for its shape."""
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.standard_normal(shape).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "fc.weight"], ["y"], "fc")]
    infos = {"x": (TensorProto.FLOAT, ["N", shape[0]])}, {"y": (TensorProto.FLOAT, ["N", shape[1]])}
    source = saved(tmp_path / "m.onnx", nodes, weights, *infos, opset=21)
    x = rng.standard_normal((4, shape[0])).astype(np.float32)
    lower(source, tmp_path / "q.onnx", Lowering(scheme=FEW_BITS, bits={"fc": bits}), None)
    expected = run(source, {"x": x})
    error = np.linalg.norm(run(tmp_path / "q.onnx", {"x": x}) - expected) / np.linalg.norm(expected)
    assert 0 <= error < {3: 0.4, 4: 0.2, 8: 0.02}[bits]
