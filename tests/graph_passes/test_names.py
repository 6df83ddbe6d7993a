from split_checks import assert_same_at_full_rank, full_rank, graph, numbers

from graph_passes import split
from graph_passes.names import stem


def rename(model, old, new):
    model.graph.initializers[old].name = new
    return model


def test_factors_of_a_dotted_weight():
    model = rename(graph("y = MatMul(x, w)", w=numbers(6, 4)), "w", "classifier.0.weight")
    assert_same_at_full_rank(model, 1e-6, x=numbers(3, 6))
    assert list(model.graph.initializers) == ["classifier.0.right", "classifier.0.left"]
    assert stem(".weight") == ".weight"


def test_taken_names_are_left_alone():
    taken = numbers(4, seed=1)
    model = graph(
        "h = MatMul(x, w)  i = Add(h, u)  j = Add(i, z)  y = Add(j, v)", w=numbers(6, 4), u=taken, v=taken, z=taken
    )
    rename(rename(model, "u", "w.left"), "v", "w.right")
    model.graph[1].name = "h/left"
    model.graph[2].name = "h/right"
    model.graph[2].outputs[0].name = "h/right"
    (record,) = assert_same_at_full_rank(model, 1e-6, x=numbers(3, 6))
    assert sorted(model.graph.initializers) == ["w.left", "w.left_1", "w.right", "w.right_1", "z"]
    assert (record.first_node, record.second_node) == ("h/right_1", "h/left_1")
    assert model.graph[0].outputs[0].name == "h/right_1"


def test_a_name_taken_in_a_subgraph_is_taken():
    body = """
        c = Constant<value = bool {1}>()
        h = MatMul(x, w)
        y = If (c) <
            then_branch = then_g () => (float[N,4] t) { r = Relu(h)  t = Identity(r) },
            else_branch = else_g () => (float[N,4] e) { e = Identity(h) }
        >
    """
    model = graph(body, w=numbers(6, 4))
    inner = next(node for node in model.graph.all_nodes() if node.op_type == "Relu")
    inner.outputs[0].name = "w.right"
    assert_same_at_full_rank(model, 1e-6, x=numbers(3, 6))
    assert sorted(model.graph.initializers) == ["w.left", "w.right_1"]


def test_same_names_every_time():
    def names():
        model = graph("h = MatMul(x, w)  k = MatMul(h, v)  y = Relu(k)", w=numbers(6, 5), v=numbers(5, 4))
        split(model, full_rank)
        return [node.name for node in model.graph], list(model.graph.initializers)

    assert names() == names()
