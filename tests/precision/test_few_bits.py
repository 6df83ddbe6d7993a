"""Weights in few bits: onnxruntime computes with exactly the numbers that the codes stand for, in its own kernels."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from calibrated_nets import saved, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy.calibration.repair import repairs
from rsi_deploy.calibration.rounding import CODES, rounded
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.precision.embedding_tables import (
    EmbeddingTable,
    store_table_,
    stored_table_bytes,
    table_block,
    table_codes,
    table_values,
    tables,
)
from rsi_deploy.precision.few_bits import IR_VERSION, OPSET, store_float_weights_, store_int8_weights_
from rsi_deploy.precision.quantizers import quantize
from rsi_deploy.precision.schemes import DYNAMIC, static

STATIC = static("minmax")


def conv_model(path, *, change=None):
    """Write two convolutions of one weight (the first one with a bias), a mean and a Gemm."""
    rng = np.random.default_rng(0)
    weights = {
        "stem.weight": weight(rng, 8, 3, 3, 3),
        "stem.bias": rng.standard_normal(8).astype(np.float32),
        "twice.weight": weight(rng, 8, 8, 3, 3),
        "twice.bias": rng.standard_normal(8).astype(np.float32),
        "head.weight": weight(rng, 10, 8),
        "head.bias": rng.standard_normal(10).astype(np.float32),
    }
    if change is not None:
        change(weights)
    nodes = [
        helper.make_node("Conv", ["input", "stem.weight", "stem.bias"], ["a"], "stem", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "relu1"),
        helper.make_node("Conv", ["b", "twice.weight", "twice.bias"], ["c"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"], "relu2"),
        helper.make_node("Conv", ["d", "twice.weight"], ["e"], "second", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["e"], ["f"], "mean"),
        helper.make_node("Flatten", ["f"], ["g"], "flatten"),
        helper.make_node("Gemm", ["g", "head.weight", "head.bias"], ["output"], "head", transB=1),
    ]
    infos = {"input": (TensorProto.FLOAT, ["N", 3, 8, 8])}, {"output": (TensorProto.FLOAT, ["N", 10])}
    return saved(path, nodes, weights, *infos, opset=OPSET), [n for n in weights if n.endswith("weight")]


def product_model(path):
    rng = np.random.default_rng(0)
    weights = {
        "grow.weight": weight(rng, 48, 32).T.copy(),
        "head.weight": weight(rng, 10, 48),
        "head.bias": np.ones(10, np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["input", "grow.weight"], ["a"], "grow"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Gemm", ["b", "head.weight", "head.bias"], ["output"], "head", transB=1),
    ]
    infos = {"input": (TensorProto.FLOAT, ["N", 32])}, {"output": (TensorProto.FLOAT, ["N", 10])}
    return saved(path, nodes, weights, *infos, opset=OPSET), ["grow.weight", "head.weight"]


def feeds(path, count=8):
    value = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    shape = [count, *(dim.dim_value for dim in value[1:])]
    return {"input": np.random.default_rng(5).standard_normal(shape).astype(np.float32)}


def out_first(path, name):
    """A float weight as `(out, in)`."""
    model = onnx.load(path)
    array = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)
    by_input = any(node.op_type == "MatMul" and name in node.input for node in model.graph.node)
    return torch.from_numpy((array.T if by_input else array.reshape(len(array), -1)).copy())


def run(model, values, folder=None):
    """Outputs of a model; with a folder also the operators that onnxruntime runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if folder is not None:
        options.optimized_model_filepath = str(folder / "fused.onnx")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, values)
    if folder is None:
        return output
    return output, {node.op_type for node in onnx.load(folder / "fused.onnx").graph.node}


def by_hand(model, name, found):
    """Write a rounded weight into the int8 initializer of a quantized model."""
    for tensor in model.graph.initializer:
        if tensor.name == f"{name}_quantized":
            int8 = found.weight8().numpy()
            reader = next(node for node in model.graph.node if tensor.name in node.input)
            axis = next((a.i for a in reader.attribute if a.name == "axis"), 1)
            stored = int8.T if reader.op_type != "DequantizeLinear" or axis == 1 else int8
            tensor.CopyFrom(numpy_helper.from_array(stored.reshape(tuple(tensor.dims)).copy(), tensor.name))
        elif tensor.name == f"{name}_scale":
            tensor.CopyFrom(numpy_helper.from_array(found.scales.numpy(), tensor.name))


def copy_biases(model, source):
    """Take the int32 biases and their scales from another model."""
    known = {tensor.name: tensor for tensor in source.graph.initializer}
    for tensor in model.graph.initializer:
        if "bias_quantized" in tensor.name:
            tensor.CopyFrom(known[tensor.name])


CASES = {
    "convolutions, static": (conv_model, STATIC, None),
    "products, static": (product_model, STATIC, 16),
    "products, static, one scale a row": (product_model, STATIC, None),
    "products, dynamic": (product_model, DYNAMIC, 16),
    "products, dynamic, one scale a row": (product_model, DYNAMIC, None),
}
FUSED = {"static int8": {"QLinearConv", "QGemm", "QLinearMatMul"}, "dynamic int8": {"DynamicQuantizeMatMul"}}


def stored(path, scheme, block, target, write, bits=4):
    """A quantized model, and the same one with weights in few bits."""
    source, names = write(path)
    quantize(source, target, scheme, lambda: iter([feeds(source)]))
    plain, small = onnx.load(target), onnx.load(target)
    weights = {name: rounded(out_first(source, name), block=block, bits=bits) for name in names}
    assert sorted(store_int8_weights_(small, weights)) == sorted(names)
    onnx.checker.check_model(small, full_check=True)
    return source, plain, small, weights


@pytest.mark.parametrize("bits", [5, 4, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_answers_are_those_of_the_int8_weights(tmp_path, case, bits):
    write, scheme, block = CASES[case]
    source, plain, small, weights = stored(tmp_path / "m.onnx", scheme, block, tmp_path / "q.onnx", write, bits)
    reference = onnx.ModelProto()
    reference.CopyFrom(plain)
    for name, found in weights.items():
        by_hand(reference, name, found)
    copy_biases(reference, small)
    values = feeds(source)
    output, operators = run(small, values, tmp_path)
    expected, usual = run(reference, values, tmp_path)
    assert np.array_equal(output, expected)
    assert not np.array_equal(output, run(plain, values))  # the weights of eight bits answer otherwise
    assert operators == usual
    assert operators & FUSED[scheme.kind]
    assert "Cast" not in operators - usual
    assert not operators & {"Conv", "Gemm", "MatMul", "MatMulInteger"}
    one = next(iter(weights))  # one wrong code is seen
    weights[one].codes[0, 0] += 1 if weights[one].codes[0, 0] < CODES[bits][1] else -1
    by_hand(reference, one, weights[one])
    assert not np.array_equal(output, run(reference, values))


@pytest.mark.parametrize("is_repaired", [False, True])
@pytest.mark.parametrize("bits", [8, 5, 4, 3])
@pytest.mark.parametrize("write", [conv_model, product_model])
def test_float_products_have_the_rounded_weights(tmp_path, write, bits, is_repaired):
    source, names = write(tmp_path / "m.onnx")
    block = 16 if write is product_model and bits < 8 else None
    weights = {name: rounded(out_first(source, name), block=block, bits=bits) for name in names}
    small, reference = onnx.load(source), onnx.load(source)
    small.ir_version = IR_VERSION
    small.opset_import[0].version = OPSET
    rows = {name: out_first(source, name).numpy() for name in names}
    made = {}
    for name in names if is_repaired else ():
        second = torch.eye(rows[name].shape[1]).double()
        (made[name],) = repairs(torch.from_numpy(rows[name]), weights[name].weight(), second, [2], Solver())
    assert sorted(store_float_weights_(small, weights, rows.__getitem__, made)) == sorted(names)
    onnx.checker.check_model(small, full_check=True)
    for tensor in reference.graph.initializer:
        if tensor.name in names:
            values = weights[tensor.name].weight().numpy()
            values = values + (made[tensor.name].product().numpy() if is_repaired else 0)
            is_rows = np.array_equal(numpy_helper.to_array(tensor).reshape(-1), rows[tensor.name].reshape(-1))
            values = (values if is_rows else values.T).reshape(tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    values = feeds(source)
    output, operators = run(small, values, tmp_path)
    assert np.allclose(output, run(reference, values), rtol=1e-5, atol=1e-6)
    assert not np.allclose(output, run(onnx.load(source), values), rtol=1e-5, atol=1e-6)
    usual = run(onnx.load(source), values, tmp_path)[1]
    assert not (operators - usual) & {
        "Cast",
        "Mul",
        "Div",
        "Mod",
        "Slice",
        "MatMul",
        "Add",
    }  # unpacked when the model is loaded
    kinds = {8: TensorProto.INT8, 5: TensorProto.UINT16, 4: TensorProto.INT4, 3: TensorProto.UINT16}
    assert [tensor.data_type for tensor in small.graph.initializer].count(kinds[bits]) >= len(names)


def test_a_weight_of_another_layout_stays(tmp_path):
    source, names = product_model(tmp_path / "m.onnx")
    model = onnx.load(source)
    weights = {name: rounded(out_first(source, name), bits=8) for name in names}
    before = model.SerializeToString(deterministic=True)
    assert store_float_weights_(model, weights, lambda name: out_first(source, name).numpy()[::-1]) == []
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("write", [conv_model, product_model])
def test_the_file_holds_half_a_byte_for_each_number(tmp_path, write):
    _, plain, small, weights = stored(tmp_path / "m.onnx", STATIC, None, tmp_path / "q.onnx", write)
    held = {t.name: len(t.raw_data) for t in small.graph.initializer}
    for name, found in weights.items():
        assert held[f"{name}_4bit"] == found.codes.numel() / 2
        assert f"{name}_quantized" not in held
    assert {f"{name}_quantized" for name in weights} <= {t.name for t in plain.graph.initializer}


def biases(model):
    """Name -> dequantized values and steps of the int32 biases."""
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        name.removesuffix("_quantized"): (codes * known[f"{name}_scale"].astype(np.float64), known[f"{name}_scale"])
        for name, codes in known.items()
        if codes.dtype == np.int32 and f"{name}_scale" in known and name.endswith("bias_quantized")
    }


def test_biases_keep_their_values_in_the_scale_of_the_new_weight(tmp_path):
    source, plain, small, weights = stored(tmp_path / "m.onnx", STATIC, None, tmp_path / "q.onnx", conv_model)
    before, after = biases(plain), biases(small)
    assert before.keys() == after.keys() == {"stem.bias", "twice.bias", "head.bias"}
    known = {t.name: numpy_helper.to_array(t) for t in plain.graph.initializer}
    for name, (values, step) in after.items():
        site = name.removesuffix(".bias")
        assert (np.abs(values - before[name][0]) <= 0.5001 * step).all()
        ratio = weights[f"{site}.weight"].scales.numpy() / known[f"{site}.weight_scale"]
        assert np.allclose(step, before[name][1] * ratio)
        assert (ratio > 2).any()  # the scales differ, so that codes which stay would be wrong
    float_bias = next(numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer if t.name == "stem.bias")
    assert np.allclose(after["stem.bias"][0], float_bias, atol=0.01)


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_row_that_is_almost_zero_keeps_the_others_in_four_bits(tmp_path, size):
    def shrink(weights):
        weights["stem.weight"][2] *= size
        weights["head.weight"][3] *= size

    def write(path):
        return conv_model(path, change=shrink)

    source, _, small, _ = stored(tmp_path / "m.onnx", STATIC, None, tmp_path / "q.onnx", write)
    values = feeds(source)
    dense = run(onnx.load(source), values)
    output = run(small, values)
    assert np.linalg.norm(output - dense) < 0.15 * np.linalg.norm(dense)
    float_bias = next(numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer if t.name == "head.bias")
    assert np.allclose(output[:, 3], float_bias[3], atol=0.05)


def test_weights_of_other_shapes_or_names_are_left_alone(tmp_path):
    source, _ = product_model(tmp_path / "m.onnx")
    quantize(source, tmp_path / "q.onnx", STATIC, lambda: iter([feeds(source)]))
    model = onnx.load(tmp_path / "q.onnx")
    before = model.SerializeToString(deterministic=True)
    wrong = rounded(torch.ones(7, 32))
    assert store_int8_weights_(model, {"grow.weight": wrong, "unknown": wrong}) == []
    assert model.SerializeToString(deterministic=True) == before


# -- embedding tables ------------------------------------------------------------------------------------------------


def table_model(path, *, rows=64, width=64, extra=None):
    """Write two Gathers of one table; `extra` is another node that reads it."""
    values = weight(np.random.default_rng(0), rows, width, gain=8)
    values[:, : width // 2] += 1  # no block is symmetric
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"], "embed"),
        helper.make_node("Gather", ["table", "ids"], ["b"], "again"),
        helper.make_node("Add", ["a", "b"], ["output"], "add"),
    ]
    outputs = {"output": (TensorProto.FLOAT, ["N", width])}
    if extra is not None:
        nodes.append(extra)
        outputs["more"] = (TensorProto.FLOAT, ["A", "B"])
    return saved(path, nodes, {"table": values}, {"ids": (TensorProto.INT64, ["N"])}, outputs, opset=OPSET)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 80, 16, 256])
def test_gathered_rows_are_those_of_the_rounded_table(tmp_path, bits, width):
    path = table_model(tmp_path / "m.onnx", width=width, rows=256)
    model = onnx.load(path)
    (table,) = tables(model)
    assert (table.name, table.rows, table.width) == ("table", 256, width)
    values = numpy_helper.to_array(model.graph.initializer[0])
    store_table_(model, table, values, bits)
    ids = np.array([0, 3, 255, 3, -1, -256])
    output = run(model, {"ids": ids})
    assert np.array_equal(output, 2 * table_values(values, bits)[ids])
    assert not np.array_equal(output, 2 * table_values(values, 12 - bits)[ids])
    held = sum(len(t.raw_data) for t in model.graph.initializer)
    assert held == stored_table_bytes(table, bits)
    assert [node.name for node in model.graph.node][-3:] == ["embed", "again", "add"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([16, 48, 64]), st.sampled_from([4, 8]), st.sampled_from([1e-3, 1, 1e3]))
def test_rounded_tables_are_within_a_step(seed, width, bits, size):
    rng = np.random.default_rng(seed)
    values = (size * (rng.standard_normal((5, width)) + rng.integers(-2, 3))).astype(np.float32)
    values[1] = 0
    codes, scales, zeros = table_codes(values, bits)
    assert codes.max() < 2**bits
    assert zeros.max() < 2**bits
    block = table_block(width, bits)
    assert width % block == 0
    found = table_values(values, bits)
    steps = scales.astype(np.float32).repeat(block, axis=1)
    assert (np.abs(found - values) <= 1.01 * steps + 1e-6).all()
    assert not found[1].any()  # zero stays zero


def branch_reader():
    """An If whose branch reads the table of the graph around it."""
    cast = helper.make_node("ReduceSum", ["table"], ["inner"], "sum", keepdims=0)
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [])
    branches = {f"{name}_branch": helper.make_graph([cast], name, [], [value]) for name in ("then", "else")}
    return helper.make_node("If", ["flag"], ["more"], "if", **branches)


@pytest.mark.parametrize(
    "extra",
    [
        helper.make_node("MatMul", ["table", "table"], ["more"], "tied"),
        helper.make_node("Gather", ["table", "ids"], ["more"], "columns", axis=1),
        helper.make_node("Identity", ["table"], ["more"], "itself"),
    ],
)
def test_a_table_that_something_else_reads_is_left_alone(tmp_path, extra):
    assert tables(onnx.load(table_model(tmp_path / "m.onnx", extra=extra))) == []


def test_a_table_that_a_branch_reads_is_left_alone(tmp_path):
    model = onnx.load(table_model(tmp_path / "m.onnx"))
    assert len(tables(model)) == 1
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    model.graph.node.append(branch_reader())
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, []))
    onnx.checker.check_model(model)
    assert tables(model) == []


def test_a_table_that_the_user_may_replace_is_left_alone(tmp_path):
    model = onnx.load(table_model(tmp_path / "m.onnx"))
    model.graph.input.append(helper.make_tensor_value_info("table", TensorProto.FLOAT, [64, 64]))
    assert tables(model) == []


@pytest.mark.parametrize(("rows", "width"), [(500, 24), (500, 30), (20, 16)])
def test_rows_that_no_block_divides_and_small_tables_stay(tmp_path, rows, width):
    assert tables(onnx.load(table_model(tmp_path / "m.onnx", rows=rows, width=width))) == []


def test_bytes_of_a_table():
    table = EmbeddingTable(name="t", rows=10, width=128)
    assert stored_table_bytes(table, 8) == 1280 + 10 * 2 + 10
    assert stored_table_bytes(table, 4) == 640 + 20 * 2 + 10
