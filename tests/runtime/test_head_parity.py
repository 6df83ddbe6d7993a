"""The surgery check of values of heads passes, and fails where the blocks go into the wrong numbers."""

import numpy as np
import onnx
import pytest
from nets import run_onnx
from onnx import numpy_helper

from graph_passes import hidden_units
from rsi_deploy.core.errors import GateError
from rsi_deploy.runtime.parity import surgery_check

BODY = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[N, 5, 12] x, float[N, 3, 5, 5] p) => (float[N, 5, 10] y)
{
    h = MatMul(x, w)  g = Add(h, b)  i = Reshape(g, s)  v = Transpose<perm = [0, 2, 1, 3]>(i)
    m = MatMul(p, v)  j = Transpose<perm = [0, 2, 1, 3]>(m)  k = Reshape(j, z)  y = MatMul(k, o)
}
"""


def check(tmp_path, dtype=np.float32, *, bias=True):
    proto, rng = onnx.parser.parse_model(BODY), np.random.default_rng(0)
    for name, shape in (("w", (12, 24)), ("b", (24,)), ("o", (24, 10))):
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(dtype), name))
    for name, sizes in (("s", [0, 0, 3, 8]), ("z", [0, 0, 24])):
        proto.graph.initializer.append(numpy_helper.from_array(np.array(sizes), name))
    for number, node in enumerate(proto.graph.node):
        node.name = f"n{number}"
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = kind
    onnx.save(onnx.shape_inference.infer_shapes(proto, data_prop=True), tmp_path / "m.onnx")
    feeds = {n: rng.random(shape).astype(dtype) for n, shape in (("x", (2, 5, 12)), ("p", (2, 3, 5, 5)))}
    return surgery_check(tmp_path / "m.onnx", {"o": "heads"}, feeds, run_onnx(tmp_path / "m.onnx", feeds), bias=bias)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_good_surgery_passes(tmp_path, dtype, bias):
    result = check(tmp_path, dtype, bias=bias)
    assert result.relative_l2 <= result.tolerance


@pytest.mark.parametrize("fault", ["heads exchanged", "numbers exchanged", "turned", "no bias"])
@pytest.mark.parametrize("full_rank", [False, True])
def test_faults_fail(tmp_path, monkeypatch, fault, full_rank):
    keep, made = hidden_units.HiddenUnits.keep_, hidden_units._made

    def sabotaged(self, right):
        if (len(right) == 24) != full_rank:
            return keep(self, right)
        heads, kept = 3, len(right) // 3
        own = right.reshape(heads, kept, heads, 8)[np.arange(heads), :, np.arange(heads)]
        if fault == "heads exchanged":
            own = own[::-1]
        elif fault == "numbers exchanged":
            own = own[:, ::-1]
        elif fault == "turned":
            own = np.ascontiguousarray(own.swapaxes(1, 2)).reshape(own.shape)
        wrong = np.zeros((heads, kept, heads, 8), right.dtype)
        wrong[np.arange(heads), :, np.arange(heads)] = own
        if fault == "no bias":
            monkeypatch.setattr(
                hidden_units,
                "_made",
                lambda tensor, axis, kept, make: made(
                    tensor, axis, kept, (lambda array, axis: array[: 3 * kept]) if tensor.shape.rank() == 1 else make
                ),
            )
        return keep(self, wrong.reshape(right.shape))

    monkeypatch.setattr(hidden_units.HiddenUnits, "keep_", sabotaged)
    with pytest.raises(GateError, match="^surgery gate"):
        check(tmp_path)
