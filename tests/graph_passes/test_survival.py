"""A split model elsewhere: onnxruntime at every level, the onnxscript optimizer, onnxslim; and broken models."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import onnxscript.optimizer
import pytest
from split_checks import assert_sound, best_of_rank, error, full_rank, graph, numbers, run, splits

from graph_passes import Split, find_sites, split

BODY = """
    h = Conv<pads=[1,1,1,1]>(x, w, c)  r = Relu(h)  u = ConvTranspose<strides=[2,2], group=2>(r, v)
    g = GlobalAveragePool(u)  f = Flatten(g)  d = Gemm<transB=1>(f, k, b)  e = Relu(d)  t = Transpose(p)
    m = MatMul(e, t)  y = Add(m, q)
"""


def network() -> ir.Model:
    return graph(
        BODY,
        signature="(float[N,6,7,7] x) => (float[N,10] y)",
        w=numbers(16, 6, 3, 3),
        c=numbers(16),
        v=numbers(16, 6, 2, 2),
        k=numbers(20, 12),
        b=numbers(20),
        p=numbers(10, 20),
        q=numbers(10),
    )


@pytest.mark.parametrize(
    "level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_LAYOUT", "ORT_ENABLE_ALL"]
)
def test_every_optimization_level(level):
    model, x = network(), numbers(2, 6, 7, 7)
    expected = run(model, x=x)
    assert len(splits(split(model, full_rank))) == 4
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    assert error(session.run(None, {"x": x})[0], expected) <= 1e-5


def floats(model: ir.Model) -> int:
    """Numbers in float initializers."""
    values = model.graph.initializers.values()
    return sum(int(np.prod(value.shape)) for value in values if value.dtype == ir.DataType.FLOAT)


def assert_survives(model: ir.Model, tool) -> None:
    """The tool keeps every factor and the outputs, and nothing is split again."""
    x = numbers(2, 6, 7, 7)
    split(model, best_of_rank(2))
    expected, factors = run(model, x=x), [v.shape for n, v in model.graph.initializers.items() if "right" in n]
    after = tool(model)
    assert len(factors) == 4
    assert error(run(after, x=x), expected) <= 1e-6
    assert not splits(split(after, full_rank))
    products = [node for node in after.graph if node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose")]
    assert len(products) == 8
    assert floats(after) == floats(model)
    assert_sound(after)


def test_onnxscript_optimizer():
    assert_survives(network(), lambda model: onnxscript.optimizer.optimize(ir.from_proto(ir.to_proto(model))))


def test_onnxslim():
    onnxslim = pytest.importorskip("onnxslim")
    assert_survives(network(), lambda model: ir.from_proto(onnxslim.slim(ir.to_proto(model))))


def test_what_is_not_ours_is_kept():
    proto = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["" : 12, "their.domain" : 3], producer_name: "p", producer_version: "1",'
        ' domain: "d", model_version: 5, doc_string: "m"> g (float[N,M] x) => (float[N,4] y, float[N,5] z)'
        " { a = MatMul(x, w)  y = their.domain.Special<odd = 7>(a)  b = Gemm(x, v)  z = Relu(b) }"
    )
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "in side"  # parsers before onnx 1.20 take no blank
    for name, shape in (("w", (6, 4)), ("v", (6, 5))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers(*shape), name))
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("b", 1, ["N", 5]))
    proto.graph.doc_string = "g"
    proto.graph.node[2].doc_string = "n"
    proto.metadata_props.add(key="author", value="them")
    proto.graph.input[0].doc_string = "i"
    model = ir.from_proto(proto)
    assert len(splits(split(model, full_rank))) == 2
    after = ir.to_proto(model)
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(after, name) == getattr(proto, name)
    assert list(after.opset_import) == list(proto.opset_import)
    assert list(after.metadata_props) == list(proto.metadata_props)
    assert (list(after.graph.input), list(after.graph.output)) == (list(proto.graph.input), list(proto.graph.output))
    assert after.graph.doc_string == "g"
    assert [value for value in after.graph.value_info if value.name == "b"] == list(proto.graph.value_info)
    special = next(node for node in after.graph.node if node.op_type == "Special")
    assert special == proto.graph.node[1]


def raw(nodes: str, *, extra: str = "", **initializers: np.ndarray) -> onnx.ModelProto:
    """A model that no checker has seen."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,6] x{extra}) => (float[N,4] y) {{ {nodes} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in initializers.items())
    return proto


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("a = Identity(b)  b = Identity(a)  y = MatMul(x, a)", {}),
        ("a = Transpose(b)  b = Transpose(a)  c = MatMul(x, w)  y = Add(c, a)", {"w": numbers(6, 4)}),
        ("a = MatMul(b, w)  b = Relu(a)  y = Identity(b)", {"w": numbers(4, 4)}),
        ("y = MatMul(x, nowhere)", {}),
        ("y = MatMul(nowhere, w)", {"w": numbers(6, 4)}),
        ("y = MatMul(x, w)  z = MatMul(y)", {"w": numbers(6, 4)}),
        ("y = MatMul()", {}),
        ("t = Transpose<perm=[5,1]>(w)  y = MatMul(x, t)", {"w": numbers(6, 4)}),
        ("t = Transpose<perm=[0]>(w)  y = MatMul(x, t)", {"w": numbers(6, 4)}),
        ("k = Constant<value_ints=[5,5]>()  t = Reshape(w, k)  y = MatMul(x, t)", {"w": numbers(6, 4)}),
        ("t = Cast(w)  y = MatMul(x, t)", {"w": numbers(6, 4)}),
        ("t = Squeeze(w, w)  y = MatMul(x, t)", {"w": numbers(6, 4)}),
        ("y = Gemm(x, w)", {"w": numbers(2, 6, 4)}),
        ("y = Conv(x, w)", {"w": numbers(6, 4)}),
        ("y = Conv<group=0>(x, w)", {"w": numbers(6, 4, 3)}),
        ("y = ConvTranspose<group=4>(x, w)", {"w": numbers(6, 4, 3)}),
        ("y = MatMul(x, w)", {"w": np.array(3.0, np.float32)}),
        ("y = MatMul(x, w)", {"w": numbers(6, 0)}),
        ("y = Unknown(x, w)", {"w": numbers(6, 4)}),
    ],
)
def test_broken_models_end_without_a_crash(nodes, weights):
    model = ir.from_proto(raw(nodes, **weights))
    records = split(model, full_rank)
    ir.to_proto(model)
    assert len(records) == len({record.node for record in records})


@pytest.mark.parametrize(
    "nodes",
    ["y = MatMul(x, w)  y = MatMul(x, v)", "a = MatMul(x, w)  w = Relu(a)  y = MatMul(x, w)"],
)
def test_duplicate_names_do_not_get_as_far_as_here(nodes):
    proto = raw(nodes, w=numbers(6, 4), v=numbers(6, 4))
    with pytest.raises(ir.serde.SerdeError) as caught:
        ir.from_proto(proto)
    assert "is redeclared" in str(caught.value.__cause__)


def test_same_initializer_name_in_two_scopes():
    body = """
        c = Constant<value = bool {1}>()  h = MatMul(x, w)
        y = If (c) <
            then_branch = then_g () => (float[N,4] t) { t = MatMul(x, inner) },
            else_branch = else_g () => (float[N,4] e) { e = Identity(h) }
        >
    """
    proto = raw(body, w=numbers(6, 4))
    branch = proto.graph.node[2].attribute[0].g
    branch.initializer.append(onnx.numpy_helper.from_array(numbers(6, 4, seed=1), "w"))  # shadows the outer one
    branch.node[0].input[1] = "w"
    model = ir.from_proto(proto)
    x = numbers(3, 6)
    records = [record for record in split(model, full_rank) if isinstance(record, Split)]
    assert len(records) == 2
    names = [name for each in model.graphs() for name in each.initializers]
    assert len(names) == len(set(names)) == 4
    assert error(run(model, x=x), x @ numbers(6, 4, seed=1)) <= 1e-6
    assert find_sites(model)[0].reason.startswith("already split")
