"""The form "heads" is timed with the nodes between the value projection and the output projection."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rsi_deploy.costing.site_models import pieces
from rsi_deploy.costing.site_timing import grid_of
from rsi_deploy.runtime.sessions import make_session
from rsi_deploy.runtime.shape_trace import trace_run

SIZES = {
    "fixed": "s = Constant<value_ints = [-1, 5, 3, 8]>()  z = Constant<value_ints = [-1, 5, 24]>()",
    "computed": "b = Shape<start = 0, end = 1>(x)  t = Shape<start = 1, end = 2>(x)"
    "  d = Constant<value_ints = [3, 8]>()  e = Constant<value_ints = [24]>()"
    "  s = Concat<axis = 0>(b, t, d)  z = Concat<axis = 0>(b, t, e)",
}


def group(sizes: str, tmp_path):
    text = f"""
    <ir_version: 10, opset_import: ["" : 18]>
    net (float[N, 5, 16] x, float[N, 3, 5, 5] p) => (float[N, 5, 20] y)
    {{
        {SIZES[sizes]}
        h = MatMul(x, w)  g = Add(h, b0)  i = Reshape(g, s)  v = Transpose<perm = [0, 2, 1, 3]>(i)
        m = MatMul(p, v)  j = Transpose<perm = [0, 2, 1, 3]>(m)  k = Reshape(j, z)  y = MatMul(k, o)
    }}
    """
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name, shape in (("w", (16, 24)), ("b0", (24,)), ("o", (24, 20))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.random(shape, np.float32), name))
    for number, node in enumerate(proto.graph.node):
        node.name = f"n{number}"
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    onnx.save(proto, tmp_path / "m.onnx")
    feeds = {name: rng.random(shape, np.float32) for name, shape in (("x", (2, 5, 16)), ("p", (2, 3, 5, 5)))}
    trace = trace_run(tmp_path / "m.onnx", feeds)
    found = {site.weight: piece for site, piece in pieces(ir.load(tmp_path / "m.onnx"), trace.inputs, trace.macs)}
    return found["o"]


@pytest.mark.parametrize("sizes", SIZES)
def test_the_small_model_has_both_projections_and_the_attention(sizes, tmp_path):
    own = group(sizes, tmp_path)
    whole = own.group
    assert "heads" not in own.forms
    assert whole.forms == ("heads",)
    assert {shape for _, shape in whole.feeds.values()} == {(2, 5, 16), (2, 3, 5, 5)}
    assert whole.numbers == 16 * 24 + 24 + 24 * 20
    assert whole.numbers_of("heads", 12) == whole.numbers / 2
    assert all(form == "heads" and rank % 3 == 0 for form, rank in grid_of(whole))
    dense = make_session(whole.model()).run(None, whole.inputs())
    for kept in (4, 7):
        small = whole.model("heads", 3 * kept)
        for before, after in zip(dense, make_session(small).run(None, whole.inputs()), strict=True):
            assert before.shape == after.shape
        shapes = {tuple(tensor.dims) for tensor in onnx.load_from_string(small).graph.initializer}
        assert {(16, 3 * kept), (3 * kept, 20)} <= shapes
        assert not any(24 in shape for shape in shapes)
