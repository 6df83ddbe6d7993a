import ml_dtypes
import numpy as np
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from split_checks import (
    assert_same_at_full_rank,
    assert_sound,
    best_of_rank,
    error,
    full_rank,
    graph,
    numbers,
    ops,
    splits,
    truncated,
)

from graph_passes import Dense, find_sites, split

CONSTANT = f"k = Constant<value = float[6,4] {{{','.join(map(str, numbers(24)))}}}>()  y = MatMul(x, k)"
TEXT = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,6] x) => (float[N,4] y) { y = MatMul(x, w) }'
CHAINS = {
    "transpose": ("t = Transpose(w)  y = MatMul(x, t)", (4, 6)),
    "transpose with perm": ("t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t)", (4, 6)),
    "two transposes": ("s = Transpose(w)  t = Transpose(s)  y = MatMul(x, t)", (6, 4)),
    "identity": ("s = Identity(w)  t = Identity(s)  y = MatMul(x, t)", (6, 4)),
    "reshape": ("k = Constant<value_ints=[6,-1]>()  t = Reshape(w, k)  y = MatMul(x, t)", (2, 3, 4)),
    "reshape keeping a size": ("k = Constant<value_ints=[0,-1]>()  t = Reshape(w, k)  y = MatMul(x, t)", (6, 2, 2)),
    "squeeze all": ("t = Squeeze(w)  y = MatMul(x, t)", (1, 6, 4, 1)),
    "squeeze": ("k = Constant<value_ints=[-3]>()  t = Squeeze(w, k)  y = MatMul(x, t)", (1, 6, 4)),
    "unsqueeze, transpose, reshape": (
        "k = Constant<value_ints=[0]>()  s = Unsqueeze(w, k)  r = Transpose<perm=[0,2,1]>(s)"
        "  n = Constant<value_ints=[6,4]>()  t = Reshape(r, n)  y = MatMul(x, t)",
        (4, 6),
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_lead_back_to_the_initializer(chain):
    body, shape = CHAINS[chain]
    model = graph(body, w=numbers(*shape))
    (record,) = assert_same_at_full_rank(model, 1e-6, x=numbers(3, 6))
    assert (record.weight, record.out_features, record.in_features) == ("w", 4, 6)
    assert ops(model) == {"MatMul": 2}  # the orphaned chain is gone, its constants too
    assert list(model.graph.initializers) == ["w.right", "w.left"]


def test_axes_as_attributes_before_opset_13():
    body = "s = Unsqueeze<axes=[0]>(w)  t = Squeeze<axes=[0]>(s)  y = MatMul(x, t)"
    assert_same_at_full_rank(graph(body, opset=11, w=numbers(6, 4)), 1e-6, x=numbers(3, 6))


def test_constant_node():
    model = graph(CONSTANT)
    (record,) = assert_same_at_full_rank(model, 1e-6, x=numbers(3, 6))
    assert record.weight == "k"
    assert ops(model) == {"MatMul": 2}


def test_cast_weight_is_stored_as_before_and_cast_as_before():
    model = graph("t = Cast<to=1>(w)  y = MatMul(x, t)", w=numbers(6, 4, dtype="float16"))
    (site,) = find_sites(model)
    assert (site.dtype, site.load().dtype) == ("float16", np.float16)
    assert_same_at_full_rank(model, 5e-3, x=numbers(3, 6))
    assert ops(model) == {"Cast": 2, "MatMul": 2}
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT16}


def test_bfloat16():
    w = numbers(6, 4).astype(ml_dtypes.bfloat16)
    x = numbers(3, 6)
    body = "b = Cast<to=16>(x)  m = MatMul(b, w)  y = Cast<to=1>(m)"
    model = graph(body, w=w)
    (site,) = find_sites(model)
    assert site.load().dtype == ml_dtypes.bfloat16
    split(model, full_rank)
    assert_sound(model)
    came = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]
    assert error(came, x @ w.astype(np.float32)) <= 3e-2  # bfloat16 keeps 8 bits
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.BFLOAT16}


REFUSED = {
    "weight is quantized (DequantizeLinear)": (
        "t = DequantizeLinear(q, s)  y = MatMul(x, t)",
        {"q": np.ones((6, 4), np.int8), "s": np.float32(0.1)},
    ),
    "weight is computed by Mul: fold constants first": (
        "t = Mul(w, s)  y = MatMul(x, t)",
        {"w": numbers(6, 4), "s": np.float32(0.1)},
    ),
    "weight is stored as int8, not as a float": (
        "t = Cast<to=1>(q)  y = MatMul(x, t)",
        {"q": np.ones((6, 4), np.int8)},
    ),
    "weight goes through more than one Cast, or to int32": (
        "t = Cast<to=6>(w)  u = Cast<to=1>(t)  y = MatMul(x, u)",
        {"w": numbers(6, 4)},
    ),
    "weight goes through Reshape 't' with computed arguments": (
        "k = Shape(x)  n = Shape(w)  d = Sub(n, n)  e = Add(d, n)  t = Reshape(w, e)  y = MatMul(x, t)",
        {"w": numbers(6, 4)},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason):
    body, constants = REFUSED[reason]
    model = graph(body, **{name: np.asarray(array) for name, array in constants.items()})
    before = ir.to_proto(model).SerializeToString()
    (skip,) = split(model, full_rank)
    assert (skip.node, skip.reason) == ("y", reason)
    assert ir.to_proto(model).SerializeToString() == before


def test_sparse_initializer():
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [2], [1, 5]), [6, 4])
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.sparse_initializer.append(sparse)
    (skip,) = find_sites(ir.from_proto(proto))  # onnx_ir loses it: saving this model would break it
    assert (skip.weight, skip.reason) == ("w", "weight has no data: a sparse initializer, or a broken model")


def test_shape_of_a_split_weight_is_kept_as_a_constant():
    body = """
        t = Transpose(w)  s = Shape(t)  r = Shape<start=1>(w)  h = MatMul(x, w)
        a = ReduceSum<keepdims=0>(s)  b = ReduceSum<keepdims=0>(r)  c = Add(a, b)  f = Cast<to=1>(c)  y = Add(h, f)
    """
    model = graph(body, w=numbers(6, 4))
    assert_same_at_full_rank(model, 1e-6, x=numbers(3, 6))
    assert list(model.graph.initializers) == ["w.right", "w.left"]
    assert ops(model)["Transpose"] == ops(model)["Shape"] == 0


def test_external_data_is_mapped_and_split(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,40] x) => (float[N,50] y)'
        " { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"
    )
    w, v, x = numbers(40, 30), numbers(30, 50), numbers(3, 40)
    proto.graph.initializer.extend([numpy_helper.from_array(w, "w"), numpy_helper.from_array(v, "v")])
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = ir.load(tmp_path / "m.onnx")
    left_alone = model.graph.initializers["v"].const_value
    assert isinstance(left_alone, ir.ExternalTensor)
    first, _ = find_sites(model)
    assert left_alone.raw is None  # finding reads nothing
    assert not first.load().flags.owndata
    records = split(model, lambda site: best_of_rank(9)(site) if site.weight == "w" else Dense(reason="not this one"))
    assert len(splits(records)) == 1
    assert model.graph.initializers["v"].const_value is left_alone
    assert left_alone.raw is None  # never read
    ir.save(model, tmp_path / "out.onnx", external_data="out.data")
    assert (tmp_path / "out.data").stat().st_size < (tmp_path / "m.data").stat().st_size
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    expected = np.maximum(x @ truncated(w, 9), 0) @ v
    session = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert error(session.run(None, {"x": x})[0], expected) <= 1e-5
