"""onnxruntime's quantizers: what they cannot do is said with their words and a remedy."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from calibrated_nets import branch_net, conv_net, saved, text_net, weight
from int8_products import needs_exact_int8
from onnx import TensorProto, helper

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.precision.quantizers import BATCHES, quantize
from rsi_deploy.precision.schemes import DYNAMIC, FLOAT16, WEIGHTS4, static

IMAGES = {"input": np.random.default_rng(3).standard_normal((8, 3, 8, 8)).astype(np.float32)}
TEXTS = {"ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}


def run(path, values):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, values)[0]


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@needs_exact_int8
@pytest.mark.parametrize(
    ("scheme", "operator", "error"),
    [
        (static("minmax"), "QuantizeLinear", 0.05),
        (static("percentile"), "QuantizeLinear", 0.1),
        (static("entropy"), "QuantizeLinear", 0.2),
        (DYNAMIC, "MatMulInteger", 0.05),
        (FLOAT16, "Cast", 0.005),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_images_in_every_scheme(tmp_path, scheme, operator, error):
    source = conv_net(tmp_path / "m.onnx")
    quantize(source, tmp_path / "q.onnx", scheme, lambda: iter([IMAGES]))
    assert operator in operators(tmp_path / "q.onnx")
    assert 0 < relative(run(tmp_path / "q.onnx", IMAGES), run(source, IMAGES)) < error
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "q.onnx"}  # no leftovers


@pytest.mark.parametrize(("scheme", "operator"), [(WEIGHTS4, "MatMulNBits"), (DYNAMIC, "MatMulInteger")])
def test_texts_in_every_scheme(tmp_path, scheme, operator):
    source = text_net(tmp_path / "m.onnx")
    quantize(source, tmp_path / "q.onnx", scheme)
    assert operator in operators(tmp_path / "q.onnx")
    assert 0 < relative(run(tmp_path / "q.onnx", TEXTS), run(source, TEXTS)) < 0.3


def test_static_ranges_need_data(tmp_path):
    source = conv_net(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"static int8 \(minmax\).*--calib"):
        quantize(source, tmp_path / "q.onnx", static("minmax"))
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("ranges", BATCHES)
def test_ranges_are_found_on_few_batches(tmp_path, ranges):
    taken = []

    def batches():
        for number in range(100):
            taken.append(number)
            yield IMAGES

    quantize(conv_net(tmp_path / "m.onnx"), tmp_path / "q.onnx", static(ranges), batches)
    assert len(taken) == BATCHES[ranges]


@needs_exact_int8
def test_ranges_come_from_the_data(tmp_path):
    source, errors = conv_net(tmp_path / "m.onnx"), []
    for gain in (1.0, 0.1):
        few = {"input": gain * IMAGES["input"]}
        quantize(source, tmp_path / "q.onnx", static("minmax"), lambda few=few: iter([few]))
        errors.append(relative(run(tmp_path / "q.onnx", IMAGES), run(source, IMAGES)))
    assert errors[0] < 0.05 < errors[1]  # ranges of smaller inputs clip


def old_model(path, opset):
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], "conv", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["a"], ["b"], "mean"),
        helper.make_node("Squeeze", ["b"], ["output"], "squeeze", axes=[2, 3]),
    ]
    infos = {"input": (TensorProto.FLOAT, ["N", 3, 8, 8])}, {"output": (TensorProto.FLOAT, ["N", 16])}
    return saved(path, nodes, {"w": weight(rng, 16, 3, 3, 3)}, *infos, opset=opset)


@needs_exact_int8
def test_an_old_opset_is_converted(tmp_path):
    source = old_model(tmp_path / "m.onnx", 12)
    quantize(source, tmp_path / "q.onnx", static("minmax"), lambda: iter([IMAGES]))
    made = onnx.load(tmp_path / "q.onnx")
    assert next(entry.version for entry in made.opset_import if entry.domain == "") >= 13
    scales = {t.name: tuple(t.dims) for t in made.graph.initializer}
    assert scales["w_scale"] == (16,)  # one for each channel
    assert relative(run(tmp_path / "q.onnx", IMAGES), run(source, IMAGES)) < 0.05


@needs_exact_int8
@pytest.mark.parametrize("make", [conv_net, lambda path: old_model(path, 8)], ids=["a new opset", "an old opset"])
@pytest.mark.parametrize("scheme", [static("minmax"), DYNAMIC], ids=lambda scheme: scheme.kind)
def test_a_model_whose_initializers_had_to_be_inputs_stays_valid(tmp_path, make, scheme):
    model = onnx.load(make(tmp_path / "m.onnx"))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx")
    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", scheme, lambda: iter([IMAGES]))
    onnx.checker.check_model(tmp_path / "q.onnx")
    assert [value.name for value in onnx.load(tmp_path / "q.onnx").graph.input] == ["input"]
    assert relative(run(tmp_path / "q.onnx", IMAGES), run(tmp_path / "m.onnx", IMAGES)) < 0.05


def test_an_old_opset_that_onnx_cannot_convert(tmp_path, monkeypatch):
    source = old_model(tmp_path / "m.onnx", 12)

    def fail(*arguments):
        raise RuntimeError("Unsupported operator: Strange")

    monkeypatch.setattr(onnx.version_converter, "convert_version", fail)
    with pytest.raises(ModelError, match=r"m.onnx has opset 12.*Unsupported operator: Strange.*--precision float32"):
        quantize(source, tmp_path / "q.onnx", static("minmax"), lambda: iter([IMAGES]))


def attention_model(path):
    """Write q, k, v, the Attention operator of ai.onnx, and an output product."""
    rng = np.random.default_rng(0)
    weights = {name: weight(rng, 32, 32).T.copy() for name in ("q", "k", "v", "o")}
    nodes = [helper.make_node("MatMul", ["input", name], [f"{name}.y"], name) for name in ("q", "k", "v")]
    nodes += [
        helper.make_node("Attention", ["q.y", "k.y", "v.y"], ["mixed"], "attention", q_num_heads=4, kv_num_heads=4),
        helper.make_node("MatMul", ["mixed", "o"], ["output"], "o"),
    ]
    infos = {"input": (TensorProto.FLOAT, ["N", 6, 32])}, {"output": (TensorProto.FLOAT, ["N", 6, 32])}
    return saved(path, nodes, weights, *infos, opset=23)


@pytest.mark.parametrize("scheme", [DYNAMIC, static("minmax"), WEIGHTS4], ids=lambda scheme: scheme.name)
def test_the_attention_operator_is_not_taken_for_onnxruntimes_own(tmp_path, scheme):
    source = attention_model(tmp_path / "m.onnx")
    values = {"input": np.random.default_rng(3).standard_normal((2, 6, 32)).astype(np.float32)}
    quantize(source, tmp_path / "q.onnx", scheme, lambda: iter([values]))
    made = operators(tmp_path / "q.onnx")
    assert made.count("Attention") == 1
    assert "QAttention" not in made
    assert relative(run(tmp_path / "q.onnx", values), run(source, values)) < 0.2


def test_nodes_that_stay_in_float(tmp_path):
    source = conv_net(tmp_path / "m.onnx")
    for scheme in (static("minmax"), DYNAMIC):
        quantize(source, tmp_path / "q.onnx", scheme, lambda: iter([IMAGES]), ["conv2", "head"])
        floats = {t.name for t in onnx.load(tmp_path / "q.onnx").graph.initializer if t.data_type == TensorProto.FLOAT}
        assert {"conv2.weight", "head.weight"} <= floats
        assert ("conv1.weight" in floats) == (scheme is DYNAMIC)


def test_what_onnxruntime_refuses_is_named_in_its_words(tmp_path):
    source = conv_net(tmp_path / "m.onnx")
    wrong = {"other": IMAGES["input"]}
    with pytest.raises(ModelError, match=r"onnxruntime cannot make static int8 \(minmax\) of m\.onnx: .*input"):
        quantize(source, tmp_path / "q.onnx", static("minmax"), lambda: iter([wrong]))


def test_a_model_that_onnxruntime_breaks_is_refused(tmp_path):
    source = branch_net(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"onnxruntime cannot make dynamic int8 of m\.onnx"):
        quantize(source, tmp_path / "q.onnx", DYNAMIC)
    assert not (tmp_path / "q.onnx").exists()


def test_tools_say_nothing_on_the_terminal(tmp_path, capfd):
    """Not even of a model whose weights are also inputs, which onnxruntime warns about, once for each."""
    model = onnx.load(conv_net(tmp_path / "m.onnx"))
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, source := tmp_path / "old.onnx")
    for scheme in (static("percentile"), DYNAMIC):
        quantize(source, tmp_path / "q.onnx", scheme, lambda: iter([IMAGES]))
    assert capfd.readouterr() == ("", "")
    ort.InferenceSession(source)
    assert "appears in graph inputs" in capfd.readouterr().err, "onnxruntime's own default holds again"


@pytest.mark.parametrize("ranges", ["percentile", "entropy"])
def test_a_last_batch_of_another_size_is_left_out_of_histograms(tmp_path, ranges):
    batches = [{"input": array} for array in (IMAGES["input"], IMAGES["input"][:3])]
    quantize(conv_net(tmp_path / "m.onnx"), tmp_path / "q.onnx", static(ranges), lambda: iter(batches))
    assert (tmp_path / "q.onnx").is_file()
