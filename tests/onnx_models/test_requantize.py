"""Weights of few bits become what their codes stand for; products of codes become float products."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from calibrated_nets import IMAGE, conv_net, inputs, saved, text_net
from int8_products import needs_exact_int8
from onnx import TensorProto, helper, numpy_helper
from quantized_nets import IMAGES, NETS, PRODUCTS, answers, distance, quantized_net

from rsi_deploy.io.onnx_file import read_onnx, write_onnx
from rsi_deploy.onnx_models.requantize import dequantize_, quantized_products, quantized_tables
from rsi_deploy.precision.lowering import CalibrationFeeds, Lowering, lower
from rsi_deploy.precision.schemes import DYNAMIC, FEW_BITS, static

CASES = [
    *(("images", way) for way in ("QDQ", "QOperator", "dynamic", "dynamic uint8")),
    *(("texts", way) for way in ("QDQ", "QOperator", "dynamic", "dynamic uint8", "blocks", "symmetric blocks")),
]
LIMIT = 0.02
"""Relative distance that rounded activations make in these nets of three layers; a step is 1/255 of the range."""


def dequantized(source, target):
    model = read_onnx(source)
    dequantize_(model)
    write_onnx(model, target)
    onnx.checker.check_model(target, full_check=True)
    return model


@needs_exact_int8
@pytest.mark.parametrize(("net", "way"), CASES)
def test_answers_stay(tmp_path, net, way):
    batch = NETS[net][1]
    source = quantized_net(tmp_path / "q.onnx", net, way)
    assert len(quantized_products(read_onnx(source))) == PRODUCTS[net]
    model = dequantized(source, tmp_path / "f.onnx")
    assert not quantized_products(model)
    assert not quantized_tables(model)
    assert not [node.op_type for node in model.graph.all_nodes() if "uant" in node.op_type or "QLinear" in node.op_type]
    expected = answers(source, batch)
    assert distance(answers(tmp_path / "f.onnx", batch), expected) < (1e-5 if "blocks" in way else LIMIT)
    weight = model.graph.initializers["grow.weight" if net == "texts" else "conv2.weight"]
    weight.const_value = ir.tensor(np.ascontiguousarray(weight.const_value.numpy()[::-1]))
    write_onnx(model, tmp_path / "wrong.onnx")
    assert distance(answers(tmp_path / "wrong.onnx", batch), expected) > LIMIT, "a wrong weight is noticed"


@pytest.mark.parametrize(("net", "way"), CASES)
def test_weights_are_near_the_float_ones_and_have_their_names(tmp_path, net, way):
    source = quantized_net(tmp_path / "q.onnx", net, way)
    model = dequantized(source, tmp_path / "f.onnx")
    floats = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "float-q.onnx").graph.initializer}
    weights = {name: array for name, array in floats.items() if array.ndim > 1}
    assert weights
    for name, weight in weights.items():
        found = model.graph.initializers[name].const_value.numpy()
        found = found.T if found.shape != weight.shape else found
        step = np.ptp(weight) / (15 if "blocks" in way else 127)
        assert 0 < np.abs(found - weight).max() <= step


@needs_exact_int8
@pytest.mark.parametrize("scheme", [static("minmax"), DYNAMIC, FEW_BITS], ids=["static", "dynamic", "few bits"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_our_own_models_become_float_again(tmp_path, scheme, bits):
    net = conv_net(tmp_path / "m.onnx")
    x = np.load(inputs(tmp_path / "c.npz", *IMAGE, count=32))["x"]
    data = CalibrationFeeds(feeds=lambda: iter([{"input": x}]), samples=32)
    sites = dict.fromkeys(("conv1", "conv2", "grouped", "head"), bits)
    ranks = {"conv2": 4, "head": 2} if scheme is FEW_BITS and bits < 8 else {}
    lower(net, tmp_path / "q.onnx", Lowering(scheme=scheme, bits={} if bits == 8 else sites, repairs=ranks), data)
    assert "head" in quantized_products(read_onnx(tmp_path / "q.onnx"))
    model = dequantized(tmp_path / "q.onnx", tmp_path / "f.onnx")
    assert not quantized_products(model)
    assert [node.op_type for node in model.graph if node.name == "head"] == ["MatMul" if scheme is DYNAMIC else "Gemm"]
    assert distance(answers(tmp_path / "f.onnx", IMAGES), answers(tmp_path / "q.onnx", IMAGES)) < 2 * LIMIT


def test_tables_in_blocks_become_float(tmp_path):
    ids = {"ids": np.arange(0, 400, 7)}
    table = np.random.default_rng(0).standard_normal((400, 32)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["output"], "embed")]
    infos = {"ids": (TensorProto.INT64, ["N"])}, {"output": (TensorProto.FLOAT, ["N", 32])}
    net = saved(tmp_path / "m.onnx", nodes, {"table": table}, *infos)
    for bits in (4, 8):
        lower(net, tmp_path / "q.onnx", Lowering(scheme=DYNAMIC, tables={"table": bits}), None)
        assert quantized_tables(read_onnx(tmp_path / "q.onnx")) == ["embed"]
        dequantized(tmp_path / "q.onnx", tmp_path / "f.onnx")
        expected = answers(tmp_path / "q.onnx", ids)
        assert np.allclose(answers(tmp_path / "f.onnx", ids), expected, atol=1e-6)
        assert not np.allclose(answers(net, ids), expected, atol=1e-6)


@needs_exact_int8
def test_a_relu_that_the_codes_were_comes_back(tmp_path):
    source = quantized_net(tmp_path / "q.onnx")
    assert not [n for n in onnx.load(source).graph.node if n.op_type == "Relu"]
    model = dequantized(source, tmp_path / "f.onnx")
    clips = [node for node in model.graph if node.op_type == "Clip"]
    assert len(clips) == 3
    for clip in clips:
        ir.convenience.replace_all_uses_with(clip.outputs[0], clip.inputs[0])
    write_onnx(model, tmp_path / "wrong.onnx")
    expected = answers(source, IMAGES)
    assert distance(answers(tmp_path / "f.onnx", IMAGES), expected) < LIMIT
    assert distance(answers(tmp_path / "wrong.onnx", IMAGES), expected) > 10 * LIMIT


def test_what_fits_no_pattern_stays(tmp_path):
    """Codes that come from the caller, a product whose codes somebody else reads, and a float net."""
    weights = {"w": np.arange(-8, 8, dtype=np.int8).reshape(4, 4), "s": np.float32(0.1), "z": np.int8(0)}
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w"], ["y"], "product"),
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["f"], "values"),
    ]
    infos = (
        {"x": (TensorProto.INT8, ["N", 4])},
        {"y": (TensorProto.INT32, ["N", 4]), "f": (TensorProto.FLOAT, ["N", 4])},
    )
    source = saved(tmp_path / "m.onnx", nodes, weights, *infos)
    model = dequantized(source, tmp_path / "f.onnx")
    assert quantized_products(model) == ["product"]
    assert [node.op_type for node in model.graph] == ["MatMulInteger", "DequantizeLinear"]
    for write in (conv_net, text_net):
        path = write(tmp_path / "n.onnx")
        before = [(n.op_type, [v.name for v in n.inputs]) for n in read_onnx(path).graph]
        model = dequantized(path, tmp_path / "f.onnx")
        assert [(n.op_type, [v.name for v in n.inputs]) for n in model.graph] == before
        assert not quantized_products(model)


def test_products_of_a_part_are_counted(tmp_path):
    model = read_onnx(quantized_net(tmp_path / "q.onnx", excluded=["conv2"]))
    assert quantized_products(model) == ["conv1", "grouped", "head"]
    dequantize_(model)
    assert not quantized_products(model)
