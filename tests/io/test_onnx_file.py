import random

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_passes import count_parameters
from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.onnx_file import model_hash, move_model, read_onnx, weight_bytes, weights_hash, write_external


def proto(*nodes, initializers=(), output="y"):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", 8])
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def weight(name="w", seed=0):
    return numpy_helper.from_array(np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32), name)


def matmul(a="x", b="w", y="y", name="fc"):
    return helper.make_node("MatMul", [a, b], [y], name=name)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(proto(matmul(), initializers=[weight()]), path)
    return path


@pytest.fixture
def external(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.onnx"
    onnx.save(
        proto(matmul(), initializers=[weight()]), path, save_as_external_data=True, location="m.data", size_threshold=0
    )
    return path


def relocated(path, **entries):
    """The model with other words about where its data lie."""
    model = onnx.load_model(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    kept = {entry.key: entry.value for entry in tensor.external_data} | {k: str(v) for k, v in entries.items()}
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_good_file_is_read(good, external):
    for path in (good, external):
        model = read_onnx(path)
        assert (count_parameters(model), weight_bytes(model)) == (64, 256)
    assert weights_hash(read_onnx(good)) == weights_hash(read_onnx(external))


def test_the_hash_sees_a_changed_value_and_a_changed_name(good, tmp_path):
    onnx.save(proto(matmul(), initializers=[weight(seed=1)]), tmp_path / "value.onnx")
    onnx.save(proto(matmul(b="v"), initializers=[weight("v")]), tmp_path / "name.onnx")
    assert len({weights_hash(read_onnx(p)) for p in (good, tmp_path / "value.onnx", tmp_path / "name.onnx")}) == 3


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\x08" * 64, random.Random(0).randbytes(999), b'{"ir_version": 8}']
)
def test_files_that_are_not_onnx(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx is not an ONNX file"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file(good, share):
    content = good.read_bytes()
    good.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"m\.onnx"):
        read_onnx(good)


def test_external_data_missing(external):
    (external.parent / "m.data").unlink()
    with pytest.raises(ModelError, match="tensor 'w': its data file 'm.data' is missing"):
        read_onnx(external)


def test_external_data_too_short(external):
    data = external.parent / "m.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match="'m.data' is too short: it has 255 of 256 bytes"):
        read_onnx(external)


@pytest.mark.parametrize("location", ["../m.data", "/etc/hostname", "a/../../m.data", "..\\m.data", ""])
def test_external_data_outside_the_folder(external, location):
    (external.parent.parent / "m.data").write_bytes(b"\0" * 256)
    with pytest.raises(ModelError, match="outside the model's folder"):
        read_onnx(relocated(external, location=location))


@pytest.mark.parametrize("inside", [True, False])
def test_external_data_behind_a_link(external, inside):
    data, real = external.parent / "m.data", (external.parent if inside else external.parent.parent) / "real"
    data.rename(real)
    data.symlink_to(real)
    with pytest.raises(ModelError, match="which is refused"):
        read_onnx(external)


def test_external_data_of_another_length(external):
    with pytest.raises(ModelError, match=r"dims \[8, 8\] \(256 bytes\), but refers to 128 bytes"):
        read_onnx(relocated(external, length=128))
    with pytest.raises(ModelError, match="is not a number"):
        read_onnx(relocated(external, length="many"))


def test_dims_that_do_not_match_the_data(tmp_path):
    wrong = weight()
    wrong.dims[0] = 1 << 40
    onnx.save(proto(matmul(), initializers=[wrong]), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"tensor 'w' has dims \[1099511627776, 8\]"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([matmul(a="nowhere")], "node MatMul 'fc' uses 'nowhere': nothing defines it"),
        ([matmul(a="b", y="a", name="1"), matmul(a="a", y="b", name="2"), matmul()], "a cycle, or nodes out of order"),
        ([matmul(), matmul(name="again")], "'y' is defined twice, the second time by node MatMul 'again'"),
        ([matmul(y="z")], "the graph's output 'y' is not produced by any node"),
    ],
)
def test_names_that_cannot_be(tmp_path, nodes, message):
    onnx.save(proto(*nodes, initializers=[weight()]), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=message):
        read_onnx(tmp_path / "m.onnx")


def test_a_subgraph_sees_the_scopes_around_it(tmp_path):
    branch = helper.make_graph([matmul(y="z")], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    yes = numpy_helper.from_array(np.array(True), "yes")
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    onnx.save(proto(node, initializers=[weight(), yes]), tmp_path / "m.onnx")
    assert count_parameters(read_onnx(tmp_path / "m.onnx")) == 64


def test_a_model_s_hash_is_of_all_its_files(tmp_path):
    """One that looked at the weights alone would take an unfinished sweep of another graph for its own."""

    def written(name, operator):
        node = helper.make_node(operator, ["x", "w"], ["y"])
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in ("x", "y"))
        weight = numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w")
        model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weight]))
        (tmp_path / name).mkdir()
        path = tmp_path / name / "m.onnx"
        onnx.save_model(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
        return path

    first, same, other = written("a", "MatMul"), written("b", "MatMul"), written("c", "Add")
    assert (first.parent / "m.data").read_bytes() == (other.parent / "m.data").read_bytes()
    assert model_hash(first) == model_hash(same) != model_hash(other)
    (same.parent / "m.data").write_bytes(b"\1" + (same.parent / "m.data").read_bytes()[1:])
    assert model_hash(first) != model_hash(same)


def test_every_node_has_a_name_of_its_own(tmp_path):
    """Without a name, with one twice, with an output that another node is called after, in a body and a function."""
    info = helper.make_tensor_value_info
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["b"], "twice")], "b", [], [info("b", 1, [4])])
    function = helper.make_function(
        "my", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 17)]
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "twice"),
        helper.make_node("Relu", ["a"], ["named"]),
        helper.make_node("Relu", ["named"], ["c"], "named"),
        helper.make_node("If", ["go"], ["d"], then_branch=body, else_branch=body),
        helper.make_node("F", ["d"], ["y"], domain="my"),
    ]
    graph = helper.make_graph(nodes, "g", [info("x", 1, [4]), info("go", 9, [])], [info("y", 1, [4])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9), tmp_path / "m.onnx")
    model = read_onnx(tmp_path / "m.onnx")
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    names = [node.name for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)]
    assert sorted(names) == sorted(set(names))
    assert {"twice", "named", "named_1", "d", "y", "y_1"} <= set(names), "names that were its own stay"


def test_a_moved_model_finds_its_data(good, tmp_path):
    numbers = numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 999)).astype(np.float32), "w")
    onnx.save(proto(matmul(), initializers=[numbers]), good)
    write_external(read_onnx(good), tmp_path / "p.onnx")
    before = weights_hash(read_onnx(tmp_path / "p.onnx"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "renamed.onnx").write_bytes((tmp_path / "p.onnx").read_bytes())
    (tmp_path / "out" / "renamed.onnx.data").write_bytes((tmp_path / "p.onnx.data").read_bytes())
    with pytest.raises(ModelError):  # files that are only renamed name data that are gone
        weights_hash(read_onnx(tmp_path / "out" / "renamed.onnx"))
    move_model(tmp_path / "p.onnx", tmp_path / "out" / "model.onnx")
    assert weights_hash(read_onnx(tmp_path / "out" / "model.onnx")) == before
    assert not list(tmp_path.glob("p.onnx*"))
    move_model(good, tmp_path / "out" / "single.onnx")
    assert weights_hash(read_onnx(tmp_path / "out" / "single.onnx")) == before
