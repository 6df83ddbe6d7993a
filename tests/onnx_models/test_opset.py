"""Another opset for an ONNX file: the same function of the inputs, the same weights and names, or a reason."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import initializers, mlp_onnx, run_onnx
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import export, verify
from rsi_deploy.cli import run
from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.io.onnx_file import read_onnx, weights_hash, write_external
from rsi_deploy.onnx_models.opset import STUB_NUMBERS, check_conversion, convert_opset

RNG = np.random.default_rng(0)
LOSES_AXES = pytest.mark.skipif(
    tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 22),
    reason="onnx's converter before 1.22 loses axes on the way to opset 17; the exporter gate refuses what it makes",
)


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def saved(path, nodes, weights, *, opset, shape=(2, 3, 4, 4), out=None, ir_version=10, **model):
    """A model from `x` of `shape` to `y`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, out)
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    opsets = [helper.make_opsetid("", opset), *model.pop("others", ())]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, **model), path)
    return path


def converted(source, opset, target="converted.onnx"):
    path = source.with_name(target)
    write_external(convert_opset(read_onnx(source), opset, source.name), path)
    return path


def squeezes(path, opset=11):
    """Axes as attributes, which are inputs from opset 13 on, in the graph and in both branches of an If."""

    def branch(op_type):
        y = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("Unsqueeze", ["h"], ["a"], f"{op_type}/up", axes=[0]),
            helper.make_node(op_type, ["a"], ["r"], f"{op_type}/branch"),
            helper.make_node("Squeeze", ["r"], ["b"], f"{op_type}/down", axes=[0]),
        ]
        return helper.make_graph(nodes, op_type, [], [y])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "fc"),
        helper.make_node("If", ["yes"], ["i"], "if", then_branch=branch("Relu"), else_branch=branch("Abs")),
        helper.make_node("ReduceSum", ["i"], ["y"], "sum", axes=[1], keepdims=0),
    ]
    return saved(path, nodes, {"w": numbers(40, 40), "yes": True}, opset=opset, shape=(2, 3, 40), ir_version=6)


@pytest.mark.parametrize("opset", [12, 13, 18, 21, 23])
def test_the_function_weights_and_names_stay(tmp_path, opset):
    source = squeezes(tmp_path / "m.onnx")
    path = converted(source, opset)
    onnx.checker.check_model(path, full_check=True)
    x = numbers(2, 3, 40)
    np.testing.assert_array_equal(run_onnx(path, {"x": x})[0], run_onnx(source, {"x": x})[0])
    before, after = read_onnx(source), read_onnx(path)
    assert after.opset_imports == {"": opset}
    assert after.ir_version == max(6, onnx.helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))
    np.testing.assert_array_equal(initializers(path)["w"], initializers(source)["w"])
    assert {node.name for node in before.graph.all_nodes()} <= {node.name for node in after.graph.all_nodes()}
    assert [value.name for value in after.graph.inputs] == ["x"]


def test_there_and_back(tmp_path):
    source = mlp_onnx(tmp_path / "m.onnx")
    path = converted(converted(source, 23), 17, "back.onnx")
    assert read_onnx(path).opset_imports == {"": 17}
    assert weights_hash(read_onnx(path)) == weights_hash(read_onnx(source))
    assert onnx.load(path).graph.node == onnx.load(source).graph.node


def test_what_the_converter_drops_is_carried_over(tmp_path):
    name = helper.make_function("ours", "F", ["a"], ["b"], [helper.make_node("Erf", ["a"], ["b"], "erf")], [])
    name.opset_import.add(domain="", version=17)
    nodes = [
        helper.make_node("F", ["x"], ["f"], "call", domain="ours"),
        helper.make_node("FusedMatMul", ["f", "w"], ["h"], "fused", domain="com.microsoft", alpha=2.0),
        helper.make_node("ReduceMean", ["h"], ["y"], "mean", axes=[1], keepdims=0),
    ]
    nodes[1].doc_string = "why"
    others = [helper.make_opsetid("ours", 1), helper.make_opsetid("com.microsoft", 1)]
    source = saved(
        tmp_path / "m.onnx", nodes, {"w": numbers(4, 4)}, opset=17, functions=[name], others=others, producer_name="p"
    )
    model = read_onnx(source)
    model.metadata_props["of"] = "the model"
    model.graph.metadata_props["of"] = "the graph"
    model.graph.inputs[0].metadata_props["of"] = "an input"
    model.graph.node(1).metadata_props["rsi_deploy.split"] = "left"
    ir.save(model, source)
    made = convert_opset(read_onnx(source), 20, "m.onnx")
    write_external(made, path := tmp_path / "n.onnx")
    again = read_onnx(path)
    assert again.opset_imports == {"": 20, "ours": 1, "com.microsoft": 1}
    assert [node.op_type for f in again.functions.values() for node in f] == ["Erf"]
    assert [f.opset_imports for f in again.functions.values()] == [{"": 20}]
    assert again.producer_name == "p"
    assert again.metadata_props["of"] == "the model"
    assert again.graph.metadata_props["of"] == "the graph"
    assert again.graph.inputs[0].metadata_props["of"] == "an input"
    fused = next(node for node in again.graph if node.op_type == "FusedMatMul")
    assert (fused.metadata_props, fused.doc_string) == ({"rsi_deploy.split": "left"}, "why")
    x = numbers(2, 3, 4, 4)
    np.testing.assert_array_equal(run_onnx(path, {"x": x})[0], run_onnx(source, {"x": x})[0])


def test_a_function_that_must_change_goes_into_the_graph(tmp_path):
    body = [helper.make_node("ReduceMean", ["a"], ["m"], "mean", axes=[1], keepdims=1)]
    body.append(helper.make_node("Sub", ["a", "m"], ["b"], "sub"))
    function = helper.make_function("ours", "Centre", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("Centre", ["x"], ["y"], "call", domain="ours")]
    others = [helper.make_opsetid("ours", 1)]
    source = saved(tmp_path / "m.onnx", nodes, {}, opset=17, functions=[function], others=others)
    path = converted(source, 18)
    assert not read_onnx(path).functions
    x = numbers(2, 3, 4, 4)
    np.testing.assert_array_equal(run_onnx(path, {"x": x})[0], run_onnx(source, {"x": x})[0])


@LOSES_AXES
def test_weights_are_not_read(tmp_path):
    (tmp_path / "in").mkdir()
    side = int(STUB_NUMBERS**0.5) + 1
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ReduceMean", ["h", "axes"], ["y"])]
    weights = {"w": numbers(side, side), "axes": np.array([0])}
    source = saved(tmp_path / "in" / "m.onnx", nodes, weights, opset=18, shape=(1, side))
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="m.data", size_threshold=0)
    made = convert_opset(read_onnx(source), 17, "m.onnx")  # `axes`, which lie in the data file too, become an attribute
    assert [node.attributes["axes"].as_ints() for node in made.graph if node.op_type == "ReduceMean"] == [(0,)]
    assert isinstance(made.graph.initializers["w"].const_value, ir.ExternalTensor)
    write_external(made, path := tmp_path / "n.onnx")
    np.testing.assert_array_equal(initializers(path)["w"], initializers(source)["w"])


def test_nodes_that_the_converter_adds_get_names_of_their_own(tmp_path):
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]  # three nodes from opset 13 on, all without a name
    source = saved(tmp_path / "m.onnx", nodes, {}, opset=12, ir_version=7)
    path = converted(source, 13)
    names = [node.name for node in onnx.load(path).graph.node]
    assert len(names) > 1
    assert len(set(names)) == len(names)
    assert all(names)
    assert check_conversion(source, path, (12, 13), {"x": numbers(2, 3, 4, 4)}).relative_l2 < 1e-6


def test_initializers_that_had_to_be_inputs_are_constants_later(tmp_path):
    source = saved(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": numbers(4, 4)}, opset=8)
    proto = onnx.load(source)
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    onnx.save(proto, source)
    for opset, inputs in ((7, ["x", "w"]), (13, ["x"])):
        assert [value.name for value in convert_opset(read_onnx(source), opset, "m.onnx").graph.inputs] == inputs


@LOSES_AXES
def test_a_default_that_the_new_opset_does_not_know_is_dropped(tmp_path):
    def mean(noop):
        nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=1, noop_with_empty_axes=noop)]
        return saved(tmp_path / f"{noop}.onnx", nodes, {"axes": np.array([1])}, opset=18)

    x = {"x": numbers(2, 3, 4, 4)}
    path = converted(source := mean(0), 17)
    assert check_conversion(source, path, (18, 17), x).relative_l2 == 0
    path = converted(source := mean(1), 17)  # not the default: it says something
    with pytest.raises(ModelError, match="noop_with_empty_axes"):
        check_conversion(source, path, (18, 17), x)


# -- what cannot be done, or is done wrong


def test_what_cannot_be_converted_says_why(tmp_path):
    nodes = [helper.make_node("LayerNormalization", ["x", "s"], ["y"], "norm")]
    source = saved(tmp_path / "m.onnx", nodes, {"s": numbers(4)}, opset=17)
    with pytest.raises(ModelError) as caught:
        export(str(source), tmp_path / "b", rank=2, opset=13, measure=False)
    assert str(caught.value) == (
        "m.onnx cannot be converted from opset 17 to 13: No Previous Version of LayerNormalization exists; "
        "leave out --opset to keep the file's, or give another"
    )
    assert run(["export", str(source), "--rank", "2", "-o", str(tmp_path / "b"), "--opset", "13"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("opset", [0, -1, 999])
def test_no_such_opset(tmp_path, opset):
    source = mlp_onnx(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=rf"--opset must be between 1 and \d+ for an ONNX file, but got {opset}"):
        export(str(source), tmp_path / "b", rank=2, opset=opset, measure=False)


def test_a_conversion_that_gives_other_outputs_is_refused(tmp_path):
    """Resize had no coordinate_transformation_mode in opset 10; the converter lets the default of 11 say another."""
    nodes = [
        helper.make_node("Resize", ["x", "scales"], ["r"], mode="linear"),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    weights = {"scales": np.float32([1, 1, 2, 2]), "w": numbers(8, 8)}
    source = saved(tmp_path / "m.onnx", nodes, weights, opset=10, ir_version=5)
    with pytest.raises(
        GateError, match=r"^exporter gate \(m\.onnx converted from opset 10 to 11, .*above the tolerance"
    ):
        export(str(source), tmp_path / "b", rank=2, opset=11, measure=False)
    assert not (tmp_path / "b").exists()


def test_a_conversion_that_cannot_run_is_refused(tmp_path):
    """From opset 21 on GroupNormalization has a scale for every channel, not for every group."""
    nodes = [helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)]
    weights = {"s": numbers(2), "b": numbers(2)}
    source = saved(tmp_path / "m.onnx", nodes, weights, opset=20, shape=(1, 4, 6, 6))
    with pytest.raises(ModelError, match=r"^m\.onnx converted from opset 20 to 21: .*Mul.*; leave out --opset"):
        check_conversion(source, converted(source, 21), (20, 21), {"x": numbers(1, 4, 6, 6)})


def test_a_conversion_that_is_no_valid_onnx_is_refused(tmp_path):
    value = helper.make_tensor("shape", TensorProto.INT64, [2], [2, 48])
    nodes = [
        helper.make_node("Constant", [], ["shape"], value=value),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    source = saved(tmp_path / "m.onnx", nodes, {}, opset=9, out=(2, 48), ir_version=4)
    with pytest.raises(ModelError, match="converted from opset 9 to 8 is not valid: .*int64"):
        check_conversion(source, converted(source, 8), (9, 8), {"x": numbers(2, 3, 4, 4)})


def test_a_doctored_conversion_is_refused(tmp_path):
    source = mlp_onnx(tmp_path / "m.onnx")
    feeds = {"input": numbers(2, 12)}
    model = convert_opset(read_onnx(source), 17, "m.onnx")
    write_external(model, path := tmp_path / "n.onnx")
    good = check_conversion(source, path, (20, 17), feeds)
    assert good.relative_l2 <= good.tolerance == 1e-4
    bias = model.graph.initializers["head.bias"]
    bias.const_value = ir.tensor(bias.const_value.numpy() * 1.01, name="head.bias")
    write_external(model, path)
    with pytest.raises(GateError, match="^exporter gate"):
        check_conversion(source, path, (20, 17), feeds)


def test_a_file_that_cannot_run_is_compared_with_nothing(tmp_path):
    nodes = [helper.make_node("Nobody", ["x"], ["y"], domain="elsewhere")]
    source = saved(tmp_path / "m.onnx", nodes, {}, opset=17, others=[helper.make_opsetid("elsewhere", 1)])
    assert check_conversion(source, converted(source, 18), (17, 18), {"x": numbers(2, 3, 4, 4)}) is None


# -- the whole way


@pytest.mark.parametrize("opset", [17, 23])
def test_export_in_another_opset(tmp_path, opset):
    source = mlp_onnx(tmp_path / "m.onnx")
    report = export(str(source), tmp_path / "b", rank=4, opset=opset, keep_dense=True, measure=False)
    for name in ("model.onnx", "dense.onnx"):
        assert onnx.load(tmp_path / "b" / name, load_external_data=False).opset_import[0].version == opset
    assert report.settings.opset == opset
    assert report.verification.exporter.relative_l2 <= 1e-6  # the same operators in the same order
    assert verify(tmp_path / "b").ok
    x = {"input": numbers(3, 12)}
    kept = export(str(source), tmp_path / "kept", rank=4, measure=False)
    assert kept.verification.exporter is None
    np.testing.assert_array_equal(
        run_onnx(tmp_path / "b" / "model.onnx", x)[0], run_onnx(tmp_path / "kept" / "model.onnx", x)[0]
    )


def test_the_file_itself_is_not_touched(tmp_path):
    source = Path(squeezes(tmp_path / "m.onnx"))
    content = source.read_bytes()
    export(str(source), tmp_path / "b", rank=4, opset=18, measure=False)
    assert source.read_bytes() == content
