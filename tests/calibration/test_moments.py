"""Accumulated moments against those of all rows at once, in float64."""

import pytest
import torch

from rsi_deploy.calibration import moments as module
from rsi_deploy.calibration.moments import (
    GRAM_LIMIT,
    GROUP_ROWS,
    WIDE_ROWS,
    MomentAccumulator,
    Moments,
    Samples,
    moment_bytes,
    row_limit,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(groups, count, in_features, out_features, *, mean=0.0, scale=1.0, dtype=torch.float32, seed=0):
    g = generator(seed)
    x = scale * torch.randn(groups, count, in_features, generator=g) + mean
    y = scale * torch.randn(groups, count, out_features, generator=g) - mean
    return x.to(dtype), y.to(dtype)


def brute(x, y):
    x, y = x.double(), y.double()
    a, b = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    n = x.shape[1]
    return {
        "mean_x": x.mean(1),
        "mean_y": y.mean(1),
        "xx": a.mT @ a / n,
        "yx": b.mT @ a / n,
        "yy": b.square().sum((1, 2)) / n,
    }


def gathered(x, y, sizes, limit=GRAM_LIMIT):
    gathering = MomentAccumulator(x.shape[-1], limit=limit)
    start = 0
    for size in sizes:
        gathering.add(x[:, start : start + size], y[:, start : start + size])
        start += size
    assert start == x.shape[1] == gathering.rows
    return gathering.result()


def assert_same(found, expected, rtol=1e-5):
    for name, value in expected.items():
        scale = float(expected["xx"].abs().max()) if name in ("xx", "yx", "yy") else float(value.abs().max())
        torch.testing.assert_close(getattr(found, name).double(), value, rtol=rtol, atol=rtol * scale, msg=name)


SIZES = {"one": [40], "two": [1, 39], "many": [7, 0, 20, 1, 12], "singles": [1] * 40}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_merged_batches_equal_one_batch(sizes, dtype):
    x, y = rows(3, 40, 6, 4, mean=0.5, dtype=dtype)
    found = gathered(x, y, sizes)
    assert isinstance(found, Moments)
    assert found.rows == 40
    assert found.xx.dtype == torch.float64
    assert_same(found, brute(x, y))
    with pytest.raises(AssertionError):
        assert_same(found, brute(x[:, 1:], y[:, 1:]))
    with pytest.raises(AssertionError):
        assert_same(found, {**brute(x, y), "xx": x.double().mT @ x.double() / 40})  # not centred


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mean", [1e3, -1e6])
def test_a_huge_mean_costs_no_digits(mean, sizes):
    x, y = rows(2, 40, 5, 3, mean=mean)
    assert_same(gathered(x, y, sizes), brute(x, y))


def test_batches_with_different_means():
    x, y = rows(1, 40, 5, 3)
    x[:, 20:] += 1000
    y[:, 20:] -= 300
    assert_same(gathered(x, y, [20, 20]), brute(x, y))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales(scale):
    x, y = rows(1, 64, 5, 3, scale=scale)
    found = gathered(x, y, [30, 34])
    assert_same(found, brute(x, y))
    assert found.varies


def test_wide_inputs_are_float32_up_to_the_limit_and_then_rows(monkeypatch):
    x, y = rows(1, 12, 9, 3)
    monkeypatch.setattr(module, "_DOUBLE_LIMIT", 8)
    single = gathered(x, y, [5, 7])
    assert single.xx.dtype == torch.float32
    assert_same(single, brute(x, y))
    kept = gathered(x, y, [5, 7], limit=8)
    assert isinstance(kept, Samples)
    assert kept.rows == 12
    assert torch.equal(kept.x, x)
    assert torch.equal(kept.y, y)
    torch.testing.assert_close(kept.mean_x, x.mean(1))
    torch.testing.assert_close(kept.mean_y, y.mean(1))


def test_dense_moments_are_those_of_the_response():
    x, _ = rows(2, 50, 6, 1, mean=3.0)
    weight = torch.randn(2, 4, 6, generator=generator(1))
    found = gathered(x, x.new_zeros(2, 50, 0), [20, 30])
    dense = Moments.dense(found, weight)
    expected = brute(x, x @ weight.mT)
    assert_same(dense, expected)
    with pytest.raises(AssertionError):
        assert_same(Moments.dense(found, 1.01 * weight), expected)


def test_without_rows_the_result_is_none():
    gathering = MomentAccumulator(4)
    gathering.add(torch.zeros(1, 0, 4), torch.zeros(1, 0, 2))
    assert gathering.result() is None
    assert gathering.rows == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("limit", [2, 100])
def test_values_that_are_not_finite_are_refused(bad, which, limit):
    pair = rows(1, 10, 4, 3)
    pair[which][0, 3, 1] = bad
    with pytest.raises(ValueError, match=("inputs", "responses")[which]):
        MomentAccumulator(4, limit=limit).add(*pair)


def test_a_sum_that_overflows_is_no_infinite_value_but_its_square_is():
    x = torch.full((1, 3, 4), 3e38)
    gathering = MomentAccumulator(4, limit=2)
    gathering.add(x, x)
    assert gathering.rows == 3
    with pytest.raises(ValueError, match="too large to be squared"):
        MomentAccumulator(4).add(torch.randn(1, 30, 4, generator=generator()) * 1e25, torch.zeros(1, 30, 1))


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        MomentAccumulator(4).add(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("limit", [2, 100])
@pytest.mark.parametrize("value", [0.0, 1 / 3, -1e7, 1e-12])
def test_constant_inputs_do_not_vary(value, limit):
    x = torch.full((2, 99, 5), value) * torch.arange(1, 6)
    found = gathered(x, x, [32, 32, 32, 3], limit=limit)
    assert not found.varies
    x[1, 50, 2] += abs(value) / 100 or 1e-30
    if value:
        assert gathered(x, x, [32, 32, 32, 3], limit=limit).varies


@pytest.mark.parametrize("limit", [2, 100])
def test_rounding_is_not_variance(limit):
    x = torch.full((1, 100, 5), 0.7)
    x[:, ::3] = torch.nextafter(x[:, ::3], torch.tensor(1.0))
    assert not gathered(x, x, [50, 50], limit=limit).varies
    x[:, ::3] += 1e-4
    assert gathered(x, x, [50, 50], limit=limit).varies


def test_moment_bytes_is_the_memory_taken():
    x, y = rows(3, 20, 6, 4)
    gathering = MomentAccumulator(6)
    for fold in range(8):
        gathering.add(x, y, fold=fold)
    found = gathering.result()
    assert moment_bytes(6, 4, 3, 160) == sum(fold.xx.nbytes + fold.yx.nbytes for fold in found.folds)
    assert moment_bytes(6, 4, 3, 160) != found.xx.nbytes + found.yx.nbytes
    kept = gathered(x, y, [20], limit=5)
    assert moment_bytes(6, 4, 3, 20, limit=5) == kept.x.nbytes + kept.y.nbytes


def test_wide_sites_get_few_rows():
    assert row_limit(GRAM_LIMIT + 1) == WIDE_ROWS
    assert row_limit(GRAM_LIMIT) >= 16 * GRAM_LIMIT
    assert row_limit(9, groups=1000) == 9 * GROUP_ROWS < row_limit(9, groups=2) < row_limit(9)
    assert moment_bytes(25_088, 4096, 1, row_limit(25_088)) < 2**29


@pytest.mark.parametrize("parts", [[40], [13, 27], [1] * 40])
def test_a_row_of_weight_two_equals_two_rows(parts):
    x, y = rows(2, 40, 6, 3, mean=3.0)
    counts = 1.0 + torch.arange(40) % 3
    gathering = MomentAccumulator(6)
    for some in zip(x.split(parts, 1), y.split(parts, 1), counts.split(parts), strict=True):
        gathering.add(*some)
    found = gathering.result()
    often = torch.arange(40).repeat_interleave(counts.long())
    expected = brute(x[:, often], y[:, often])
    assert found.rows == 40
    assert found.mass == pytest.approx(len(often))
    assert_same(found, expected)
    with pytest.raises(AssertionError):
        assert_same(found, brute(x, y), rtol=1e-2)
