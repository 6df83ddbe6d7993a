import math

import pytest
import torch

from graph_passes import forms
from rsi_deploy.calibration.activations import CalibratedSite, output_distance


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- distance


def test_the_distance_is_the_squared_one_relative_to_the_spread():
    z = randn(50, 4) + 10
    w = z + 0.1 * randn(50, 4, seed=1)
    expected = (z - w).double().square().sum() / (z - z.mean(0)).double().square().sum()
    found = output_distance(z, w)
    assert found.relative == pytest.approx(float(expected), rel=1e-6)
    assert output_distance(z, 2 * w - z).relative == pytest.approx(4 * found.relative, rel=1e-4)


def test_the_divergence_is_that_of_the_softmax():
    z, w = randn(30, 5), randn(30, 5, seed=1)
    p, q = z.double().softmax(1), w.double().softmax(1)
    expected = float((p * (p / q).log()).sum(1).mean())
    assert output_distance(z, w).kl == pytest.approx(expected, rel=1e-6)
    assert output_distance(w, z).kl != pytest.approx(expected, rel=1e-3)
    assert output_distance(z, z + randn(30, 1)).kl == pytest.approx(
        0, abs=1e-9
    )  # a constant shift leaves the softmax unchanged


@pytest.mark.parametrize("shape", [(7, 5), (7, 3, 5), (7,), (7, 1), (7, 2, 3, 3), (1, 5)], ids=str)
def test_equal_outputs_have_no_distance(shape):
    z = randn(*shape)
    found = output_distance(z, z)
    assert found.relative == 0
    assert found.kl == (0 if len(shape) == 2 and shape[1] > 1 else None)
    assert output_distance(z, z + 1e-3 * randn(*shape, seed=1)).relative > 0


def test_embeddings_have_no_divergence():
    z = torch.nn.functional.normalize(randn(9, 5), dim=1)
    assert output_distance(z, z + 0.1).kl is None
    assert output_distance(2 * z, z).kl is not None


@pytest.mark.parametrize("z", [torch.ones(4, 3), randn(1, 3), 1e6 + torch.zeros(5, 2)], ids=["equal", "one", "large"])
def test_the_distance_of_constant_outputs_is_relative_to_their_norm(z):
    found = output_distance(z, 1.1 * z).relative
    assert found == pytest.approx(0.01, rel=1e-3)
    assert output_distance(z, z).relative == 0


def test_outputs_of_zeros():
    z = torch.zeros(4, 3)
    assert output_distance(z, z).relative == 0
    assert output_distance(z, z + 1).relative == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_infinitely_far(bad):
    z = randn(4, 3)
    w = z.clone()
    w[1, 1] = bad
    assert output_distance(z, w) == (math.inf, math.inf)
    assert output_distance(z[:, None], w[:, None]) == (math.inf, None)


# -- sites


def site_of(groups, out, into, kernel, strides, macs=0):
    return CalibratedSite(
        name="s",
        kind="Conv",
        groups=groups,
        out_features=out,
        in_features=into * math.prod(kernel),
        kernel=kernel,
        strides=strides,
        forms=forms.conv_forms(kernel),
        macs=macs,
        load=lambda: randn(groups, out, into * math.prod(kernel)),
    )


def part(values, form, axes, *, inside, outside=1):
    first = forms.first_axes(form, axes)
    return tuple(v if (axis in first) == inside else outside for axis, v in enumerate(values))


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (5, 2), (1, 3), (3, 3, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_costs_are_those_of_the_two_convolutions(kernel, groups, stride):
    axes, out, into, rank = len(kernel), 6, 4, 3
    strides = (stride,) * axes
    size = 12
    positions = math.prod(size // s for s in strides)
    dense = positions * groups * out * into * math.prod(kernel)
    site = site_of(groups, out, into, kernel, strides, macs=dense)
    for form in site.forms:
        one = rank * into * math.prod(part(kernel, form, axes, inside=True))
        two = out * rank * math.prod(part(kernel, form, axes, inside=False))
        assert site.split_params(form, rank) == groups * (one + two)
        between = math.prod(size // s for s in part(strides, form, axes, inside=True))
        assert site.split_macs(form, rank) == groups * (between * one + positions * two)
        assert site.split_macs(form, rank + 1) != groups * (between * one + positions * two)
        assert site.shape(form) == forms.unfolded_shape(out, into, kernel, form)
        assert site.first_axes(form) == len(forms.first_axes(form, axes))


def test_a_product_has_one_shape():
    site = CalibratedSite(
        name="fc",
        kind="MatMul",
        groups=1,
        out_features=6,
        in_features=4,
        forms=("matmul",),
        macs=240,
        load=lambda: randn(1, 6, 4),
    )
    assert site.shape("matmul") == (6, 4)
    assert site.split_params("matmul", 2) == 20
    assert site.split_macs("matmul", 2) == 200  # of 10 rows
