import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, parser

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.feeds.user_feeds import check_feeds


def spec(name, shape, dtype="float32"):
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


def identities(*inputs):
    """A model that passes every input (name, element type, shape) through."""
    values = [helper.make_tensor_value_info(*each) for each in inputs]
    outputs = [helper.make_tensor_value_info(f"{name}_out", kind, shape) for name, kind, shape in inputs]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in inputs]
    graph = helper.make_graph(nodes, "g", values, outputs)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


MIXED = identities(
    ("x", TensorProto.FLOAT16, ["N", 3, None]),
    ("ids", TensorProto.INT64, [None, "seq"]),
    ("flag", TensorProto.BOOL, []),
    ("wide", TensorProto.DOUBLE, [2, 2]),
)


def test_session_proto_and_file_tell_the_same(tmp_path):
    onnx.save(MIXED, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    specs = model_inputs(session)
    assert specs == model_inputs(MIXED) == model_inputs(tmp_path / "m.onnx") == model_inputs(str(tmp_path / "m.onnx"))
    assert specs == [
        spec("x", ("N", 3, None), "float16"),
        spec("ids", (None, "seq"), "int64"),
        spec("flag", (), "bool"),
        spec("wide", (2, 2), "float64"),
    ]


def test_sixteen_bit_brain_floats():
    (only,) = model_inputs(identities(("x", TensorProto.BFLOAT16, [1])))
    assert only.dtype == ml_dtypes.bfloat16
    assert random_feeds([only], 1, 0)["x"].dtype == ml_dtypes.bfloat16


def test_initializers_that_are_inputs_too_are_not_fed():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,2] x, float[2] w) => (float[N,2] y) '
        "<float[2] w = {1, 2}> { y = Mul(x, w) }"
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [each.name for each in model_inputs(model)] == [each.name for each in model_inputs(session)] == ["x"]


def test_inputs_that_cannot_be_fed_are_named(tmp_path):
    words = helper.make_tensor_sequence_value_info("words", TensorProto.FLOAT, None)
    last = helper.make_node("ConcatFromSequence", ["words"], ["y"], axis=0)
    graph = helper.make_graph([last], "g", [words], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(ModelError, match="words is a sequence"):
        model_inputs(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(ModelError, match=r"m.onnx: input words is seq\(tensor\(float\)\)"):
        model_inputs(session, "m.onnx")
    (tmp_path / "bad.onnx").write_text("hello")
    for name in ("bad.onnx", "absent.onnx"):
        with pytest.raises(ModelError, match=name):
            model_inputs(tmp_path / name)


def test_feeds_fit_the_model_and_run():
    feeds = random_feeds(model_inputs(MIXED), 5, 0, {"x": (5, 3, 7), "ids": (5, 9)})
    assert {name: array.shape for name, array in feeds.items()} == {
        "x": (5, 3, 7),
        "ids": (5, 9),
        "flag": (),
        "wide": (2, 2),
    }
    session = onnxruntime.InferenceSession(MIXED.SerializeToString(), providers=["CPUExecutionProvider"])
    for result, fed in zip(session.run(None, feeds), feeds.values(), strict=True):
        np.testing.assert_array_equal(result, fed)


def test_values():
    specs = [spec("x", ("N", 2000)), spec("ids", ("N", 99), "int64"), spec("attention_mask", ("N", 9), "int64")]
    feeds = random_feeds(specs, 4, 0)
    assert abs(feeds["x"].mean()) < 0.1
    assert abs(feeds["x"].std() - 1) < 0.1
    assert set(np.unique(feeds["ids"])) == {0, 1}
    assert set(np.unique(feeds["attention_mask"])) == {1}
    assert set(np.unique(random_feeds([spec("b", ("N", 99), "bool")], 1, 0)["b"])) == {False, True}


def test_each_input_has_a_generator_of_its_own():
    x, y = spec("x", ("N", 4)), spec("y", ("N", 4))
    first = random_feeds([x, y], 2, 7)
    np.testing.assert_array_equal(random_feeds([y, x], 2, 7)["x"], first["x"])
    np.testing.assert_array_equal(random_feeds([x], 2, 7)["x"], first["x"])
    assert not np.array_equal(first["x"], first["y"])
    assert not np.array_equal(random_feeds([x], 2, 8)["x"], first["x"])


def test_a_symbol_that_is_known_once_is_known_everywhere():
    specs = [spec("ids", ("N", "seq"), "int64"), spec("mask", ("N", "seq"), "int64"), spec("state", (2, "N", 8))]
    feeds = random_feeds(specs, 3, 0, {"ids": (3, 16)})
    assert feeds["mask"].shape == (3, 16)
    assert feeds["state"].shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("shape", "batch", "given", "named"),
    [
        (("N", 3, "h"), 2, None, r"axis 2 open.*--input-shape x=2x3x\d+.*h"),
        (("N", 3, "h"), 2, {"z": (2, 3, 4)}, "no input named z; the model has x"),
        (("N", 3, "h"), 2, {"x": (2, 3)}, r"3 sizes.*\(2, 3\)"),
        (("N", 3, "h"), 2, {"x": (2, 3, -1)}, r"\(2, 3, -1\)"),
        (("N", 3, "h"), 2, {"x": (0, 3, 4)}, r"batch at axis 0, which must be 1 or more, but got \(0, 3, 4\)"),
        (("N", 3, "h"), 2, {"x": (2, 4, 5)}, "3 fixed at axis 1"),
        (("N", 3, "h"), 2, {"x": (8, 3, 5)}, "pass --batch 8"),
        (("N", 3), 0, None, "batch must be 1 or more, but got 0"),
        ((2, "N", 8), 1, None, r"--input-shape x=2x\d+x8"),
        ((1, 3), 8, None, "batch is fixed.*take a batch of 1"),
    ],
)
def test_shapes_that_do_not_fit_say_what_to_type(shape, batch, given, named):
    with pytest.raises(UsageError, match=named):
        random_feeds([spec("x", shape)], batch, 0, given)


def test_one_symbol_cannot_have_two_sizes():
    specs = [spec("a", ("N", "seq")), spec("b", ("N", "seq"))]
    with pytest.raises(UsageError, match="seq of b"):
        random_feeds(specs, 1, 0, {"a": (1, 4), "b": (1, 5)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"z": np.zeros((1, 3), np.float32)},
        {"x": np.zeros((1, 3), np.float32), "z": np.zeros(1)},
        {"x": np.zeros((1, 4), np.float32)},
        {"x": np.zeros((1, 3, 1), np.float32)},
        {"x": np.zeros((1, 3), np.float64)},
    ],
)
def test_feeds_that_do_not_fit_are_refused(wrong):
    specs = [spec("x", ("N", 3))]
    check_feeds(specs, {"x": np.zeros((9, 3), np.float32)}, "m.onnx")
    with pytest.raises(UsageError, match=r"m\.onnx takes x: float32 \(N, 3\)"):
        check_feeds(specs, wrong, "m.onnx")
