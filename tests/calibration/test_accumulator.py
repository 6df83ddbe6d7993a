"""The buffer of `SiteAccumulator` leaves the moments unchanged."""

import pytest
import torch

from rsi_deploy.calibration.accumulator import SiteAccumulator
from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.calibration.moments import MomentAccumulator
from rsi_deploy.core.errors import ModelError
from tests import flows


def site(in_features):
    return CalibratedSite(
        name="s", kind="Linear", groups=2, out_features=3, in_features=in_features, forms=("matmul",), load=torch.Tensor
    )


def rows(count, in_features):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(2, count, in_features, generator=generator), torch.randn(2, count, 3, generator=generator)


def fields(accumulator):
    return {name: v for name, v in vars(accumulator.result()).items() if name not in ("mass", "folds")}


@pytest.mark.parametrize("in_features", [1, 8, 40])
def test_few_rows_at_a_time_or_all_at_once(in_features):
    parts = [rows(count, in_features) for count in (1, 3, 0, 2, 30, 5)]
    one, whole = SiteAccumulator(site(in_features)), MomentAccumulator(in_features)
    seen = 0
    for x, y in parts:
        one.add(x, y)
        seen += x.shape[1]
        assert one.rows == seen, "rows that wait count"
    whole.add(*(torch.cat(some, dim=1) for some in zip(*parts, strict=True)))
    found, expected = one.result(), fields(whole)
    assert found.mass == seen
    flows.assert_moments(found, expected)
    with pytest.raises(AssertionError):
        flows.assert_moments(found, {**expected, "yx": 1.01 * expected["yx"]})


def test_small_batches_are_merged_in_one_product(monkeypatch):
    added = []
    add = MomentAccumulator.add
    monkeypatch.setattr(
        MomentAccumulator, "add", lambda self, x, *more, **by: added.append(x.shape[1]) or add(self, x, *more, **by)
    )
    one = SiteAccumulator(site(40))
    for _ in range(9):
        one.add(*rows(2, 40))
    assert added == [10]
    one.add(*rows(2, 40))
    assert one.result().rows == sum(added) == 20


def test_without_rows_the_result_is_none():
    assert SiteAccumulator(site(4)).result() is None
    empty = SiteAccumulator(site(4))
    empty.add(*rows(0, 4))
    assert (empty.rows, empty.result()) == (0, None)


def test_a_value_that_is_not_finite_names_the_site_even_if_buffered():
    one = SiteAccumulator(site(40))
    x, y = rows(2, 40)
    one.add(x * torch.nan, y)
    with pytest.raises(ModelError, match="site 's': its inputs.*NaN.*--exclude 's'"):
        one.result()


def test_row_weights_are_buffered_with_their_rows():
    x, y = rows(9, 40)
    counts = 1.0 + torch.arange(9)
    one, whole = SiteAccumulator(site(40)), MomentAccumulator(40)
    for number in range(9):
        one.add(x[:, number : number + 1], y[:, number : number + 1], counts[number : number + 1])
    whole.add(x, y, counts)
    expected = fields(whole)
    flows.assert_moments(one.result(), expected)
    plain = MomentAccumulator(40)
    plain.add(x, y)
    with pytest.raises(AssertionError):
        flows.assert_moments(plain.result(), expected)


def test_batches_belong_to_folds_in_turn():
    one = SiteAccumulator(site(8))
    parts = [rows(count, 8) for count in (5, 6, 7, 8, 9, 10)]
    for number, part in enumerate(parts):
        one.add(*part, fold=number)
    found = one.result()
    assert [fold.rows for fold in found.folds] == [5 + 9, 6 + 10, 7, 8]
    whole = MomentAccumulator(8)
    whole.add(*(torch.cat(some, dim=1) for some in zip(*parts, strict=True)))
    flows.assert_moments(found, fields(whole))
    first = MomentAccumulator(8)
    first.add(*(torch.cat(some, dim=1) for some in zip(parts[0], parts[4], strict=True)))
    flows.assert_moments(found.folds[0], fields(first))
    rest = MomentAccumulator(8)
    rest.add(*(torch.cat(some, dim=1) for some in zip(*(parts[n] for n in (1, 2, 3, 5)), strict=True)))
    flows.assert_moments(found.without(0), fields(rest))
    with pytest.raises(AssertionError):
        flows.assert_moments(found.without(1), fields(rest))


def test_one_batch_has_no_folds():
    one = SiteAccumulator(site(8))
    one.add(*rows(5, 8), fold=3)
    assert one.result().folds == ()
