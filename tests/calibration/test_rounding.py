"""Rounding to four bits: numbers that int8 kernels can hold, and response errors that calibration makes smaller."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_deploy.calibration.rounding import (
    BLOCK,
    CODES,
    NODE_BYTES,
    ROW_BYTES,
    rounded,
    rounded_weight,
    stored_bytes,
)


def correlated(generator, features, rank, noise):
    """Second moments of inputs that vary in `rank` directions, and by `noise` in the others."""
    x = torch.randn(400, rank, generator=generator) @ torch.randn(rank, features, generator=generator)
    x = x + noise * torch.randn(400, features, generator=generator)
    return (x.mT @ x / len(x)).double()


def response_error(weight, other, second):
    """Squared response error of each row."""
    difference = weight.double() - other.double()
    return ((difference @ second) * difference).sum(dim=1)


NETS = st.tuples(
    st.integers(0, 10_000),  # seed
    st.integers(1, 6),  # rows
    st.integers(2, 50),  # columns
    st.sampled_from([None, 3, 8, 16]),  # block
    st.integers(1, 6),  # rank of the inputs
    st.sampled_from([0.01, 0.3, 3.0]),  # noise
    st.sampled_from([5, 4, 3]),  # bits
)


def drawn(net):
    seed, rows, columns, block, rank, noise, bits = net
    generator = torch.Generator().manual_seed(seed)
    gains = 10 ** (4 * torch.rand(rows, 1, generator=generator) - 2)
    weight = gains * torch.randn(rows, columns, generator=generator)
    return weight, correlated(generator, columns, rank, noise), {"block": block, "bits": bits}


@settings(max_examples=60, deadline=None)
@given(NETS)
def test_numbers_fit_where_they_are_stored(net):
    weight, second, form = drawn(net)
    lowest, highest = CODES[form["bits"]]
    for found in (rounded(weight, **form), rounded(weight, second, **form)):
        assert (found.codes.dtype, found.codes.shape) == (torch.int8, weight.shape)
        assert found.codes.min() >= lowest
        assert found.codes.max() <= highest
        assert found.multipliers.shape == (len(weight), -(-weight.shape[1] // found.block))
        assert found.multipliers.min() >= 1
        assert found.multipliers.max() <= 15
        wide = found.multipliers.int().repeat_interleave(found.block, dim=1)[:, : weight.shape[1]] * found.codes.int()
        assert wide.abs().max() <= 127
        assert torch.equal(found.weight8().int(), wide)  # nothing has wrapped around
        assert (found.scales > 0).all()
        assert torch.allclose(found.weight(), wide * found.scales[:, None])


@settings(max_examples=60, deadline=None)
@given(NETS)
def test_the_response_is_no_worse_than_that_of_the_nearest_numbers(net):
    weight, second, form = drawn(net)
    nearest, fitted = rounded(weight, **form), rounded(weight, second, **form)
    errors = [response_error(weight, found.weight(), second) for found in (fitted, nearest)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(NETS, st.booleans())
def test_numbers_on_a_grid_stay_as_they_are(net, fitted):
    weight, second, form = drawn(net)
    found = rounded(weight, second, **form).weight()
    again = rounded(found, second.flip(0, 1) if fitted else None, **form).weight()
    assert torch.allclose(again, found, rtol=1e-6, atol=0)


def test_a_number_beside_the_grid_is_rounded():
    weight = rounded(torch.randn(6, 32, generator=torch.Generator().manual_seed(0))).weight()
    weight[2, 3] += 0.3 * weight[2].abs().max() / 7
    changed = (rounded(weight).weight() - weight).abs().amax(dim=1) > 1e-5
    assert changed.tolist() == [number == 2 for number in range(6)]


@pytest.mark.parametrize("block", [None, 16])
def test_correlated_inputs_make_the_response_error_several_times_smaller(block):
    generator = torch.Generator().manual_seed(0)
    weight, second = torch.randn(32, 64, generator=generator), correlated(generator, 64, 6, 0.1)
    nearest, fitted = rounded(weight, block=block), rounded(weight, second, block=block)
    errors = [response_error(weight, found.weight(), second).sum() for found in (fitted, nearest)]
    assert errors[0] < 0.3 * errors[1]
    # Not because the numbers are nearer: those of the plain rounding are.
    distances = [(weight - found.weight()).norm() for found in (fitted, nearest)]
    assert distances[0] > distances[1]


def test_uncorrelated_inputs_leave_the_nearest_numbers():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(weight, torch.eye(32)).codes, rounded(weight).codes)
    uneven = torch.eye(32) + 0.5
    assert not torch.equal(rounded(weight, uneven).codes, rounded(weight).codes)


def test_the_nearest_numbers_are_within_half_a_step_or_clipped():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    found = rounded(weight)
    outside = (found.codes == -8) | (found.codes == 7)
    distance = (found.weight() - weight).abs() / found.scales[:, None]
    assert distance[~outside].max() <= 0.5 + 1e-4
    assert outside.any()


def test_blocks_follow_numbers_of_different_sizes_better_than_one_scale_a_row():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-1, 0, 64)
    errors = [(rounded(weight, block=block).weight() - weight).norm() for block in (16, None)]
    assert errors[0] < 0.8 * errors[1]


def test_a_block_that_does_not_divide_the_inputs_ends_with_a_shorter_one():
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    weight[:, 16:] *= 0.1
    found = rounded(weight, block=16)
    assert found.multipliers.shape == (3, 2)
    assert (found.multipliers[:, 1] < found.multipliers[:, 0]).all()
    assert (found.weight() - weight)[:, 16:].abs().max() < 0.05


def test_a_row_of_zeros_stays_one_and_changes_no_other():
    generator = torch.Generator().manual_seed(0)
    weight, second = torch.randn(4, 32, generator=generator), correlated(generator, 32, 4, 0.1)
    zeroed = weight.clone()
    zeroed[1] = 0
    for block in (None, 16):
        found, other = rounded(zeroed, second, block=block), rounded(weight, second, block=block)
        assert not found.weight()[1].any()
        assert torch.isfinite(found.scales).all()
        assert torch.equal(found.weight()[[0, 2, 3]], other.weight()[[0, 2, 3]])


def test_inputs_that_are_always_zero_are_no_fault():
    generator = torch.Generator().manual_seed(0)
    weight, second = torch.randn(4, 32, generator=generator), correlated(generator, 32, 4, 0.1)
    second[:, 5] = second[5] = 0
    found = rounded(weight, second)
    assert (response_error(weight, found.weight(), second) < response_error(weight, 0 * weight, second)).all()
    assert torch.isfinite(rounded(weight, 0 * second).weight()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(value):
    weight, second = torch.ones(2, 4), torch.eye(4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        rounded(weight)
    second[1, 2] = second[2, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        rounded(torch.ones(2, 4), second)
    with pytest.raises(ValueError, match="do not fit"):
        rounded(torch.ones(2, 4), torch.eye(3))


def test_groups_are_rounded_each_on_its_own_moments():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 32, generator=generator)
    second = torch.stack([correlated(generator, 32, 3, 0.1), correlated(generator, 32, 3, 0.1)])
    found = rounded_weight(weight, second, is_product=True)
    assert (found.codes.shape, found.block) == ((6, 32), BLOCK)
    for group in range(2):
        alone = rounded(weight[group], second[group], block=BLOCK)
        assert torch.equal(found.codes[3 * group : 3 * group + 3], alone.codes)
    assert not torch.equal(found.codes, rounded_weight(weight, second.flip(0), is_product=True).codes)


@pytest.mark.parametrize(("columns", "is_product", "blocks"), [(32, True, 2), (40, True, 1), (32, False, 1)])
def test_blocks_are_for_products_whose_inputs_they_divide(columns, is_product, blocks):
    assert rounded_weight(torch.ones(1, 3, columns), None, is_product=is_product).multipliers.shape == (3, blocks)


def test_eight_bits_are_255_steps_a_row():
    weight = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    found = rounded_weight(weight, None, is_product=True, bits=8).weight().reshape(weight.shape)
    steps = weight.abs().amax(dim=-1, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.5001 * steps).all()
    assert torch.allclose((found / steps).round(), found / steps, atol=1e-3)
    assert not rounded_weight(torch.zeros(1, 2, 4), None, is_product=True, bits=8).codes.any()


def test_bytes_of_a_stored_weight():
    assert stored_bytes(64 * 32, 64, 8, is_product=True) == 64 * 32 + 64 * ROW_BYTES + NODE_BYTES[8]
    assert stored_bytes(64 * 32, 64, 4, is_product=False) == 64 * 16 + 64 * ROW_BYTES + NODE_BYTES[4]
    assert stored_bytes(64 * 32, 64, 4, is_product=True) == 64 * 16 + 64 * 2 // 2 + 64 * ROW_BYTES + NODE_BYTES[4]
    assert stored_bytes(64 * 40, 64, 3, is_product=False) == 64 * 8 * 2 + 64 * ROW_BYTES + NODE_BYTES[3]
    assert stored_bytes(64 * 30, 64, 5, is_product=False) == 64 * 10 * 2 + 64 * ROW_BYTES + NODE_BYTES[5]
