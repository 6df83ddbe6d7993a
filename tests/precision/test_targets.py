"""`--target`: what is written for a provider is what that provider runs."""

import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from calibrated_nets import IMAGE, conv_net, inputs, saved, text_net, weight
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import export, verify
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.precision.lowering import CalibrationFeeds, Lowering, lower
from rsi_deploy.precision.schemes import DYNAMIC, FEW_BITS, static
from rsi_deploy.precision.targets import ANY, TARGETS, target_named

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
TENSORRT, QNN, OPENVINO, CUDA = (target_named(name) for name in ("tensorrt", "qnn", "openvino", "cuda"))


def fixed(source, path, batch=1):
    """Write a copy of a model with a fixed batch."""
    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, path)
    return path


def one_node(node, dims=("N", 8), weights=None):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    return helper.make_model(helper.make_graph([node], "g", value[:1], value[1:], tensors))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A net with a dynamic batch, the same one with a fixed batch, and calibration data."""
    root = tmp_path_factory.mktemp("net")
    source = conv_net(root / "m.onnx")
    return source, fixed(source, root / "fixed.onnx"), inputs(root / "c.npz", *IMAGE, count=160, low_rank=4)


@pytest.fixture(scope="module")
def data(net):
    x = np.load(net[2])["x"][:32]
    return CalibrationFeeds(feeds=lambda: iter([{"input": x}]), samples=32)


@pytest.mark.parametrize("target", [target.name for target in TARGETS])
def test_an_export_for_each_target_keeps_to_its_list(net, tmp_path, target):
    source, still, calib = net
    report = export(
        str(still if target == "qnn" else source),
        tmp_path / "b",
        calib=str(calib),
        precision="auto",
        max_size=30_000,
        target=target,
        measure=False,
    )
    record, limits = report.precision, target_named(target)
    assert record.target == target
    assert "float16" in {point.scheme for point in record.points} or target == "cpu"
    assert ("dynamic int8" in {point.scheme for point in record.points}) == (target in ("cpu", "openvino"))
    assert f"for {target}" in (tmp_path / "b" / "README.md").read_text()
    assert any(f"--target {target}" in note for note in report.notes)
    limits.check_model(onnx.load(tmp_path / "b" / "model.onnx"))
    assert "broken" not in {claim.status for claim in verify(tmp_path / "b").claims}


def test_without_a_target_every_scheme_is_as_before():
    assert ANY.static("minmax") == static("minmax")
    assert target_named(None) is ANY
    assert ANY.runs("GatherBlockQuantized")
    assert target_named("cpu").static("percentile") == static("percentile")


def test_tensorrt_gets_int8_activations_around_zero(net, data, tmp_path):
    lower(net[0], tmp_path / "q.onnx", Lowering(scheme=TENSORRT.static("minmax"), bits={"conv2": 4}), data)
    model = onnx.load(tmp_path / "q.onnx")
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    zeros = [known[node.input[2]] for node in model.graph.node if node.op_type in QUANTIZERS if len(node.input) > 2]
    assert zeros
    assert {tensor.data_type for tensor in zeros} == {TensorProto.INT8}
    assert not any(numpy_helper.to_array(tensor).any() for tensor in zeros)
    assert sum(node.op_type == "Relu" for node in model.graph.node) == 3  # int8 around zero cuts off nothing
    TENSORRT.check_model(model)
    lower(net[0], tmp_path / "u.onnx", Lowering(scheme=static("minmax")), data)
    with pytest.raises(ModelError, match=re.compile("zero point 0.*--target", re.DOTALL)):
        TENSORRT.check_model(onnx.load(tmp_path / "u.onnx"))


def test_qnn_gets_uint8_weights_of_products(net, data, tmp_path):
    lower(net[0], tmp_path / "q.onnx", Lowering(scheme=QNN.static("minmax")), data)
    model = onnx.load(tmp_path / "q.onnx")
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    read = {
        node.name: [known[name] for name in made[node.input[1]].input[:2]]
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
    }
    assert (read["head"][0].data_type, list(read["head"][1].dims)) == (TensorProto.UINT8, [])
    assert (read["conv1"][0].data_type, list(read["conv1"][1].dims)) == (TensorProto.INT8, [24])


@pytest.mark.parametrize("scheme", [static("minmax"), FEW_BITS], ids=["int8", "float"])
def test_onnxruntime_unpacks_few_bits_before_a_provider_sees_them(net, data, tmp_path, scheme):
    bits = {"conv1": 5, "conv2": 4, "grouped": 3, "head": 4}
    lower(net[0], tmp_path / "q.onnx", Lowering(scheme=scheme, bits=bits), data)
    OPENVINO.check_model(onnx.load(tmp_path / "q.onnx"))
    levels = ort.GraphOptimizationLevel
    operators, types = {}, {}
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC):  # basic ones run before partitioning
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(tmp_path / "basic.onnx")
        ort.InferenceSession(tmp_path / "q.onnx", options, providers=["CPUExecutionProvider"])
        graph = onnx.load(tmp_path / "basic.onnx").graph
        operators[level] = {node.op_type for node in graph.node}
        types[level] = {tensor.data_type for tensor in graph.initializer}
    unpacking, stored = {"Cast", "Mul", "Div", "Mod", "Sub", "Slice"}, {TensorProto.INT4, TensorProto.UINT16}
    assert unpacking <= operators[levels.ORT_DISABLE_ALL]
    assert stored <= types[levels.ORT_DISABLE_ALL]
    assert not unpacking & operators[levels.ORT_ENABLE_BASIC]
    assert not stored & types[levels.ORT_ENABLE_BASIC]


def test_embedding_tables_stay_in_float_where_nothing_unpacks_their_rows(tmp_path):
    source = tmp_path / "t.onnx"
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], "embed"),
        helper.make_node("MatMul", ["x", "fc.weight"], ["y"], "fc"),
    ]
    weights = {"table": weight(rng, 400, 32, gain=4), "fc.weight": weight(rng, 32, 32)}
    saved(source, nodes, weights, {"ids": (TensorProto.INT64, ["N", 4])}, {"y": (TensorProto.FLOAT, ["N", 4, 32])})
    ids = rng.integers(0, 400, (64, 4))
    feeds = CalibrationFeeds(feeds=lambda: iter([{"ids": ids}]), samples=64)

    def operators(**settings):
        lower(source, tmp_path / "q.onnx", Lowering(scheme=FEW_BITS, **settings), feeds)
        model = onnx.load(tmp_path / "q.onnx")
        return model, {node.op_type for node in model.graph.node}

    model, found = operators()
    assert "GatherBlockQuantized" in found
    for target in (TENSORRT, QNN, OPENVINO):
        with pytest.raises(ModelError, match="GatherBlockQuantized"):
            target.check_model(model)
    CUDA.check_model(model)
    model, found = operators(table_bits=32)
    assert "GatherBlockQuantized" not in found
    for target in (TENSORRT, QNN, OPENVINO):
        target.check_model(model)


def test_a_text_model_for_openvino_has_its_table_in_float(tmp_path):
    source = text_net(tmp_path / "m.onnx", width=256)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 20, (160, 6))
    np.savez(tmp_path / "c.npz", ids=ids, attention_mask=np.ones_like(ids))
    report = export(
        str(source),
        tmp_path / "b",
        calib=str(tmp_path / "c.npz"),
        precision="int8",
        max_size=45_000,
        target="openvino",
        measure=False,
    )
    assert report.precision.tables == {}
    model = onnx.load(tmp_path / "b" / "model.onnx")
    assert all(node.domain == "" for node in model.graph.node)


@pytest.mark.parametrize(
    ("operator", "domain", "refusing", "remedy"),
    [
        ("Attention", "", {"tensorrt", "qnn"}, "--opset 20"),
        ("Loop", "", {"qnn"}, "--target"),
        ("MatMulNBits", "com.microsoft", {"tensorrt", "qnn"}, "--target"),
        ("MatMulInteger", "", {"tensorrt", "qnn"}, "--requantize"),
        ("DynamicQuantizeLinear", "", {"cuda", "tensorrt", "qnn"}, "--requantize"),
        ("Mine", "my.domain", {"tensorrt", "openvino", "qnn"}, "--target"),
        ("Relu", "", set(), ""),
    ],
)
def test_a_refused_operator_is_named_with_its_node(operator, domain, refusing, remedy):
    model = one_node(helper.make_node(operator, ["x"], ["y"], "here", domain=domain))
    for target in TARGETS:
        if target.name not in refusing:
            target.check_model(model)
            continue
        with pytest.raises(ModelError) as caught:
            target.check_model(model)
        assert all(word in str(caught.value) for word in (operator, "here", target.name))
        assert remedy in caught.value.hint


def test_nodes_of_constants_reach_no_provider():
    weights = {"a": np.arange(6).astype(np.float32), "b": np.float32(4)}
    nodes = [
        helper.make_node("BitShift", ["a", "b"], ["w"], "folded", direction="LEFT"),
        helper.make_node("Add", ["x", "w"], ["y"], "add"),
    ]
    model = one_node(nodes[0], (6,), weights)
    model.graph.node.append(nodes[1])
    TENSORRT.check_model(model)
    model.graph.input.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [6]))  # callers may replace it
    with pytest.raises(ModelError, match="folded"):
        TENSORRT.check_model(model)


def test_quantizers_without_a_zero_point_are_uint8():
    scale = {"s": np.float32(0.1)}
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"], "q")
    with pytest.raises(ModelError, match="q"):
        TENSORRT.check_model(one_node(node, weights=scale))
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"], "q", output_dtype=TensorProto.INT8)
    TENSORRT.check_model(one_node(node, weights=scale))


def test_ranks_for_tensorrt_are_multiples_of_16(net, tmp_path):
    options = {"calib": str(net[2]), "keep_macs": 0.8, "measure": False, "allow_slower": True}
    report = export(str(net[0]), tmp_path / "b", target="tensorrt", **options)
    ranks = {site.rank for site in report.sites if site.rank}
    assert ranks
    assert all(rank % 16 == 0 for rank in ranks)
    report = export(str(net[0]), tmp_path / "c", **options)
    assert any(site.rank % 16 for site in report.sites if site.rank)


def test_dynamic_shapes_for_qnn_are_refused_before_any_work(net, tmp_path):
    with pytest.raises(UsageError) as caught:
        export(str(net[0]), tmp_path / "b", rank="50%", target="qnn", measure=False)
    command = re.search(
        r"make_dynamic_shape_fixed (\S+) fixed.onnx --input_name (\S+) --input_shape ([\d,]+)", caught.value.hint
    )
    assert command.groups() == ("m.onnx", "input", "1,3,8,8")
    assert "'input'" in str(caught.value)


def test_a_float_export_is_checked_and_says_so(net, tmp_path):
    report = export(str(net[1]), tmp_path / "b", rank="40%", target="qnn", measure=False)
    assert any("--target qnn" in note and "cpu" in note for note in report.notes)
    x = np.random.default_rng(0).standard_normal((1, *IMAGE)).astype(np.float32)
    assert ort.InferenceSession(tmp_path / "b" / "model.onnx").run(None, {"input": x})[0].shape == (1, 10)
    loop = onnx.load(net[1])
    loop.graph.node.insert(0, helper.make_node("BitShift", ["u", "u"], ["v"], "shift", direction="LEFT"))
    loop.graph.input.append(helper.make_tensor_value_info("u", TensorProto.UINT8, [1, 2]))
    loop.graph.output.append(helper.make_tensor_value_info("v", TensorProto.UINT8, [1, 2]))
    onnx.save(loop, tmp_path / "shift.onnx")
    with pytest.raises(ModelError, match=re.compile("BitShift.*'shift'", re.DOTALL)):
        export(str(tmp_path / "shift.onnx"), tmp_path / "c", rank="40%", target="tensorrt", measure=False)


def test_a_precision_that_the_target_does_not_run_is_refused_with_those_that_it_runs(net, tmp_path):
    with pytest.raises(UsageError) as caught:
        export(str(net[1]), tmp_path / "b", calib=str(net[2]), precision="int4", target="qnn", max_size=30_000)
    assert "qnn" in str(caught.value)
    assert {"int8", "float16", "auto"} <= set(re.findall(r"\w+", caught.value.hint))
    assert "int4" not in caught.value.hint


def test_no_scheme_of_a_target_writes_what_it_refuses(net, data, tmp_path):
    ids = np.random.default_rng(0).integers(1, 20, (32, 6))
    texts = CalibrationFeeds(feeds=lambda: iter([{"ids": ids, "attention_mask": np.ones_like(ids)}]), samples=32)
    cases = [(net[0], data), (text_net(tmp_path / "t.onnx", width=256), texts)]
    for target in TARGETS:
        schemes = [target.static("minmax"), FEW_BITS, *([DYNAMIC] if DYNAMIC.kind in target.kinds else [])]
        for scheme in schemes:
            for source, feeds in cases:
                bits = 8 if target.runs("GatherBlockQuantized") else 32
                lower(source, tmp_path / "q.onnx", Lowering(scheme=scheme, table_bits=bits), feeds)
                target.check_model(onnx.load(tmp_path / "q.onnx"))
