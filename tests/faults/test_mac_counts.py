"""MACs in reports and budgets: every operator counts, in every turn of a loop."""

import json

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from rsi_deploy.cli import run
from rsi_deploy.runtime.shape_trace import trace_run

MS = "com.microsoft"
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
RNG = np.random.default_rng(0)


def weights(*shape):
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def value(name, shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def node(op, inputs, outputs, domain="", **attributes):
    return helper.make_node(op, inputs, outputs, domain=domain, **attributes)


def save(path, nodes, inputs, outputs, initializers, functions=(), opset=17):
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in initializers.items()]
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1), helper.make_opsetid("my", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=list(functions)), path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(model, *argv, code=0):
    """Run `export`, check its exit code and return the report, or None."""
    assert run(["export", model, *argv, "--no-bench", "-o", "b", "--force"]) == code
    return None if code else json.loads(open("b/report.json").read())


def counts(report):
    return report["dense"]["macs"], report["compressed"]["macs"]


HEAD = 64 * 96
SPLIT_HEAD = 16 * (64 + 96)


def head(data="k"):
    """Return a node MatMul 64x96 with the weight `m`, which will be split."""
    return node("MatMul", [data, "m"], ["y"])


def with_head(path, nodes, initializers, functions=(), shape=(1, 64)):
    return save(
        path,
        [*nodes, head()],
        [value("x", shape)],
        [value("y", None)],
        {"m": weights(64, 96), **initializers},
        functions,
    )


# -- fused operators


def test_fused_matmul(here):
    model = save(
        "m.onnx",
        [node("FusedMatMul", ["x", "w"], ["y"], MS)],
        [value("x", [4, 128])],
        [value("y", [4, 96])],
        {"w": weights(128, 96)},
    )
    assert counts(export(model, "--rank", "25%")) == (128 * 96, 24 * (128 + 96))


def test_fused_attention_counts_its_projections(here):
    model = save(
        "m.onnx",
        [node("Attention", ["x", "w", "b"], ["y"], MS, num_heads=4)],
        [value("x", [2, 16, 64])],
        [value("y", [2, 16, 64])],
        {"w": weights(64, 192), "b": weights(192)},
    )
    report = export(model, "--rank", "25%")
    scores = 2 * 16 * 16 * 64
    dense, compressed = 16 * 64 * 192 + scores, 16 * 64 * 16 + 16 * 16 * 192 + scores
    assert counts(report) == (dense, compressed)
    (site,) = report["sites"]
    assert (site["macs_dense"], site["macs_compressed"]) == (dense, compressed)


def cnn(path):
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "w2", "b2"], ["c"], pads=[1] * 4),
        node("Relu", ["c"], ["cr"]),
        node("GlobalAveragePool", ["cr"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w3"], ["y"]),
    ]
    initializers = {"w1": weights(32, 8, 3, 3), "b1": weights(32), "w2": weights(64, 32, 3, 3), "b2": weights(64)}
    return save(
        path,
        nodes,
        [value("x", ["n", 8, 16, 16])],
        [value("y", ["n", 10])],
        {**initializers, "w3": weights(64, 10)},
    )


def fused(model, path):
    """Write the model with onnxruntime's offline optimizer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = path
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert [n.op_type for n in onnx.load(path).graph.node][:2] == ["FusedConv", "FusedConv"]
    return path


def test_a_budget_of_macs_is_the_same_for_a_fused_graph(here):
    plain = cnn("plain.onnx")
    np.savez("c.npz", x=RNG.standard_normal((48, 8, 16, 16)).astype(np.float32))
    for model in (plain, fused(plain, "fused.onnx")):
        dense, compressed = counts(export(model, "--calib", "c.npz", "--keep-macs", "0.5"))
        assert dense == 256 * (32 * 8 * 9 + 64 * 32 * 9) + 640
        assert dense // 4 < compressed <= dense // 2


# -- operators that no pass splits


def recurrent(op, gates, **attributes):
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    nodes = [
        node(op, ["x", "W", "R"], ["", "h"], hidden_size=64 // directions, **attributes),
        node("Reshape", ["h", "s"], ["k"]),
    ]
    hidden = 64 // directions
    initializers = {
        "W": weights(directions, gates * hidden, 24),
        "R": weights(directions, gates * hidden, hidden),
        "s": np.array([1, 64]),
    }
    return nodes, initializers, 5 * directions * gates * hidden * (24 + hidden), [5, 1, 24]


def quantized(op):
    wide = {"w": np.ones((64, 64), np.int8), "s": np.float32(0.1), "z": np.int8(0)}
    if op == "MatMulInteger":
        nodes = [
            node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]),
            node("MatMulInteger", ["q", "w", "qz"], ["i"]),
            node("Cast", ["i"], ["k"], to=1),
        ]
    elif op == "DequantizeLinear":
        nodes = [node("DequantizeLinear", ["w", "s"], ["d"]), node("MatMul", ["x", "d"], ["k"])]
    elif op == "QLinearMatMul":
        quantize = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["i", "s", "z"], ["k"])]
        product = node("QLinearMatMul", ["q", "s", "z", "w", "s", "z", "s", "z"], ["i"])
        nodes = [quantize[0], product, quantize[1]]
    else:
        nodes = [node("MatMulNBits", ["x", "w", "s"], ["k"], MS, K=64, N=64, bits=4, block_size=32)]
        wide = {"w": np.ones((64, 2, 16), np.uint8), "s": weights(128)}
    return nodes, wide, 64 * 64, [1, 64]


def einsum(equation, *shapes):
    names = [f"w{place}" for place in range(len(shapes))]
    made = {name: weights(*shape) for name, shape in zip(names, shapes, strict=True)}
    return [node("Einsum", ["x", *names], ["k"], equation=equation)], made


BESIDE = {
    "LSTM": recurrent("LSTM", 4),
    "GRU both ways": recurrent("GRU", 3, direction="bidirectional"),
    "RNN backwards": recurrent("RNN", 1, direction="reverse"),
    "Einsum": (*einsum("ij,jk->ik", (64, 64)), 64 * 64, [1, 64]),
    "Einsum of three": (*einsum("ij,jk,kl->il", (64, 32), (32, 64)), 2 * 32 * 64, [1, 64]),
    "MatMulInteger": quantized("MatMulInteger"),
    "DequantizeLinear": quantized("DequantizeLinear"),
    "QLinearMatMul": quantized("QLinearMatMul"),
    "MatMulNBits": quantized("MatMulNBits"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_operators_that_no_pass_splits_are_counted(here, name):
    """The count is for a run; reports divide it by the batch."""
    nodes, initializers, expected, shape = BESIDE[name]
    model = with_head("m.onnx", nodes, initializers, shape=shape)
    trace = trace_run(here / model, {"x": np.ones(shape, np.float32)})
    assert sum(trace.macs.values()) == expected + HEAD
    assert trace.uncounted == ()


def test_a_budget_below_the_macs_of_an_lstm_is_refused(here, capsys):
    _, initializers, expected, _ = recurrent("LSTM", 4)
    save(
        "m.onnx",
        [
            node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
            node("LSTM", ["xt", "W", "R"], ["", "h"], hidden_size=64),
            node("Squeeze", ["h", "a"], ["k"]),
            head(),
        ],
        [value("x", ["n", 5, 24])],
        [value("y", ["n", 96])],
        {**initializers, "m": weights(64, 96), "a": np.array([0])},
    )
    np.savez("c.npz", x=RNG.standard_normal((64, 5, 24)).astype(np.float32))
    export("m.onnx", "--calib", "c.npz", "--keep-macs", "0.9", code=3)
    assert f"of {expected + HEAD:,} MACs" in capsys.readouterr().err
    dense, compressed = counts(export("m.onnx", "--calib", "c.npz", "--keep-macs", "0.98"))
    assert dense == expected + HEAD
    assert compressed <= 0.98 * dense


# -- graphs inside graphs


def loop(turns):
    """Return a Loop that runs a fused Conv with an outer weight `turns` times."""
    body = helper.make_graph(
        [
            node("FusedConv", ["v", "w"], ["next"], MS, pads=[1] * 4, activation="Relu"),
            node("Identity", ["go"], ["on"]),
        ],
        "body",
        [value("i", [], INT64), value("go", [], BOOL), value("v", ["n", 8, 6, 6])],
        [value("on", [], BOOL), value("next", ["n", 8, 6, 6])],
    )
    return save(
        "loop.onnx",
        [node("Loop", ["turns", "", "x"], ["h"], body=body), node("Flatten", ["h"], ["k"]), head()],
        [value("x", ["n", 8, 6, 6])],
        [value("y", ["n", 96])],
        {"w": weights(8, 8, 3, 3), "turns": np.array(turns), "m": weights(288, 96)},
    )


def test_a_loop_counts_its_body_once_a_turn(here):
    turns = 5
    report = export(loop(turns), "--rank", "25%")
    rank = 2
    assert counts(report)[0] == turns * 36 * 8 * 72 + 288 * 96
    (conv,) = [site for site in report["sites"] if site["name"] == "w"]
    assert (conv["macs_dense"], conv["macs_compressed"]) == (turns * 36 * 8 * 72, turns * 36 * rank * (8 + 72))


def test_a_scan_counts_every_step(here):
    body = helper.make_graph(
        [node("Einsum", ["v", "w"], ["o"], equation="i,ij->j")], "b", [value("v", [64])], [value("o", [64])]
    )
    save(
        "m.onnx",
        [node("Scan", ["x"], ["k"], body=body, num_scan_inputs=1), head()],
        [value("x", [7, 64])],
        [value("y", [7, 96])],
        {"w": weights(64, 64), "m": weights(64, 96)},
    )
    trace = trace_run(here / "m.onnx", {"x": np.ones((7, 64), np.float32)})
    assert sorted(trace.macs.values()) == [7 * 64 * 64, 7 * HEAD]


def test_a_sequence_map_counts_every_entry(here):
    body = helper.make_graph(
        [node("Einsum", ["v", "w"], ["o"], equation="hi,ij->hj")], "b", [value("v", [1, 64])], [value("o", [1, 64])]
    )
    nodes = [
        node("SequenceConstruct", ["x", "x", "x"], ["s"]),
        node("SequenceMap", ["s"], ["t"], body=body),
        node("ConcatFromSequence", ["t"], ["k"], axis=0),
    ]
    with_head("m.onnx", nodes, {"w": weights(64, 64)})
    trace = trace_run(here / "m.onnx", {"x": np.ones((1, 64), np.float32)})
    assert sorted(trace.macs.values()) == [3 * 64 * 64, 3 * HEAD]


@pytest.mark.parametrize("sign", [1, -1])
def test_an_if_counts_the_branch_that_ran(here, sign):
    """Both branches use the same node name with different equations."""

    def branch(output, equation):
        made = node("Einsum", ["x", "w"], [output], equation=equation)
        made.name = "product"
        return helper.make_graph([made], output, [], [value(output, ["n", 64])])

    nodes = [
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["c"]),
        node("If", ["c"], ["k"], then_branch=branch("a", "ij,jk->ik"), else_branch=branch("b", "ij,kl->il")),
    ]
    with_head("m.onnx", nodes, {"w": weights(64, 64), "zero": np.float32(0)})
    np.savez("f.npz", x=np.full((1, 64), sign, np.float32))
    dense, _ = counts(export("m.onnx", "--rank", "25%", "--feeds", "f.npz"))
    assert dense == HEAD + (64 * 64 if sign > 0 else 64 * 64 * 64)


def function(equations):
    """Return a function with an Einsum whose equation is an attribute, and a call for each equation."""
    inner = node("Einsum", ["x", "w"], ["y"])
    inner.attribute.add(name="equation", ref_attr_name="equation", type=AttributeProto.STRING)
    made = helper.make_function("my", "F", ["x", "w"], ["y"], [inner], [helper.make_opsetid("", 17)], ["equation"])
    values = ["x", *(f"v{place}" for place in range(len(equations) - 1)), "k"]
    nodes = [
        node("F", [values[place], "w"], [values[place + 1]], "my", equation=equation)
        for place, equation in enumerate(equations)
    ]
    return with_head("m.onnx", nodes, {"w": weights(64, 64)}, [made], shape=["n", 64])


def test_a_function_counts_at_every_call(here):
    report = export(function(["ij,jk->ik", "ij,kj->ik"]), "--rank", "25%")
    assert counts(report) == (2 * 64 * 64 + HEAD, 2 * 64 * 64 + SPLIT_HEAD)
    assert not [note for note in report["notes"] if "MACs" in note]


# -- operators that cannot be counted


def test_without_a_budget_uncounted_operators_are_a_note(here):
    report = export(function(["ij,jk->ik", "ij,kl->il"]), "--rank", "25%")
    assert counts(report) == (HEAD, SPLIT_HEAD)
    (note,) = [note for note in report["notes"] if "MACs" in note]
    assert "Einsum" in note


def refused(capsys, *argv):
    export(*argv, code=3)
    message = capsys.readouterr().err
    assert "--keep-params" in message
    assert "--max-size" in message
    return message


def test_a_refused_budget_of_macs_names_the_node(here, capsys):
    model = function(["ij,jk->ik", "ij,kl->il"])
    np.savez("c.npz", x=RNG.standard_normal((64, 64)).astype(np.float32))
    message = refused(capsys, model, "--calib", "c.npz", "--keep-macs", "0.5")
    assert "Einsum" in message
    assert "node '" in message
    export(model, "--calib", "c.npz", "--keep-params", "0.7")


def test_a_custom_operator_is_named(here, capsys):
    save(
        "m.onnx",
        [node("Mix", ["x", "w"], ["k"], "my"), head()],
        [value("x", ["n", 64])],
        [value("y", ["n", 96])],
        {"w": weights(64, 64), "m": weights(64, 96)},
    )
    np.savez("c.npz", x=RNG.standard_normal((64, 64)).astype(np.float32))
    assert "'k' (my.Mix" in refused(capsys, "m.onnx", "--calib", "c.npz", "--keep-macs", "0.5")
    assert any("my.Mix" in note for note in export("m.onnx", "--rank", "25%")["notes"])


def test_a_model_without_products_has_no_budget_of_macs(here, capsys):
    save(
        "m.onnx",
        [node("Gather", ["t", "x"], ["g"]), node("ReduceSum", ["g"], ["y"], keepdims=0)],
        [value("x", ["n"], INT64)],
        [value("y", None)],
        {"t": weights(64, 32)},
    )
    np.savez("c.npz", x=np.zeros(8, np.int64))
    assert "--keep-params" in refused(capsys, "m.onnx", "--calib", "c.npz", "--keep-macs", "0.5")


def test_a_sweep_over_macs_is_refused(here, capsys):
    model = function(["ij,jk->ik", "ij,kl->il"])
    np.savez("c.npz", x=RNG.standard_normal((64, 64)).astype(np.float32))
    argv = ["sweep", model, "--calib", "c.npz", "--points", "2", "--no-bench"]
    assert run([*argv, "-o", "s"]) == 3
    assert "--by params" in capsys.readouterr().err
    assert run([*argv, "-o", "p", "--by", "params"]) == 0
