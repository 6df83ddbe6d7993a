"""The pivoted form: fewer numbers for the same product, in every operator that takes it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from backend_cases import cases as backend_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import cases
from split_checks import error, full_rank, graph, numbers, pivot_rows, run, splits
from test_backend_suite import distance, is_valid, outputs, rewritten
from test_random_graphs import check

from graph_passes import Dense, Site, SplitFactors, find_sites, split
from graph_passes.forms import break_even_rank, split_numbers
from graph_passes.pivoted import pivot_order
from graph_passes.split_markers import found_splits

SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
MATRIX = "(float[N,6] x) => (float[N,8] y)"
IMAGE = "(float[N,4,9,7] x) => (float[N,8,?,?] y)"
BODIES = {
    "y = MatMul(x, w)": (MATRIX, (6, 8)),
    "t = MatMul(x, w)  y = Add(t, b)": (MATRIX, (6, 8)),
    "y = Gemm(x, w, b)": (MATRIX, (6, 8)),
    "y = Gemm<transB = 1>(x, w, b)": (MATRIX, (8, 6)),
    "y = Gemm(x, w)": (MATRIX, (6, 8)),
    "y = Conv<pads = [1, 1, 1, 1], strides = [2, 1]>(x, w, b)": (IMAGE, (8, 4, 3, 3)),
    "y = Conv<group = 2>(x, w, b)": (IMAGE, (8, 2, 1, 3)),
    "y = Conv(x, w)": (IMAGE, (8, 4, 1, 1)),
}


def pivoted_if_possible(site: Site) -> SplitFactors:
    return full_rank(site, "pivoted" if "pivoted" in site.forms else "first")


def drawn(site: Site, rank: int, bias: np.ndarray | None = None) -> SplitFactors:
    rows, columns = site.shape("pivoted")
    left, right = numbers(site.groups, rows, rank), numbers(site.groups, rank, columns)
    pivots = np.stack([np.random.default_rng(group).permutation(rows)[:rank] for group in range(site.groups)])
    for own, at in zip(left, pivots, strict=True):
        own[at] = np.eye(rank)
    return SplitFactors(left=left, right=right, form="pivoted", bias=bias, pivots=pivots)


def with_product(body: str, factors: SplitFactors, shape: tuple[int, ...]) -> np.ndarray:
    """The dense weight, as the node stores it, that the factors stand for."""
    product = factors.left @ factors.right
    return product[0].T if "Conv" not in body and "transB" not in body else product.reshape(shape)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_it_computes_the_product_of_its_factors(body, corrected, rank):
    signature, shape = BODIES[body]
    rank = rank // 2 if "group" in body and rank == 8 else rank
    constants = {"b": numbers(8, seed=3)} if " b)" in body else {}
    model = graph(body, signature=signature, w=numbers(*shape), **constants)
    (site,) = (site for site in find_sites(model) if isinstance(site, Site))
    factors = drawn(site, rank, numbers(8, seed=5) if corrected else None)
    weight = np.ascontiguousarray(with_product(body, factors, shape))
    dense = graph(body, signature=signature, w=weight, **constants)
    x = numbers(2, *((6,) if signature is MATRIX else (4, 9, 7)))
    expected = run(dense, x=x)
    if corrected:
        expected = expected + (factors.bias if signature is MATRIX else factors.bias[:, None, None])
    (record,) = splits(split(model, lambda site: factors))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert error(run(model, x=x), expected) < 1e-5
    assert error(run(model, "ORT_DISABLE_ALL", x=x), expected) < 1e-5
    assert (record.form, record.rank) == ("pivoted", rank)
    if rank == site.out_features:  # nothing is left for a second node
        return
    found = found_splits(model)[site.node]
    assert (found.form, found.rank(site.groups, site.in_features)) == ("pivoted", rank)


@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = Conv(x, w)"])
def test_pivots_in_another_order_are_noticed(body):
    signature, shape = BODIES[body]
    model = graph(body, signature=signature, w=numbers(*shape))
    x = numbers(2, *((6,) if signature is MATRIX else (4, 9, 7)))

    def exchanged(site: Site) -> SplitFactors:
        factors = drawn(site, 3)
        return dataclasses.replace(factors, right=factors.right[:, ::-1])

    dense = graph(
        body, signature=signature, w=np.ascontiguousarray(with_product(body, drawn(find_sites(model)[0], 3), shape))
    )
    split(model, exchanged)
    assert error(run(model, x=x), run(dense, x=x)) > 0.1


@pytest.mark.parametrize(
    ("body", "more"),
    [
        ("y = Gemm<alpha = 2.0>(x, w)", {}),
        ("t = MatMul(w, x)  y = Identity(t)", {}),
        ("y = Gemm<beta = 2.0>(x, w, b)", {"b": (8,)}),
        ("c = Relu(x)  y = Gemm(x, w, c)", {}),
    ],
)
def test_nodes_that_cannot_take_it(body, more):
    signature = "(float[8,8] x) => (float[8,8] y)"
    model = graph(body, signature=signature, w=numbers(8, 8), **{k: numbers(*shape) for k, shape in more.items()})
    assert all("pivoted" not in site.forms for site in find_sites(model) if isinstance(site, Site))
    model = graph("y = MatMul(x, w)", signature=signature, w=numbers(8, 8), opset=10)
    assert "pivoted" not in find_sites(model)[0].forms


def test_factors_without_the_identity_are_refused():
    left, right, pivots = numbers(1, 4, 2), numbers(1, 2, 3), np.array([[0, 1]])
    with pytest.raises(ValueError, match="identity"):
        SplitFactors(left=left, right=right, form="pivoted", pivots=pivots)
    left[0, :2] = np.eye(2)
    SplitFactors(left=left, right=right, form="pivoted", pivots=pivots)
    for wrong in ({"form": "pivoted"}, {"form": "gemm", "pivots": pivots}):
        with pytest.raises(ValueError, match="pivots"):
            SplitFactors(left=left, right=right, **wrong)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), data=st.data())
@settings(max_examples=50, deadline=None)
def test_every_rank_below_full_saves_numbers(rows, columns, data):
    rank = data.draw(st.integers(1, max(min(rows, columns), 1)))
    count = split_numbers("pivoted", rows, columns, rank)
    assert (count < rows * columns) == (rank < break_even_rank("pivoted", rows, columns))
    assert count == split_numbers("gemm", rows, columns, rank) - rank**2


def test_the_order_is_a_permutation_that_begins_with_the_pivots():
    order = pivot_order(np.array([[5, 1, 3], [0, 2, 4]]), 6)
    assert np.array_equal(np.sort(order, axis=1), [range(6)] * 2)
    assert np.array_equal(order[:, :3], [[5, 1, 3], [0, 2, 4]])


@pytest.mark.parametrize("examples", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_random_graphs_at_full_rank(examples):
    @given(case=cases())
    @settings(max_examples=examples, **SETTINGS)
    def all_pivoted(case):
        def factors(site: Site) -> SplitFactors | Dense:
            usual = case.factors(site)
            return usual if "pivoted" not in site.forms else full_rank(site, "pivoted", usual.bias)

        check(case, factors)

    all_pivoted()


def test_the_backend_suite_at_full_rank():
    pivoted, wrong = 0, []
    for case in backend_cases():
        model, records = rewritten(case, pivoted_if_possible)
        if not any(record.form == "pivoted" for record in splits(records)) or not is_valid(case.model):
            continue
        try:
            expected = outputs(case.model, case.feeds)
        except Exception:
            continue
        pivoted += 1
        if not is_valid(model) or distance(outputs(model, case.feeds), expected) > 1:
            wrong.append(case.name)
    assert not wrong
    assert pivoted >= 5


def test_pivot_rows_of_the_oracle_span_the_matrix():
    matrix = numbers(9, 4)
    assert np.linalg.matrix_rank(matrix[pivot_rows(matrix, 4)]) == 4
