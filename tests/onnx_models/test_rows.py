"""Gathered rows: held against onnxruntime's own Conv, and against the data themselves."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import graph_passes as gp
from rsi_deploy.onnx_models.calibration.rows import Taps, chosen, output_size, patch_index

PADS = {
    1: [{}, {"pads": [2, 1]}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID"}],
    2: [{}, {"pads": [0, 2, 1, 3]}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}],
    3: [{}, {"pads": [1, 0, 2, 0, 1, 0]}, {"auto_pad": "SAME_LOWER"}],
}
KERNELS = {1: (4,), 2: (3, 2), 3: (2, 1, 3)}
SIZES = {1: (11,), 2: (7, 9), 3: (5, 6, 7)}
STEPS = [(1, 1), (2, 1), (3, 2), (1, 2)]  # stride, dilation
CASES = [
    (axes, pads, stride, dilation, groups)
    for axes in PADS
    for pads, (stride, dilation), groups in itertools.product(PADS[axes], STEPS, (1, 2))
    if not ("SAME" in pads.get("auto_pad", "") and dilation > 1)  # onnxruntime does not run that
]


def case_name(case):
    axes, pads, stride, dilation, groups = case
    return f"{axes}d-{pads.get('auto_pad', pads.get('pads', 'none'))}-s{stride}-d{dilation}-g{groups}".replace(" ", "")


def conv_model(axes, pads, stride, dilation, groups):
    """A Conv; its channels are 4, its outputs 6."""
    kernel = KERNELS[axes]
    weight = np.random.default_rng(1).standard_normal((6, 4 // groups, *kernel)).astype(np.float32)
    code = TensorProto.FLOAT
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], "conv", group=groups, strides=[stride] * axes, dilations=[dilation] * axes, **pads
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", code, None)],
        [helper.make_tensor_value_info("y", code, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def run(model, taps, feeds):
    """The model's output and the taps'."""
    for name, code in taps.inputs.items():
        model.graph.input.append(helper.make_tensor_value_info(name, code, None))
    model.graph.node.extend(taps.nodes)
    model.graph.initializer.extend(taps.constants)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps.outputs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("case", CASES, ids=map(case_name, CASES))
def test_patches_times_the_weight_are_the_convolution(case):
    model, axes, groups = conv_model(*case), case[0], case[4]
    (site,) = gp.find_sites(ir.from_proto(model))
    x = np.random.default_rng(0).standard_normal((3, 4, *SIZES[axes])).astype(np.float32)
    size = output_size(site.window, SIZES[axes])
    at = np.random.default_rng(2).permutation(int(np.prod(size)))[:10]
    index, inside = patch_index(site.window, SIZES[axes], at)
    taps = Taps()
    taps.patches("x", "t", 4, int(np.prod(KERNELS[axes])))
    y, rows = run(model, taps, {"x": x, "t/index": index, "t/inside": inside})
    assert y.shape[2:] == size
    weight = site.load()  # (groups, out, in)
    points = int(np.prod(KERNELS[axes]))
    assert rows.shape == (3 * len(at), points * 4)
    by_channel = rows.reshape(len(rows), points, 4).transpose(0, 2, 1)
    grouped = by_channel.reshape(len(rows), groups, -1)
    found = np.einsum("rgi,goi->rgo", grouped, weight).reshape(len(rows), -1)
    expected = y.reshape(3, 6, -1)[..., at].transpose(0, 2, 1).reshape(len(rows), 6)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found[::-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_come_as_float32_from_where_they_were_asked(dtype):
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ends = ([helper.make_tensor_value_info(name, code, None)] for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", *ends)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    x = np.random.default_rng(0).standard_normal((3, 4, 7, 9)).astype(dtype)
    taps = Taps()
    taps.rows("x", "a", 9)
    taps.positions("x", "b", 4)
    taps.shape("x", "c")
    at = np.array([0, 5, 83])
    where = np.array([3, 62])
    _, rows, positions, shape = run(model, taps, {"x": x, "a/index": at, "b/index": where})
    np.testing.assert_array_equal(rows, x.reshape(-1, 9)[at].astype(np.float32))
    expected = x.reshape(3, 4, 63)[..., where].transpose(0, 2, 1).reshape(6, 4)
    np.testing.assert_array_equal(positions, expected.astype(np.float32))
    assert rows.dtype == positions.dtype == np.float32
    assert shape.tolist() == [3, 4, 7, 9]


def test_chosen_are_some_of_the_allowed_once_each_in_order():
    rng = np.random.default_rng(0)
    assert chosen(5, 9, rng).tolist() == [0, 1, 2, 3, 4]
    some = chosen(1000, 10, rng)
    assert len(set(some.tolist())) == 10
    assert some.tolist() == sorted(some)
    assert some.dtype == np.int64
    allowed = np.array([2, 5, 7])
    assert chosen(10, 3, rng, allowed).tolist() == [2, 5, 7]
    assert set(chosen(10, 2, rng, allowed).tolist()) < {2, 5, 7}
    assert chosen(10, 2, rng, np.array([], np.int64)).tolist() == []
    counts = np.zeros(6)
    for _ in range(600):
        counts[chosen(6, 2, rng)] += 1
    assert (abs(counts - 200) < 60).all()
