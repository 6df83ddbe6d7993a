import numpy as np
import pytest
from split_checks import assert_sound, best_of_rank, error, full_rank, graph, numbers, ops, run, splits, truncated

from graph_passes import Dense, find_sites, joint_groups, split

BODY = """
    q = MatMul(x, a)  k = Gemm<transB=1>(x, b, c)  v = MatMul(x, d)
    s = Relu(q)  t = Relu(k)  z = Add(s, t)  y = Add(z, v)
"""
WEIGHTS = {"a": numbers(6, 4), "b": numbers(4, 6, seed=1), "c": numbers(4), "d": numbers(6, 4, seed=2)}


def attention(**changes):
    return graph(BODY, **(WEIGHTS | changes))


def test_groups_are_products_of_the_same_data():
    (group,) = joint_groups(attention())
    assert [site.weight for site in group] == ["a", "b", "d"]
    assert joint_groups(graph("h = MatMul(x, a)  y = MatMul(h, b)", a=numbers(6, 6), b=numbers(6, 4))) == []


def test_full_rank_and_one_shared_right():
    model, x, seen = attention(), numbers(3, 6), []
    expected = run(model, x=x)

    def source(site):
        seen.append((site.weight, site.members, site.out_features, site.in_features))
        return full_rank(site)

    records = splits(split(model, source, joint=True))
    assert seen == [("a + b + d", ("a", "b", "d"), 12, 6)]
    assert [(record.node, record.weight, record.out_features, record.rank) for record in records] == [
        ("q", "a", 4, 6),
        ("k", "b", 4, 6),
        ("v", "d", 4, 6),
    ]
    assert {record.first_node for record in records} == {"q/right"}
    assert {record.joint for record in records} == {("a", "b", "d")}
    assert error(run(model, x=x), expected) <= 1e-5
    assert error(2 * run(model, x=x), expected) > 0.9
    assert sorted(model.graph.initializers) == ["a.left", "a.right", "b.left", "c", "d.left"]
    assert ops(model) == {"MatMul": 3, "Gemm": 1, "Relu": 2, "Add": 2}
    assert_sound(model)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_low_rank_is_that_of_the_stacked_weight(rank):
    model, x = attention(), numbers(3, 6)
    split(model, best_of_rank(rank), joint=True)
    stacked = truncated(np.concatenate([WEIGHTS["a"].T, WEIGHTS["b"], WEIGHTS["d"].T]), rank)
    q, k, v = (x @ part.T for part in np.split(stacked, 3))
    assert error(run(model, x=x), np.maximum(q, 0) + np.maximum(k + WEIGHTS["c"], 0) + v) <= 1e-5


def test_lost_marks():
    model = attention()
    split(model, best_of_rank(2), joint=True)
    for node in model.graph:
        node.metadata_props.clear()
    assert not splits(split(model, full_rank))


def test_the_source_may_want_them_apart():
    model = attention()
    records = split(model, lambda site: Dense(reason="apart") if site.members else full_rank(site), joint=True)
    assert [record.joint for record in splits(records)] == [(), (), ()]
    assert ops(model)["MatMul"] == 5
    assert_sound(model)


def test_off_by_default():
    model = attention()
    split(model, full_rank)
    assert ops(model)["MatMul"] == 5


def test_what_is_not_joined():
    body = "q = MatMul(x, a)  k = MatMul(x, a)  l = MatMul(e, x)  t = Transpose(x)  g = Gemm<transA=1>(t, b)"
    model = graph(
        body + "  h = Add(q, k)  i = Add(h, g)  y = Add(i, l)",
        signature="(float[4,4] x) => (float[4,4] y)",
        **{name: numbers(4, 4, seed=i) for i, name in enumerate("abe")},
    )
    assert len(find_sites(model)) == 4
    assert joint_groups(model) == []
