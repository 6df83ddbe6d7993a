import gc
import weakref

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import pytest
from split_checks import (
    assert_same_at_full_rank,
    assert_sound,
    best_of_rank,
    error,
    full_rank,
    graph,
    numbers,
    ops,
    run,
    splits,
    truncated,
)

from graph_passes import Dense, SplitFactors, find_sites, split

PLAIN = "y = MatMul(x, w)"


def counting(source):
    seen = []

    def counted(site):
        seen.append(site.weight)
        return source(site)

    return counted, seen


def test_records_come_in_graph_order():
    body = "a = MatMul(x, w)  b = Gemm(a, v)  c = MatMul(b, u)  y = Gemm(c, w)"
    a_model = graph(body, w=numbers(6, 4), v=numbers(4, 5), u=numbers(5, 6))
    nodes = [record.node for record in assert_same_at_full_rank(a_model, 1e-5, x=numbers(3, 6))]
    assert nodes == ["a", "b", "c", "y"]


def test_shared_weight_is_factored_once_and_stored_once():
    body = (
        "a = MatMul(x, w)  b = MatMul(x, w)  t = Transpose(w)  c = Gemm<transB=1>(x, t)  d = Add(a, b)  y = Add(c, d)"
    )
    a_model, x = graph(body, w=numbers(6, 4)), numbers(3, 6)
    expected = run(a_model, x=x)
    source, seen = counting(full_rank)
    records = split(a_model, source)
    assert [record.node for record in splits(records)] == ["a", "b", "c"]
    assert seen == ["w"]
    assert list(a_model.graph.initializers) == ["w.right", "w.left"]
    assert error(run(a_model, x=x), expected) <= 1e-6
    assert_sound(a_model)


BOTH_WAYS = [
    "a = MatMul(x, w)  t = Transpose(w)  r = Relu(a)  y = MatMul(r, t)",
    "a = Gemm(x, w)  r = Relu(a)  y = Gemm<transB=1>(r, w)",
    "a = Gemm<transA=0>(x, w)  t = Transpose(a)  m = MatMul(w, t)  y = Transpose(m)",
    "i = Identity(w)  t = Transpose(i)  a = MatMul(x, w)  b = MatMul(a, t)  c = MatMul(b, i)  y = Gemm<transB=1>(c, w)",
    """
        k = Constant<value_ints=[6,4,1,1]>()  v = Reshape(w, k)  a = MatMul(x, w)  n = Constant<value_ints=[0,0,1,1]>()
        f = Reshape(a, n)  c = Conv(f, v)  g = Conv(c, u)  d = ConvTranspose(g, v)  e = Conv(d, v)
        o = Constant<value_ints=[0,-1]>()  y = Reshape(e, o)
    """,
]


@pytest.mark.parametrize("body", BOTH_WAYS)
@pytest.mark.parametrize("rank", [1, 4])
def test_one_weight_in_both_orientations_has_one_pair_of_factors(body, rank):
    signature, x = "(float[N,6] x) => (float[N,6] y)", numbers(3, 6)
    w, u = numbers(6, 4), np.eye(6, dtype="float32").reshape(6, 6, 1, 1)[::-1].copy()
    constants = {"w": w, "u": u} if "Conv" in body else {"w": w}
    a_model = graph(body, signature=signature, **constants)
    near = {"w": truncated(w.astype("float64"), rank).astype("float32")}
    expected = run(graph(body, signature=signature, **constants | near), x=x)
    source, seen = counting(lambda site: best_of_rank(rank)(site) if site.weight == "w" else full_rank(site))
    split(a_model, source)
    assert seen.count("w") == 1
    stored = {
        name: value.const_value.size for name, value in a_model.graph.initializers.items() if not name.startswith("u")
    }
    assert stored == {"w.right": rank * 6, "w.left": rank * 4}
    assert error(run(a_model, x=x), expected) <= 1e-5
    assert error(run(a_model, x=x), 2 * expected) > 0.1
    assert_sound(a_model)


def test_no_bias_serves_both_ways():
    body = "a = MatMul(x, w)  t = Transpose(w)  r = Relu(a)  y = MatMul(r, t)"
    a_model = graph(body, signature="(float[N,6] x) => (float[N,6] y)", w=numbers(6, 4))
    assert all(site.both_ways for site in find_sites(a_model))
    with pytest.raises(ValueError, match="no bias"):
        split(a_model, lambda site: full_rank(site, bias=np.zeros(site.bias_size, "float32")))


def test_tied_embedding_stays():
    body = "i = Cast<to=7>(x)  e = Gather(w, i)  t = Transpose(w)  y = MatMul(e, t)"
    a_model = graph(body, signature="(float[N] x) => (float[N,9] y)", w=numbers(9, 5))
    gather, matmul = split(a_model, full_rank)
    assert gather.reason == "no pass splits Gather"
    assert matmul.reason == "weight is also used by Gather 'e': splitting would keep it and grow the file"
    assert list(a_model.graph.initializers) == ["w"]


def test_weight_that_is_an_output_stays():
    a_model = graph(
        PLAIN + "  z = Identity(w)", signature="(float[N,6] x) => (float[N,4] y, float[6,4] z)", w=numbers(6, 4)
    )
    (skip,) = find_sites(a_model)
    assert skip.reason == "weight is a graph output: splitting would keep it and grow the file"


def test_weights_in_an_if_branch():
    weight = ",".join(map(str, numbers(24)))
    body = f"""
        z = ReduceSum<keepdims=0>(x)  o = Constant<value_float=0.0>()  c = Greater(z, o)
        y = If (c) <
            then_branch = then_g () => (float[N,4] t) {{ t = MatMul(x, w) }},
            else_branch = else_g () => (float[N,4] e) {{
                k = Constant<value = float[6,4] {{{weight}}}>()
                e = MatMul(x, k)
            }}
        >
    """
    a_model = graph(body, w=numbers(6, 4, seed=3))
    positive, negative = np.abs(numbers(3, 6)), -np.abs(numbers(3, 6))
    expected = run(a_model, x=positive)
    records = assert_same_at_full_rank(a_model, 1e-6, x=negative)
    assert error(run(a_model, x=positive), expected) <= 1e-6
    assert [record.weight for record in records] == ["w", "k"]
    inner = [sorted(each.initializers) for each in a_model.graph.subgraphs()]
    assert (sorted(a_model.graph.initializers), inner) == (["w.left", "w.right"], [[], ["k.left", "k.right"]])


def test_outer_weight_in_a_loop_body():
    body = """
        n = Constant<value_int=3>()  c = Constant<value = bool {1}>()
        y = Loop (n, c, x) <body = body_g (int64 i, bool c_in, float[N,6] s) => (bool c_out, float[N,6] t) {
            c_out = Identity(c_in)  t = MatMul(s, w)
        }>
    """
    a_model = graph(body, signature="(float[N,6] x) => (float[N,6] y)", w=numbers(6, 6))
    assert_same_at_full_rank(a_model, 1e-5, x=numbers(3, 6))
    assert list(a_model.graph.initializers) == ["w.right", "w.left"]


def test_second_run_changes_nothing_and_says_so():
    a_model = graph(PLAIN, w=numbers(6, 4))
    split(a_model, full_rank)
    first, second = split(ir.from_proto(ir.to_proto(a_model)), full_rank)
    assert first.reason == "already split: this is the right factor"
    assert second.reason == "already split: this is the left factor"


def test_marks_survive_the_onnxscript_optimizer():
    body = "t = Transpose(w)  a = MatMul(x, t)  r = Relu(a)  b = MatMul(r, v)  y = Add(b, c)"
    a_model = graph(body, w=numbers(8, 6), v=numbers(8, 4), c=numbers(4))
    split(a_model, best_of_rank(2))
    optimized = onnxscript.optimizer.optimize(a_model)
    assert not splits(split(optimized, full_rank))


@pytest.mark.parametrize(
    ("body", "weight", "data"),
    [
        ("y = Gemm(x, w)", (16, 16), "float[N,16]"),
        ("y = Conv(x, w)", (16, 16, 3, 3), "float[N,16,5,5]"),
        ("y = MatMul(w, x)", (16, 16), "float[16,3]"),
    ],
)
def test_lost_marks(body, weight, data):
    out = "float[N,16,3,3]" if len(weight) == 4 else data
    a_model = graph(body, signature=f"({data} x) => ({out} y)", w=numbers(*weight))
    split(a_model, best_of_rank(4))
    for node in a_model.graph:
        node.metadata_props.clear()
    first, second = split(a_model, full_rank)
    assert first.reason == "already low-rank together with 'y/left'"
    assert second.reason == "already low-rank together with 'y/right'"


def test_a_bottleneck_with_a_bias_between_is_no_pair():
    a_model = graph("h = Gemm(x, w, c)  y = MatMul(h, v)", w=numbers(6, 1), c=numbers(1), v=numbers(1, 4))
    assert len(splits(split(a_model, full_rank))) == 2


def test_a_linear_bottleneck_by_design_is_no_pair_of_ours():
    a_model = graph("h = MatMul(x, w)  y = MatMul(h, v)", w=numbers(6, 1), v=numbers(1, 4))
    assert len(splits(split(a_model, full_rank))) == 2


def test_nodes_inherit_metadata():
    a_model = graph(PLAIN, w=numbers(6, 4))
    a_model.graph[0].metadata_props["origin"] = "layer 3"
    a_model.graph[0].doc_string = "a doc"
    split(a_model, full_rank)
    assert [node.metadata_props["origin"] for node in a_model.graph] == ["layer 3"] * 2
    assert [node.doc_string for node in a_model.graph] == ["a doc"] * 2


@pytest.mark.parametrize("case", ["shape", "dtype", "nan", "none"])
def test_wrong_answers_name_the_site(case):
    answers = {
        "shape": lambda site: SplitFactors(left=np.ones((1, 6, 2), np.float32), right=np.ones((1, 2, 4), np.float32)),
        "dtype": lambda site: SplitFactors(left=np.ones((1, 4, 2)), right=np.ones((1, 2, 6))),
        "nan": lambda site: SplitFactors(
            left=np.full((1, 4, 2), np.nan, np.float32), right=np.ones((1, 2, 6), np.float32)
        ),
        "none": lambda site: None,
    }
    messages = {
        "shape": r"MatMul 'y', weight 'w': expected left \(1, 4, rank\) and right \(1, rank, 6\), but got left \(1, 6",
        "dtype": "MatMul 'y', weight 'w': expected factors in float32, but got float64",
        "nan": "MatMul 'y', weight 'w': expected finite factors, but got NaN or infinity",
        "none": "MatMul 'y', weight 'w': expected Factors or Dense from the factor source, but got None",
    }
    a_model = graph(PLAIN, w=numbers(6, 4))
    before = ir.to_proto(a_model).SerializeToString()
    with pytest.raises(ValueError, match=messages[case]):
        split(a_model, answers[case])
    assert ir.to_proto(a_model).SerializeToString() == before


def test_a_rank_that_saves_nothing_is_obeyed():
    a_model = graph(PLAIN, w=numbers(6, 4))
    source = best_of_rank(4)
    (record,) = split(a_model, source)
    assert record.rank == 4


def test_dense_weights_are_freed_as_they_are_split():
    class Counted(np.ndarray):
        pass

    a_model = graph("a = MatMul(x, w)  y = MatMul(a, v)", w=numbers(6, 5), v=numbers(5, 4))
    alive = []
    for value in a_model.graph.initializers.values():
        array = value.const_value.numpy().copy().view(Counted)
        value.const_value = ir.Tensor(array, name=value.name)
        alive.append(weakref.ref(array))
        del array
    del value
    left_alive = []

    def source(site):
        gc.collect()
        left_alive.append(sum(reference() is not None for reference in alive))
        return best_of_rank(2)(site)

    split(a_model, source)
    assert left_alive == [2, 1]


def test_operators_without_a_pass_are_reported():
    body = "y, h, c = LSTM<hidden_size=4>(x, w, r)"
    a_model = graph(body, signature="(float[5,1,3] x) => (float[5,1,1,4] y)", w=numbers(1, 16, 3), r=numbers(1, 16, 4))
    (skip,) = find_sites(a_model)
    assert (skip.op_type, skip.weight, skip.reason) == ("LSTM", "w", "no pass splits LSTM")


def test_opset_older_than_6():
    proto = onnx.parser.parse_model(
        f'<ir_version: 4, opset_import: ["" : 5]> g (float[N,6] x) => (float[N,4] y) {{ {PLAIN} }}'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(numbers(6, 4), "w"))
    (skip,) = find_sites(ir.from_proto(proto))
    assert skip.reason == "opset 5: older than 6"


def test_dense_for_one_and_factors_for_the_other():
    a_model = graph("a = MatMul(x, w)  y = MatMul(a, v)", w=numbers(6, 5), v=numbers(5, 4))
    records = split(a_model, lambda site: Dense(reason="keep") if site.weight == "w" else full_rank(site))
    assert [type(record).__name__ for record in records] == ["Skip", "Split"]
    assert ops(a_model) == {"MatMul": 3}
