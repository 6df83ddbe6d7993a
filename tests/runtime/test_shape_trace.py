import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import SIZES, mlp_onnx, run_onnx
from onnx import helper, numpy_helper

from rsi_deploy.core.errors import ModelError
from rsi_deploy.runtime.shape_trace import trace_run


def test_a_run_gives_the_outputs_and_counts_what_was_executed(tmp_path):
    path = mlp_onnx(tmp_path / "m.onnx")
    a, b, c, d = SIZES
    x = np.random.default_rng(0).standard_normal((5, a)).astype(np.float32)
    trace = trace_run(path, {"input": x})
    assert trace.macs == {"fc1": 5 * a * b, "fc2": 5 * b * c, "head": 5 * c * d}
    # unoptimized against optimized kernels: float32 rounding
    np.testing.assert_allclose(trace.outputs[0], run_onnx(path, x)[0], rtol=1e-5, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]  # no profile is left


def test_external_weights(tmp_path):
    path = mlp_onnx(tmp_path / "m.onnx")
    ir.save(ir.load(path), tmp_path / "e.onnx", external_data="e.data")
    x = {"input": np.ones((2, SIZES[0]), np.float32)}
    a, b = trace_run(path, x), trace_run(tmp_path / "e.onnx", x)
    assert a.macs == b.macs
    np.testing.assert_array_equal(a.outputs[0], b.outputs[0])


def test_a_node_in_a_loop_counts_every_time(tmp_path):
    """x @ w, three times."""
    square = numpy_helper.from_array(np.eye(4, dtype=np.float32) * 2, "w")
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("MatMul", ["v", "w"], ["next"], "product"), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [info("i", 7, []), info("go", 9, []), info("v", 1, ["n", 4])],
        [info("on", 9, []), info("next", 1, ["n", 4])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["times", "", "x"], ["y"], "loop", body=body)],
        "g",
        [info("x", 1, ["n", 4])],
        [info("y", 1, ["n", 4])],
        [square, numpy_helper.from_array(np.array(3), "times")],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    trace = trace_run(tmp_path / "m.onnx", {"x": np.ones((2, 4), np.float32)})
    assert trace.macs == {"product": 3 * 2 * 4 * 4}
    np.testing.assert_array_equal(trace.outputs[0], np.full((2, 4), 8, np.float32))


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    path = mlp_onnx(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"m\.onnx: the run failed"):
        trace_run(path, {"input": np.ones((2, SIZES[0] + 1), np.float32)})


def info(name, shape, kind=1):
    return helper.make_tensor_value_info(name, kind, shape)


def saved(path, nodes, initializers, functions=(), shape=(2, 4)):
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", shape)],
        [info("y", None)],
        [numpy_helper.from_array(a, n) for n, a in initializers.items()],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 17), ("my", 1), ("com.microsoft", 1))]
    onnx.save(helper.make_model(graph, ir_version=9, opset_imports=opsets, functions=list(functions)), path)
    return path


SQUARE = {"w": np.eye(4, dtype=np.float32)}
ONES = {"x": np.ones((2, 4), np.float32)}


def test_nodes_of_functions_count_under_their_own_names(tmp_path):
    """F calls nothing, G calls F: onnxruntime inlines both and renames their nodes."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="F_product")
    f = helper.make_function("my", "F", ["x", "w"], ["y"], [product], opsets)
    inner = [helper.make_node("F", ["x", "w"], ["h"], domain="my", name="call")]
    inner += [helper.make_node("Einsum", ["h", "w"], ["y"], equation="ij,jk->ik", name="sum")]
    g = helper.make_function("my", "G", ["x", "w"], ["y"], inner, opsets)
    nodes = [
        helper.make_node("G", ["x", "w"], ["a"], domain="my", name="first"),
        helper.make_node("F", ["a", "w"], ["b"], domain="my", name="second"),
        helper.make_node("F", ["b", "w"], ["y"], domain="my", name="third"),
    ]
    trace = trace_run(saved(tmp_path / "m.onnx", nodes, SQUARE, [f, g]), ONES)
    assert trace.macs == {"F_product": 3 * 2 * 4 * 4, "sum": 2 * 4 * 4}
    assert trace.uncounted == ()


def test_nodes_without_a_name_count_with_their_attributes(tmp_path):
    nodes = [
        helper.make_node("Einsum", ["x", "w"], ["h"], equation="ij,jk->ik"),
        helper.make_node("FusedMatMul", ["h", "h"], ["y"], domain="com.microsoft", transA=1),
    ]
    trace = trace_run(saved(tmp_path / "m.onnx", nodes, SQUARE), ONES)
    assert sorted(trace.macs.values()) == [2 * 4 * 4, 2 * 4 * 4]
    assert trace.uncounted == ()


def test_absent_inputs_are_not_taken_for_others(tmp_path):
    """A past of three tokens stands behind an absent mask; the profile lists shapes without gaps."""
    past = np.zeros((2, 1, 2, 3, 2), np.float32)
    initializers = {"w": np.ones((4, 12), np.float32), "b": np.ones(12, np.float32), "past": past}
    node = helper.make_node(
        "Attention", ["x", "w", "b", "", "past"], ["y", "present"], "attend", domain="com.microsoft", num_heads=2
    )
    x = {"x": np.ones((1, 5, 4), np.float32)}
    trace = trace_run(saved(tmp_path / "m.onnx", [node], initializers, shape=(1, 5, 4)), x)
    scores = 5 * (3 + 5) * (4 + 4)
    assert trace.macs == {"attend": 5 * 4 * 12 + scores}
    assert trace.attention_macs == {"attend": scores}
