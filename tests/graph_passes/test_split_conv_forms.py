"""Conv in input and separable form: any geometry at full rank, and at low rank the dense Conv of the folded product."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
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
)
from test_split_conv import conv

from graph_passes import Dense, SplitFactors, find_sites, split

FORMS = ("channel", "input", "separable")


def folded(factors: SplitFactors, kernel: list[int]) -> np.ndarray:
    """The Conv weight (out, in/groups, kh, kw) that the factors of a form stand for, by its definition."""
    left, right, (kh, kw) = factors.left.astype(np.float64), factors.right.astype(np.float64), kernel
    groups, _, rank = left.shape
    if factors.form == "channel":
        weight = np.einsum("gor,griyx->goiyx", left, right.reshape(groups, rank, -1, kh, kw))
    elif factors.form == "input":
        weight = np.einsum("goyxr,gri->goiyx", left.reshape(groups, -1, kh, kw, rank), right)
    else:
        right = right.reshape(groups, rank, -1, kh)
        weight = np.einsum("goxr,griy->goiyx", left.reshape(groups, -1, kw, rank), right)
    return weight.reshape(-1, *weight.shape[2:]).astype(factors.left.dtype)


@given(
    form=st.sampled_from(FORMS),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    into=st.integers(1, 3),
    out=st.integers(1, 4),
    size=st.integers(6, 8),
    strides=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    dilations=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    pad=st.one_of(
        st.lists(st.integers(0, 2), min_size=6, max_size=6), st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"])
    ),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_conv_in_any_form_at_full_rank(form, kernel, groups, into, out, size, strides, dilations, pad, bias):
    axes = len(kernel)
    same = isinstance(pad, str) and pad != "VALID"
    assume(not (same and max(dilations[:axes]) > 1))  # onnxruntime refuses it
    pads = f', auto_pad="{pad}"' if isinstance(pad, str) else f", pads={pad[:axes] + pad[3 : 3 + axes]}"
    attributes = f", strides={strides[:axes]}, dilations={dilations[:axes]}{pads}"
    model, x = conv(groups=groups, into=into, out=out, kernel=kernel, attributes=attributes, bias=bias, size=size)
    (site,) = find_sites(model)
    assume(form in site.forms)
    shape = site.shape(form)
    (record,) = assert_same_at_full_rank(model, 1e-5, lambda site: full_rank(site, form), x=x)
    assert (record.form, record.out_features, record.in_features, record.rank) == (form, *shape, min(shape))
    assert ops(model) == {"Conv": 2}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [5, 6, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_same_padding_of_even_and_odd_sizes(form, size, stride, auto_pad):
    attributes = f', auto_pad="{auto_pad}", strides=[{stride},{stride}]'
    model, x = conv(groups=2, into=2, out=3, kernel=[2, 3], attributes=attributes, size=size)
    assert_same_at_full_rank(model, 1e-6, lambda site: full_rank(site, form), x=x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_is_the_dense_conv_of_the_product(form, groups, rank):
    kernel, attributes = [3, 2], ", pads=[1,0,2,1], strides=[2,1], dilations=[1,2]"
    model, x = conv(groups=groups, into=3, out=5, kernel=kernel, attributes=attributes)
    (site,) = find_sites(model)
    factors = best_of_rank(rank, form)(site)
    low = folded(factors, kernel)
    replaced, _ = conv(groups=groups, into=3, out=5, kernel=kernel, attributes=attributes, change=lambda w: low)
    expected, dense = run(replaced, x=x), run(model, x=x)
    split(model, lambda site: factors)
    assert error(run(model, x=x), expected) <= 1e-6
    assert error(run(model, "ORT_DISABLE_ALL", x=x), expected) <= 1e-6
    assert error(dense, expected) > 1e-2
    assert_sound(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_factors_meant_for_another_form_are_refused(form, other):
    model, x = conv(groups=1, into=4, out=4, kernel=[3, 3])
    expected = run(model, x=x)
    (site,) = find_sites(model)
    factors = full_rank(site, other)
    labelled = SplitFactors(left=factors.left, right=factors.right, form=form)
    if form == other:
        split(model, lambda site: labelled)
        assert error(run(model, x=x), expected) <= 1e-5
    else:
        rows, columns = site.shape(form)
        with pytest.raises(ValueError, match=rf"expected left \(1, {rows}, rank\) and right \(1, rank, {columns}\)"):
            split(model, lambda site: labelled)


@pytest.mark.parametrize("form", FORMS)
def test_two_rows_exchanged_are_noticed(form):
    model, x = conv(groups=2, into=2, out=3, kernel=[3, 2])
    expected = run(model, x=x)

    def wrong(site):
        factors = full_rank(site, form)
        left = factors.left.copy()
        left[:, [0, 1]] = left[:, [1, 0]]
        return SplitFactors(left=left, right=factors.right, form=form)

    split(model, wrong)
    assert error(run(model, x=x), expected) > 1e-2


def test_rows_ordered_otherwise_are_noticed():
    """(kw, out) in place of (out, kw), and (kh, in) in place of (in, kh)."""
    model, x = conv(groups=1, into=3, out=3, kernel=[3, 3])
    expected = run(model, x=x)

    def with_wrong_rows(site):
        factors = full_rank(site, "separable")
        rows = factors.left.reshape(1, 3, 3, -1).swapaxes(1, 2).reshape(factors.left.shape)
        return SplitFactors(left=rows, right=factors.right, form="separable")

    split(model, with_wrong_rows)
    assert error(run(model, x=x), expected) > 1e-1


def attributes_of(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def test_input_form_leaves_all_that_is_spatial_on_the_second():
    attributes = ", strides=[2,1], pads=[1,0,1,2], dilations=[1,2]"
    model, _ = conv(groups=2, into=4, out=8, kernel=[3, 2], attributes=attributes)
    split(model, best_of_rank(3, "input"))
    first, second = model.graph
    assert attributes_of(first) == {"kernel_shape": (1, 1), "group": 2}
    assert first.inputs[1].shape == (6, 4, 1, 1)
    assert len(first.inputs) == 2
    assert [str(dim) for dim in first.outputs[0].shape] == ["N", "6", "7", "7"]
    assert attributes_of(second) == {
        "group": 2,
        "kernel_shape": (3, 2),
        "strides": (2, 1),
        "pads": (1, 0, 1, 2),
        "dilations": (1, 2),
    }
    assert second.inputs[1].shape == (16, 3, 3, 2)
    assert second.inputs[2].name == "c"
    assert_sound(model)


def test_separable_form_takes_the_axes_apart():
    attributes = ", strides=[2,3], pads=[1,0,1,2], dilations=[1,2]"
    model, _ = conv(groups=2, into=4, out=8, kernel=[3, 2], attributes=attributes)
    split(model, best_of_rank(3, "separable"))
    first, second = model.graph
    assert attributes_of(first) == {
        "group": 2,
        "kernel_shape": (3, 1),
        "strides": (2, 1),
        "pads": (1, 0, 1, 0),
        "dilations": (1, 1),
    }
    assert first.inputs[1].shape == (6, 4, 3, 1)
    assert [str(dim) for dim in first.outputs[0].shape] == ["N", "6", "H", "7"]
    assert attributes_of(second) == {
        "group": 2,
        "kernel_shape": (1, 2),
        "strides": (1, 3),
        "pads": (0, 0, 0, 2),
        "dilations": (1, 2),
    }
    assert second.inputs[1].shape == (16, 3, 1, 2)
    assert_sound(model)


@pytest.mark.parametrize("form", FORMS)
def test_unknown_shapes(form):
    model, x = conv(groups=1, into=2, out=3, kernel=[2, 2])
    model.graph.inputs[0].shape = None
    expected = run(model, x=x)
    split(model, lambda site: full_rank(site, form))
    assert (model.graph[0].outputs[0].shape is None) == (form != "channel")
    assert error(run(model, x=x), expected) <= 1e-6


def test_a_weight_shared_by_convs_of_one_kernel_is_asked_for_once():
    body = "a = Conv<pads=[1,1,1,1]>(x, w)  b = Conv<strides=[2,2]>(a, w)  y = Relu(b)"
    signature = "(float[N,3,8,8] x) => (float[N,3,3,3] y)"
    model, x, seen = graph(body, signature=signature, w=numbers(3, 3, 3, 3)), numbers(2, 3, 8, 8), []
    expected = run(model, x=x)
    split(model, lambda site: seen.append(site.node) or full_rank(site, "separable"))
    assert seen == ["a"]
    assert list(model.graph.initializers) == ["w.right", "w.left"]
    assert error(run(model, x=x), expected) <= 1e-5


@pytest.mark.parametrize(
    "body",
    [
        """
        a = Conv<pads=[1,1,1,1]>(x, w)  k = Constant<value_ints=[4,2,9]>()  v = Reshape(w, k)
        n = Constant<value_ints=[0,0,-1]>()  f = Reshape(x, n)  b = Conv(f, v)  s = ReduceSum<keepdims=0>(b)
        y = Add(a, s)
        """,
        """
        a = Conv<pads=[1,1,1,1]>(x, w)  b = ConvTranspose<pads=[1,1,1,1]>(a, w)  s = ReduceSum<keepdims=0>(b)
        y = Add(a, s)
        """,
    ],
)
def test_one_kernel_used_in_two_ways_stays(body):
    model = graph(body, signature="(float[N,2,5,5] x) => (float[N,4,5,5] y)", w=numbers(4, 2, 3, 3))
    records = split(model, full_rank)
    assert len(records) == 2
    assert all("uses the weight otherwise" in record.reason for record in records)
    assert [record.reason.split()[1] for record in records] == ["'b'", "'a'"]  # each names the other


def test_a_form_that_the_site_cannot_take_is_refused():
    model, _ = conv(groups=1, into=2, out=3, kernel=[1, 3])
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(ValueError, match="Conv 'y', weight 'w': expected form .*input.*, but got 'separable'"):
        split(model, lambda site: SplitFactors(left=np.ones((1, 9, 2)), right=np.ones((1, 2, 2)), form="separable"))
    assert ir.to_proto(model).SerializeToString() == before
    split(model, lambda site: Dense(reason="kept"))
    assert ir.to_proto(model).SerializeToString() == before
