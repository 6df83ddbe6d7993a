"""Every operator in torch against onnxruntime, with the settings that differ from torch's own."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from graph_passes import PASSES
from rsi_deploy.calibration.output_sensitivity import NoSensitivityError
from rsi_deploy.onnx_models.calibration.fused_operators import FUSED
from rsi_deploy.onnx_models.calibration.operators import _CONTRACTIONS, _OPERATORS, operator

X, Y, IMAGE = "float[2, 3, 4] x", "float[2, 3, 4] y", "float[2, 3, 7, 7] x"
ROWS = "float[2, 3, 8] x, float[2, 3, 8] y, float[2, 3, 8] z"
GROUPED = "float[2, 5, 64] x, float[2, 5, 32] k, float[2, 5, 32] v"
GQA, APART = "com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2", ">(x, k, v"
PAST = "float[1, 2, 3, 16] p, float[1, 2, 3, 16] r"
OUTPUTS = {"Split": 2, "com.microsoft.GroupQueryAttention": 3}
TOTAL = "int32[2] l = {{{0}, {0}}}, int32 t = {{{1}}}"

CASES = {
    "Add": (f"{X}, float[4] y", "Add(x, y)"),
    "Attention": ("float[2, 2, 3, 4] x, float[2, 2, 3, 4] y", "Attention<scale = 0.3>(x, y, x)"),
    "Attention causal": ("float[2, 2, 3, 4] x, float[2, 2, 3, 4] y", "Attention<is_causal = 1>(x, y, x)"),
    "AveragePool": (IMAGE, "AveragePool<kernel_shape = [3, 2], strides = [2, 1]>(x)"),
    "Cast": (X, "Cast<to = 7>(x)"),
    "Clip": (f"{X}, float y", "Clip(x, , y)"),
    "Clip on both sides": (f"{X}, float y = {{-0.3}}, float z = {{0.4}}", "Clip(x, y, z)"),
    "Concat": (f"{X}, {Y}", "Concat<axis = -2>(x, y)"),
    "Conv": (
        "float[2, 4, 7, 8] x, float[6, 2, 3, 2] y, float[6] z",
        "Conv<group = 2, pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2]>(x, y, z)",
    ),
    "Div": (f"{X}, {Y}", "Div(x, y)"),
    "Einsum": ("float[2, 3, 4] x, float[4, 5, 6] y", 'Einsum<equation = "bsd, dhk -> bhsk">(x, y)'),
    "Elu": (X, "Elu<alpha = 0.5>(x)"),
    "Erf": (X, "Erf(x)"),
    "Exp": (X, "Exp(x)"),
    "Expand": ("float[3, 1] x, int64[3] shape = {2, 1, 4}", "Expand(x, shape)"),
    "Flatten": ("float[2, 3, 4, 5] x", "Flatten<axis = 2>(x)"),
    "Gather": (f"{X}, int64[2, 2] at = {{1, -1, 0, 2}}", "Gather<axis = 1>(x, at)"),
    "Gather scalar": (f"{X}, int64 at = {{-1}}", "Gather<axis = 1>(x, at)"),
    "Gelu": (X, 'Gelu<approximate = "tanh">(x)'),
    "Gemm": (
        "float[4, 2] x, float[3, 4] y, float[3] z",
        "Gemm<transA = 1, transB = 1, alpha = 0.5, beta = 2.0>(x, y, z)",
    ),
    "GlobalAveragePool": (IMAGE, "GlobalAveragePool(x)"),
    "HardSigmoid": (X, "HardSigmoid<alpha = 0.3>(x)"),
    "HardSwish": (X, "HardSwish(x)"),
    "Identity": (X, "Identity(x)"),
    "LayerNormalization": (
        f"{X}, float[3, 4] y, float[3, 4] z",
        "LayerNormalization<axis = 1, epsilon = 0.1>(x, y, z)",
    ),
    "LeakyRelu": (X, "LeakyRelu<alpha = 0.3>(x)"),
    "LogSoftmax": (X, "LogSoftmax<axis = 1>(x)"),
    "MatMul": (f"{X}, float[4, 5] y", "MatMul(x, y)"),
    "MaxPool": (IMAGE, "MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x)"),
    "Mul": (f"{X}, {Y}", "Mul(x, y)"),
    "Neg": (X, "Neg(x)"),
    "Pad": (f"{X}, int64[6] pads = {{0, 1, 2, 0, 3, -1}}", "Pad(x, pads)"),
    "Pow": (f"{X}, float y = {{2}}", "Pow(x, y)"),
    "Reciprocal": (X, "Reciprocal(x)"),
    "ReduceL2": (f"{X}, int64[1] axes = {{-1}}", "ReduceL2(x, axes)"),
    "ReduceMean": (f"{X}, int64[2] axes = {{0, 2}}", "ReduceMean<keepdims = 0>(x, axes)"),
    "ReduceSum": (X, "ReduceSum(x)"),
    "Relu": (X, "Relu(x)"),
    "Reshape": (f"{X}, int64[3] shape = {{0, 2, -1}}", "Reshape(x, shape)"),
    "Shape": (X, "Shape<start = 1>(x)"),
    "Sigmoid": (X, "Sigmoid(x)"),
    "Slice": (
        f"{X}, int64[2] a = {{1, -3}}, int64[2] b = {{9, -1}}, int64[2] axes = {{-2, 2}}, int64[2] by = {{1, 2}}",
        "Slice(x, a, b, axes, by)",
    ),
    "Softmax": (X, "Softmax<axis = 1>(x)"),
    "Split": (f"{X}, int64[2] sizes = {{3, 1}}", "Split<axis = -1>(x, sizes)"),
    "Split evenly": ("float[2, 5] x", "Split<axis = 1, num_outputs = 2>(x)"),
    "Sqrt": (X, "Sqrt(x)"),
    "Squeeze": ("float[1, 3, 1] x, int64[1] axes = {-1}", "Squeeze(x, axes)"),
    "Sub": (f"{X}, {Y}", "Sub(x, y)"),
    "Tanh": (X, "Tanh(x)"),
    "Transpose": (X, "Transpose<perm = [2, 0, 1]>(x)"),
    "Unsqueeze": (f"{X}, int64[2] axes = {{-1, 0}}", "Unsqueeze(x, axes)"),
    "RMSNormalization": (f"{X}, float[3, 4] y", "RMSNormalization<axis = 1, epsilon = 0.1>(x, y)"),
    "SimplifiedLayerNormalization": (f"{X}, float[4] y", "SimplifiedLayerNormalization<epsilon = 0.1>(x, y)"),
    "com.microsoft.BiasGelu": (f"{X}, float[4] y", "com.microsoft.BiasGelu(x, y)"),
    "com.microsoft.FastGelu": (f"{X}, float[4] y", "com.microsoft.FastGelu(x, y)"),
    "com.microsoft.Gelu": (X, "com.microsoft.Gelu(x)"),
    "com.microsoft.GroupQueryAttention": (f"{GROUPED}, {TOTAL.format(4, 5)}", f"{GQA}{APART}, , , l, t)"),
    "com.microsoft.GroupQueryAttention with a past": (
        f"float[1, 5, 128] x, {PAST}, float[9, 8] c, float[9, 8] s, int32[1] l = {{7}}, int32 t = {{8}}",
        f"{GQA}, do_rotary = 1>(x, , , p, r, l, t, c, s)",
    ),
    "com.microsoft.GroupQueryAttention that forgets": (
        f"{GROUPED}, float[9, 8] c, float[9, 8] s, {TOTAL.format(4, 5)}",
        f"{GQA}, do_rotary = 1, rotary_interleaved = 1, local_window_size = 2{APART}, , , l, t, c, s)",
    ),
    "com.microsoft.MultiHeadAttention": (
        f"{ROWS}, float[24] b, int32[2, 3] m = {{1, 1, 0, 1, 1, 1}}, float[1, 2, 3, 3] a",
        "com.microsoft.MultiHeadAttention<num_heads = 2>(x, y, z, b, m, a)",
    ),
    "com.microsoft.MultiHeadAttention causal": (
        ROWS,
        "com.microsoft.MultiHeadAttention<num_heads = 2, scale = 0.2, unidirectional = 1>(x, y, z)",
    ),
    "com.microsoft.QuickGelu": (X, "com.microsoft.QuickGelu<alpha = 0.7>(x)"),
    "com.microsoft.RotaryEmbedding": (
        "float[2, 3, 16] x, int64[2, 3] at = {0, 1, 2, 4, 5, 6}, float[9, 4] c, float[9, 4] s",
        "com.microsoft.RotaryEmbedding(x, at, c, s)",
    ),
    "com.microsoft.RotaryEmbedding of a part": (
        "float[2, 2, 3, 12] x, int64[1] at = {4}, float[9, 4] c, float[9, 4] s",
        "com.microsoft.RotaryEmbedding<num_heads = 2, rotary_embedding_dim = 8, interleaved = 1>(x, at, c, s)",
    ),
    "com.microsoft.SkipLayerNormalization": (
        f"{X}, {Y}, float[4] g, float[4] b, float[4] c",
        "com.microsoft.SkipLayerNormalization(x, y, g, b, c)",
    ),
    "com.microsoft.SkipSimplifiedLayerNormalization": (
        f"{X}, {Y}, float[4] g",
        "com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, y, g)",
    ),
    "Where": (f"bool[2, 3, 4] held, {X}, float[4] y", "Where(held, x, y)"),
}


def model_of(given, call, outputs=1):
    """A model of one node; what stands with a value is a constant."""
    inputs = [part for part in split(given) if "=" not in part]
    constants = [part for part in split(given) if "=" in part]
    names = ["out", "more", "last"][:outputs]
    types = ", ".join(f"float {name}" for name in names)
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> g ({", ".join(inputs)}) => ({types})
        <{", ".join(constants)}> {{ {", ".join(names)} = {call} }}"""
    model = onnx.parser.parse_model(text)
    for value in model.graph.output:
        value.ClearField("type")
    return onnx.shape_inference.infer_shapes(model)


def split(text):
    """The declarations in a list."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def feeds_of(model, seed=0):
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = np.asarray(rng.standard_normal(shape), np.float32)
        if value.type.tensor_type.elem_type == onnx.TensorProto.BOOL:
            array = array > 0
        feeds[value.name] = np.abs(array) + 0.1 if model.graph.node[0].op_type == "Sqrt" else array
    return feeds


def ours(model, feeds):
    (node,) = model.graph.node
    values = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    values |= {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    return operator(node)(*(values[name] if name else None for name in node.input))


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_onnxruntime_does(name):
    given, call = CASES[name]
    model = model_of(given, call, OUTPUTS.get(name.split(" ")[0], 1))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = feeds_of(model)
    for expected, found in zip(session.run(None, feeds), ours(model, feeds), strict=False):
        torch.testing.assert_close(found, torch.from_numpy(np.array(expected)).to(found.dtype), rtol=1e-4, atol=1e-5)
        if found.is_floating_point():
            with pytest.raises(AssertionError):
                torch.testing.assert_close(found * 1.01, torch.from_numpy(np.array(expected)), rtol=1e-4, atol=1e-5)


def test_every_operator_has_a_case():
    products = {each.op_type for each in PASSES if each.contraction is not None}
    fused = {".".join(filter(None, operator)) for operator in FUSED}
    assert {name.split()[0] for name in CASES} == _OPERATORS.keys() | products | fused
    assert {each.contraction for each in PASSES} - {None} == _CONTRACTIONS.keys()


def test_whole_numbers_are_divided_as_onnx_does():
    node = onnx.helper.make_node("Div", ["a", "b"], ["c"])
    assert operator(node)(torch.tensor([7, -7]), torch.tensor([2, 2]))[0].tolist() == [3, -3]


@pytest.mark.parametrize(
    ("node", "given"),
    [
        (onnx.helper.make_node("Selu", ["a"], ["b"], "n"), None),
        (onnx.helper.make_node("Relu", ["a"], ["b"], domain="com.microsoft"), None),
        (onnx.helper.make_node("MaxPool", ["a"], ["b", "at"], kernel_shape=[2, 2]), torch.zeros(1, 1, 4, 4)),
        (onnx.helper.make_node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], ceil_mode=1), torch.zeros(1, 1, 4, 4)),
        (onnx.helper.make_node("Cast", ["a"], ["b"], to=onnx.TensorProto.INT8), torch.zeros(3)),
    ],
    ids=["unknown", "domain", "second output", "setting", "type"],
)
def test_what_is_not_known_is_refused(node, given):
    with pytest.raises(NoSensitivityError, match="gradients do not pass"):
        operator(node)(given)
