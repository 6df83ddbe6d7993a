"""Einsum with a constant: every equation against onnxruntime, split and dense, and each refusal."""

import itertools

import numpy as np
import onnx_ir as ir
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

from graph_passes import Dense, ExecutedNode, Site, Skip, count_macs, find_sites, joint_groups, split
from graph_passes.batch_axis import prove
from graph_passes.split_markers import found_splits

SIZES = {"b": 2, "s": 3, "t": 4, "d": 8, "h": 3, "k": 5, "e": 6}

PRODUCTS = {
    # equation: (constant operand, ops after the split, whether a calibrator can compute the response)
    "bsd,dk->bsk": (1, "MatMul Einsum", True),
    "bsd,kd->bsk": (1, "MatMul Einsum", True),
    "bsd,dhk->bshk": (1, "MatMul Einsum", True),
    "bsd,dhk->bhsk": (1, "MatMul Einsum", True),
    "bsd,hdk->bhks": (1, "MatMul Einsum", True),
    "bshk,hkd->bsd": (1, "Einsum Einsum", True),
    "bhsk,hkd->bsd": (1, "Einsum Einsum", True),
    "bhsk,dkh->bsd": (1, "Einsum Einsum", True),
    "bds,dk->bks": (1, "Einsum Einsum", True),
    "bsd,dk->kbs": (1, "MatMul Einsum", True),
    "sbd,dk->bsk": (1, "MatMul Einsum", True),
    "dk,bsd->bsk": (0, "MatMul Einsum", True),
    "hkd,bshk->bsd": (0, "Einsum Einsum", True),
    "kd,ds->ks": (0, "Einsum Einsum", True),
    "...d,dk->...k": (1, "MatMul Einsum", True),
    "...hk,hkd->...d": (1, "Einsum Einsum", True),
    "...d,dhk->...kh": (1, "MatMul Einsum", True),
    "...sd,dhk->...hsk": (1, "MatMul Einsum", False),
    "bsd, dk": (1, "MatMul Einsum", True),
}


def shapes_of(equation, leading=(2, 3)):
    """Shapes of both operands; an ellipsis stands for the leading axes."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    return [
        (*(leading if "..." in term else ()), *(SIZES[letter] for letter in term.replace("...", ""))) for term in terms
    ]


def einsum(equation, operand=1, *, opset=17, declared=None):
    """A model of one Einsum with a constant operand, its data and its weight."""
    shapes = shapes_of(equation)
    x, w = numbers(*shapes[1 - operand]), numbers(*shapes[operand], seed=1)
    inputs = "w, x" if operand == 0 else "x, w"
    rank = np.einsum(equation.replace(" ", ""), *((w, x) if operand == 0 else (x, w))).ndim
    signature = f"(float[{declared or ','.join(map(str, x.shape))}] x) => (float[{','.join('ABCDEF'[:rank])}] y)"
    return graph(f'y = Einsum<equation = "{equation}">({inputs})', opset=opset, signature=signature, w=w), x, w


def contracted(equation, operand, x, w):
    return np.einsum(equation.replace(" ", ""), *((w, x) if operand == 0 else (x, w)))


@pytest.mark.parametrize("equation", PRODUCTS)
def test_at_full_rank_the_outputs_are_those_of_the_dense_node(equation):
    operand, kinds, plain = PRODUCTS[equation]
    model, x, w = einsum(equation, operand)
    assert error(run(model, x=x), contracted(equation, operand, x, w)) <= 1e-6
    (site,) = find_sites(model)
    assert (site.plain, site.linear, site.forms) == (plain, True, ("matmul",))
    (record,) = splits(assert_same_at_full_rank(model, 1e-5, x=x))
    assert record.form == "matmul"
    assert [node.op_type for node in model.graph] == kinds.split()
    assert set(model.graph.initializers) == {"w.left", "w.right"}


def product_of_factors(site, factors):
    """The dense weight that two factors stand for, in the layout of the file."""
    w = factors.left[0] @ factors.right[0]
    steps = [(kind, arguments) for kind, arguments in site.loader.__self__.steps]
    shapes, shape = [], tuple(site.loader.__self__.tensor.shape.numpy())
    for kind, arguments in steps:
        shapes.append(shape)
        shape = tuple(shape[axis] for axis in arguments) if kind == "transpose" else tuple(arguments)
    array = w.reshape(shape)
    for (kind, arguments), before in zip(reversed(steps), reversed(shapes), strict=True):
        array = array.transpose(np.argsort(arguments)) if kind == "transpose" else array.reshape(before)
    return array


@pytest.mark.parametrize("equation", PRODUCTS)
@pytest.mark.parametrize("rank", [1, 2])
def test_at_low_rank_the_outputs_are_those_of_the_product_of_the_factors(equation, rank):
    operand = PRODUCTS[equation][0]
    model, x, _ = einsum(equation, operand)
    kept = {}

    def source(site):
        factors = best_of_rank(rank)(site)
        kept["w"] = product_of_factors(site, factors)
        return factors

    (record,) = splits(split(model, source))
    assert record.rank == rank
    expected = contracted(equation, operand, x, kept["w"])
    assert error(run(model, x=x), expected) <= 1e-5
    assert error(run(model, x=x), contracted(equation, operand, x, 1.01 * kept["w"])) > 1e-3
    assert_sound(model)


def test_the_weight_is_that_of_the_matrix_product():
    model, _, w = einsum("bsd,dhk->bhsk")
    (site,) = find_sites(model)
    assert (site.out_features, site.in_features, site.groups) == (15, 8, 1)
    np.testing.assert_array_equal(site.load()[0], w.reshape(8, 15).T)
    model, _, w = einsum("bhsk,dkh->bsd")
    (site,) = find_sites(model)
    np.testing.assert_array_equal(site.load()[0], w.transpose(0, 2, 1).reshape(8, 15))


def response(site, x):
    """The response as a calibrator computes it: the rows of the data, in their order, by the weight."""
    rows = x.transpose(site.row_order.data) if site.row_order.data else x
    return rows.reshape(-1, site.in_features) @ site.load()[0].T


@pytest.mark.parametrize("equation", [name for name, (_, _, plain) in PRODUCTS.items() if plain])
def test_rows_of_data_and_output_fit_together(equation):
    model, x, _ = einsum(equation, PRODUCTS[equation][0])
    (site,) = find_sites(model)
    y = run(model, x=x)
    y = y.transpose(site.row_order.output) if site.row_order.output else y
    came = response(site, x)
    assert error(came, y.reshape(came.shape)) <= 1e-6
    assert error(came[::-1], y.reshape(came.shape)) > 0.1


@pytest.mark.parametrize("equation", PRODUCTS)
@pytest.mark.parametrize("behind", [False, True])
def test_a_bias_is_added_along_the_rows_of_the_weight(equation, behind):
    operand = PRODUCTS[equation][0]
    model, x, _ = einsum(equation, operand)
    if behind:
        last = model.graph.outputs[0]
        (node,) = model.graph
        c = ir.Value(name="c", const_value=ir.tensor(np.float32(0.5)), type=last.type, shape=ir.Shape(()))
        model.graph.register_initializer(c)
        node.outputs[0].name = "h"
        add = ir.node("Add", [node.outputs[0], c], name="add")
        model.graph.append(add)
        add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = "y", last.type, last.shape
        model.graph.outputs[0] = add.outputs[0]
    expected = run(model, x=x)
    (site,) = find_sites(model)
    bias = numbers(site.bias_size, seed=7)
    split(model, lambda site: full_rank(site, bias=bias))
    change = run(model, x=x) - expected
    order = site.row_order.output if site.plain and site.row_order.output else range(change.ndim)
    rows = change.transpose(*order) if equation != "...sd,dhk->...hsk" else change.transpose(0, 1, 3, 2, 4)
    found = rows.reshape(-1, site.bias_size)
    assert error(found, np.broadcast_to(bias, found.shape).copy()) <= 1e-4
    assert_sound(model)


def test_behind_an_add_of_a_constant_the_bias_goes_into_it():
    sizes = "(float[2,3,8] x) => (float[2,3,3,5] y)"
    model = graph(
        'h = Einsum<equation = "bsd,dhk->bshk">(x, w)  y = Add(h, c)',
        signature=sizes,
        w=numbers(8, 3, 5),
        c=numbers(3, 5),
    )
    x, bias = numbers(2, 3, 8), numbers(15, seed=3)
    expected = run(model, x=x) + bias.reshape(3, 5)
    split(model, lambda site: full_rank(site, bias=bias))
    assert ops(model) == {"MatMul": 1, "Einsum": 1, "Add": 1}
    assert error(run(model, x=x), expected) <= 1e-5


REFUSED = {
    "bsd,bdk->bsk": "index 'b' is a batch index of weight and data",
    "bshd,hdk->bshk": "index 'h' is a batch index of weight and data",
    "bsd,dk->bk": "index 's' is summed over in one operand alone",
    "bsd,dhk->bsk": "index 'h' is summed over in one operand alone",
    "bsd,dd->bs": "an index that repeats in one term",
    "bsd,d->bs": "no index is summed over, or the weight has none of its own",
    "bsd,hk->bsdhk": "no index is summed over, or the weight has none of its own",
    "bsd,...d->...bs": "an ellipsis in the weight, or behind other indices",
    "b...d,dk->b...k": "an ellipsis in the weight, or behind other indices",
}


@pytest.mark.parametrize("equation", REFUSED)
def test_what_is_no_product_of_a_matrix_stays_dense(equation):
    model, x, _ = einsum(equation)
    before = run(model, x=x)
    (record,) = split(model, full_rank)
    assert isinstance(record, Skip)
    assert record.reason == REFUSED[equation]
    assert record.weight == "w"
    np.testing.assert_array_equal(run(model, x=x), before)


def test_other_numbers_of_operands_stay_dense():
    three = graph(
        'y = Einsum<equation = "bd,dk,kt->bt">(x, x2, w)',
        signature="(float[2,3] x, float[3,4] x2) => (float[A,B] y)",
        w=numbers(4, 5),
    )
    (record,) = split(three, full_rank)
    assert record.reason == "an Einsum of 3 operands: only two are split"
    alone = graph('y = Einsum<equation = "dk->kd">(w)', signature="(float[2] x) => (float[A,B] y)", w=numbers(4, 5))
    (record,) = split(alone, full_rank)
    assert isinstance(record, Skip)


def test_two_computed_operands_have_no_record():
    signature = "(float[2,3,4] x, float[2,5,4] z) => (float[A,B,C] y)"
    assert find_sites(graph('y = Einsum<equation = "bsd,btd->bst">(x, z)', signature=signature)) == []


@pytest.mark.parametrize(("declared", "rows"), [("2,3,1", 8), ("2,3,N", 1)])
def test_a_stretched_index_stays_dense(declared, rows):
    """An index of size 1 in one operand is repeated: the factors of such a weight would not be."""
    signature = f"(float[{declared}] x) => (float[A,B,C] y)"
    model = graph('y = Einsum<equation = "bsd,dk->bsk">(x, w)', signature=signature, w=numbers(rows, 5))
    (record,) = split(model, full_rank)
    assert record.reason == "weight and data have other sizes of an index: one of them is stretched"


def test_without_the_shape_of_the_data_the_first_node_is_an_einsum():
    model, x, _ = einsum("bsd,dk->bsk", declared="B,S,D")
    assert_same_at_full_rank(model, 1e-5, x=x)
    assert [node.op_type for node in model.graph] == ["Einsum", "Einsum"]


def test_projections_of_the_same_data_share_the_right_factor():
    body = (
        " ".join(f'{n} = Einsum<equation = "bsd,dhk->bhsk">(x, {n}w)' for n in "qkv") + " t = Add(q, k) y = Add(t, v)"
    )
    weights = {f"{n}w": numbers(8, 3, 5, seed=seed) for seed, n in enumerate("qkv")}
    model = graph(body, signature="(float[2,3,8] x) => (float[A,B,C,D] y)", **weights)
    ((_, *others),) = joint_groups(model)
    assert len(others) == 2
    x = numbers(2, 3, 8)
    expected = run(model, x=x)
    records = splits(split(model, full_rank, joint=True))
    assert {record.first_node for record in records} == {records[0].first_node}
    assert ops(model) == {"MatMul": 1, "Einsum": 3, "Add": 2}
    assert error(run(model, x=x), expected) <= 1e-5


def test_products_that_begin_with_an_einsum_are_not_joint():
    body = 'q = Einsum<equation = "bds,dk->bsk">(x, a) k = Einsum<equation = "bds,dk->bsk">(x, c) y = Add(q, k)'
    model = graph(body, signature="(float[2,8,3] x) => (float[A,B,C] y)", a=numbers(8, 5), c=numbers(8, 5, seed=1))
    assert joint_groups(model) == []


def test_a_weight_used_by_a_matmul_too_is_stored_once():
    body = 'q = Einsum<equation = "bsd,kd->bsk">(x, w)  k = MatMul(x, v) '
    body += 'z = Einsum<equation = "bsk,kd->bsd">(q, w)  y = Add(z, k)'
    signature = "(float[2,3,8] x) => (float[A,B,C] y)"
    model = graph(body, signature=signature, w=numbers(5, 8), v=numbers(8, 8))
    x = numbers(2, 3, 8)
    assert_same_at_full_rank(model, 1e-5, x=x)
    assert len(model.graph.initializers) == 4


@pytest.mark.parametrize("equation", PRODUCTS)
def test_the_split_is_read_back(equation):
    model, _, _ = einsum(equation, PRODUCTS[equation][0])
    model.graph[0].name = "product"
    (record,) = splits(split(model, best_of_rank(2)))
    (found,) = found_splits(ir.from_proto(ir.to_proto(model))).values()
    assert (found.form, found.rank(1, record.in_features)) == ("matmul", 2)
    assert found.rank(1, record.in_features + 1) != 2


@pytest.mark.parametrize(
    "equation", [name for name in PRODUCTS if name.split(",")[0] in ("bsd", "bshk", "bhsk", "...d")]
)
def test_samples_stay_apart_in_dense_and_split(equation):
    model, x, _ = einsum(equation, declared=None)
    for split_too, axis in itertools.product((False, True), (0, 1)):
        if split_too:
            split(model, best_of_rank(2))
        proto = ir.to_proto(model)
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "n"
        del proto.graph.value_info[:]
        del proto.graph.output[0].type.tensor_type.shape.dim[:]
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        proof = prove(proto, {"x": axis}, {"x": x.shape})
        is_column = axis == 1 and equation.startswith("bh")
        assert proof.holds == (not is_column), (proof.reason, axis)
        if is_column:
            assert proof.feature


def test_the_product_of_all_indices_is_counted():
    for equation, (operand, _, _) in PRODUCTS.items():
        model, x, w = einsum(equation, operand)
        y = contracted(equation, operand, x, w)
        inputs = (w.shape, x.shape) if operand == 0 else (x.shape, w.shape)
        node = ExecutedNode(
            domain="", op_type="Einsum", inputs=inputs, outputs=(y.shape,), attributes={"equation": equation}
        )
        (site,) = find_sites(model)
        assert count_macs(node).total == x.size * site.out_features


def test_a_source_may_leave_it_dense():
    model, _, _ = einsum("bsd,dk->bsk")
    (record,) = split(model, lambda site: Dense(reason="too small"))
    assert record.reason == "too small"
    assert isinstance(find_sites(model)[0], Site)


def test_the_oracle_is_the_nearest_matrix():
    model, x, w = einsum("bsd,dhk->bshk")
    split(model, best_of_rank(3))
    nearest = truncated(w.reshape(8, 15), 3).reshape(8, 3, 5)
    assert error(run(model, x=x), np.einsum("bsd,dhk->bshk", x, nearest)) <= 1e-5
