"""Each form's matrix, entry by entry."""

import itertools

import numpy as np
import pytest
from split_checks import graph, numbers

from graph_passes import find_sites
from graph_passes.forms import conv_forms, first_axes, unfold, unfolded_shape

SHAPE = (2, 3, 4, 2, 5)  # groups, out, in, kh, kw


def test_every_entry_of_every_form():
    weight = numbers(*SHAPE)
    _, out, into, kh, kw = SHAPE
    channel, by_input, separable = (unfold(weight, form) for form in conv_forms((kh, kw)))
    for g, o, i, y, x in itertools.product(*map(range, SHAPE)):
        entry = weight[g, o, i, y, x]
        assert channel[g, o, (i * kh + y) * kw + x] == entry
        assert by_input[g, (o * kh + y) * kw + x, i] == entry
        assert separable[g, o * kw + x, i * kh + y] == entry
    assert not np.array_equal(by_input.reshape(-1), channel.reshape(-1))
    assert channel.shape == (2, out, into * kh * kw)


@pytest.mark.parametrize("kernel", [(3,), (1,), (3, 2), (3, 1), (1, 3), (1, 1), (2, 1, 2)])
def test_shapes_are_those_of_the_matrices(kernel):
    weight = numbers(2, 3, 4, *kernel)
    for form in conv_forms(kernel):
        assert unfold(weight, form).shape == (2, *unfolded_shape(3, 4, kernel, form))


@pytest.mark.parametrize(
    ("kernel", "forms"),
    [
        ((3,), ["channel", "input"]),
        ((1, 1), ["channel"]),
        ((3, 1), ["channel", "input"]),
        ((2, 3), ["channel", "input", "separable"]),
        ((2, 2, 2), ["channel", "input"]),
    ],
)
def test_a_conv_has_the_forms_that_differ(kernel, forms):
    assert list(conv_forms(kernel)) == forms
    assert [list(first_axes(form, 2)) for form in ("channel", "input", "separable")] == [[0, 1], [], [0]]


def test_a_site_has_the_shape_and_the_weight_of_each_form():
    weight = numbers(6, 2, 3, 5)
    signature = "(float[N,4,8,8] x) => (float[N,6,6,4] y)"
    (site,) = find_sites(graph("y = Conv<group=2>(x, w)", signature=signature, w=weight))
    assert site.forms == ("channel", "input", "separable", "pivoted")
    assert {form: site.shape(form) for form in site.forms} == {
        "channel": (3, 30),
        "input": (45, 2),
        "separable": (15, 6),
        "pivoted": (3, 30),
    }
    assert site.shape() == (site.out_features, site.in_features) == site.shape("channel")
    for form in site.forms:
        assert np.array_equal(site.load(form), unfold(weight.reshape(2, 3, 2, 3, 5), form))
    assert np.array_equal(site.load("pivoted"), site.load("channel"))
    assert np.array_equal(site.load(), weight.reshape(2, 3, 30))
    with pytest.raises(
        ValueError, match="Conv 'y', weight 'w': expected form channel or input or separable or pivoted, but got 'm"
    ):
        site.load("matmul")


@pytest.mark.parametrize(
    ("body", "weight", "form", "shape"),
    [
        ("y = MatMul(x, w)", (6, 4), "matmul", (4, 6)),
        ("y = Gemm(x, w)", (6, 4), "gemm", (4, 6)),
    ],
)
def test_products_have_two_forms_of_one_shape(body, weight, form, shape):
    (site,) = find_sites(graph(body, w=numbers(*weight)))
    assert site.forms == (form, "pivoted")
    assert site.shape() == site.shape(form) == site.shape("pivoted") == shape
    assert np.array_equal(site.load(form), site.load())
    with pytest.raises(ValueError, match=f"expected form {form} or pivoted, but got 'input'"):
        site.shape("input")


def test_a_conv_transpose_has_the_input_form_alone():
    signature = "(float[N,4,5,5] x) => (float[N,6,6,7] y)"
    (site,) = find_sites(graph("y = ConvTranspose<group=2>(x, w)", signature=signature, w=numbers(4, 3, 2, 3)))
    assert site.forms == ("input",)
    assert site.shape("input") == (18, 2)
    assert site.load("input").shape == (2, 18, 2)
    assert site.bias_size == 6
