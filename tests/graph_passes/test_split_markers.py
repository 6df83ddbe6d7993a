import numpy as np
import onnx_ir as ir
import pytest
from calibrated_nets import conv_net, saved, weight
from onnx import TensorProto, helper

import graph_passes as gp
from graph_passes.split_markers import found_splits


def split(path, form_and_rank, *, joint=False):
    """Split every site with these factors, save, and read it back."""
    model = ir.load(path)

    def source(site):
        form, rank = form_and_rank(site)
        rows, columns = site.shape(form)
        left, right = np.ones((site.groups, rows, rank)), np.ones((site.groups, rank, columns))
        return gp.SplitFactors(left=left.astype(site.dtype), right=right.astype(site.dtype), form=form)

    records = [r for r in gp.split(model, source, joint=joint) if isinstance(r, gp.Split)]
    ir.save(model, path)
    return records, found_splits(ir.load(path))


def check(records, found):
    assert found.keys() == {record.node for record in records}
    for record in records:
        split = found[record.node]
        assert split.form == record.form
        assert split.rank(record.groups, columns(record)) == record.rank
        assert split.rank(record.groups, 2 * columns(record)) != record.rank
        assert split.rank(record.groups + 1, columns(record)) != record.rank


def columns(record):
    """Columns of the weight in its usual form, as reports have them; a record has those of its own form."""
    points = {"input": 9, "separable": 3}.get(record.form, 1) if record.op_type == "Conv" else 1
    return record.in_features * points


@pytest.mark.parametrize("form", ["channel", "input", "separable"])
@pytest.mark.parametrize("rank", [1, 3])
def test_convs(tmp_path, form, rank):
    path = conv_net(tmp_path / "m.onnx")
    records, found = split(path, lambda site: (form if site.window else "gemm", rank))
    assert {found[name].form for name in ("conv1", "conv2", "grouped")} == {form}
    check(records, found)


def one_by_one(path, *, op="Conv", kernel=(1, 1), group=1):
    rng = np.random.default_rng(0)
    into, out = 8, 12
    shape = (out, into // group, *kernel) if op == "Conv" else (into, out // group, *kernel)
    node = helper.make_node(op, ["x", "w"], ["y"], "conv", group=group)
    return saved(
        path,
        [node],
        {"w": weight(rng, *shape)},
        {"x": (TensorProto.FLOAT, [1, into, 9, 9])},
        {"y": (TensorProto.FLOAT, [1, 12, "H", "W"])},
    )


def test_a_kernel_of_one_is_of_the_channel_form(tmp_path):
    records, found = split(one_by_one(tmp_path / "m.onnx"), lambda site: ("channel", 2))
    assert found["conv"].form == "channel"
    check(records, found)


@pytest.mark.parametrize("group", [1, 2])
def test_transposed_convs(tmp_path, group):
    path = one_by_one(tmp_path / "m.onnx", op="ConvTranspose", kernel=(3, 3), group=group)
    records, found = split(path, lambda site: ("input", 2))
    assert found["conv"].form == "input"
    check(records, found)


def products(path, ops):
    """Products of one input, by (name, operator, out, attributes)."""
    rng = np.random.default_rng(0)
    nodes, weights = [], {}
    for name, op, out, more in ops:
        weights[f"{name}.w"] = weight(rng, out, 8) if more.get("transB") else weight(rng, out, 8).T.copy()
        nodes.append(helper.make_node(op, ["x", f"{name}.w"], [f"{name}.y"], name, **more))
    ends = {f"{name}.y": (TensorProto.FLOAT, ["N", out]) for name, _, out, _ in ops}
    return saved(path, nodes, weights, {"x": (TensorProto.FLOAT, ["N", 8])}, ends)


def test_products(tmp_path):
    path = products(
        tmp_path / "m.onnx", [("a", "MatMul", 6, {}), ("b", "Gemm", 7, {"transB": 1}), ("c", "Gemm", 9, {})]
    )
    records, found = split(path, lambda site: ("first", 3))
    assert {name: split.form for name, split in found.items()} == {"a": "matmul", "b": "gemm", "c": "gemm"}
    check(records, found)


def test_a_joint_split_has_one_first_node(tmp_path):
    path = products(tmp_path / "m.onnx", [(name, "MatMul", 8, {}) for name in "qkv"])
    records, found = split(path, lambda site: ("matmul", 3), joint=True)
    assert len({split.first for split in found.values()}) == 1
    check(records, found)


def test_a_dense_graph_has_none(tmp_path):
    assert found_splits(ir.load(conv_net(tmp_path / "m.onnx"))) == {}
