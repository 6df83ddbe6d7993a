"""`SensitivityAccumulator` on networks whose Jacobians are known on paper, and the bounds that it keeps."""

import logging

import numpy as np
import pytest
import torch

from rsi_deploy.calibration import output_sensitivity
from rsi_deploy.calibration.activations import CalibratedSite, RowCounts
from rsi_deploy.calibration.output_sensitivity import (
    NoSensitivityError,
    SensitivityAccumulator,
    gradient_rows,
    sensitivities_or_empty,
)


def site(name="a", out=3, groups=1, kernel=()):
    return CalibratedSite(
        name=name,
        kind="Linear",
        groups=groups,
        out_features=out,
        in_features=4,
        kernel=kernel,
        forms=("matmul",),
        load=lambda: torch.zeros(groups, out, 4),
    )


def accumulator_of(samples, *sites, **options):
    return SensitivityAccumulator({s.name: s for s in sites or (site(),)}, samples, **{"seed": 0, **options})


def leaf(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()


def linear(accumulator, y, V, *cuts):
    """Accumulate for z = y V^T, with the samples cut at `cuts`."""
    for part in torch.tensor_split(y.detach(), list(cuts)):
        part = part.clone().requires_grad_()
        with accumulator.bounded_gradients(len(part)):
            z = part @ V.T
        accumulator.add_gradients(z, [("a", part)], range(len(part)))
    return accumulator.result()["a"].directions[0]


def test_it_is_the_gram_matrix_of_the_jacobian():
    V = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    G = linear(accumulator_of(600), leaf(600, 3), V) / 600  # one probe each
    expected = V.T @ V
    assert float((G - expected).norm() / expected.norm()) < 0.15
    control = (V.T @ V).diagonal().diag()
    assert float((G - control).norm() / control.norm()) > 0.3


def test_of_a_language_model_it_is_the_divergence_that_errors_cause():
    generator = torch.Generator().manual_seed(5)
    V = torch.randn(40, 3, generator=generator)
    y = torch.randn(4000, 3, generator=generator).requires_grad_()
    accumulator = accumulator_of(4000)
    with accumulator.bounded_gradients(4000):
        z = y @ V.T
    accumulator.add_gradients(z, [("a", y)], range(4000), are_scores=True)
    found = accumulator.result()["a"]
    e = 0.02 * torch.randn(4000, 3, generator=generator) * torch.tensor([1.0, 0.2, 3.0])
    p, q = ((y.detach() + change) @ V.T for change in (torch.zeros(1), e))
    divergence = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)
    predicted = float((e @ found.directions[0] * e).sum(dim=1).mean()) / 2
    assert found.in_nats
    assert predicted == pytest.approx(float(divergence), rel=0.1)
    plain = linear(accumulator_of(4000), y, V) / 4000
    assert float((e @ plain * e).sum(dim=1).mean()) / 2 > 3 * float(divergence)


def test_probes_do_not_depend_on_the_cuts():
    V = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    y = leaf(20, 3)
    whole, cut = linear(accumulator_of(20), y, V), linear(accumulator_of(20), y, V, 1, 7, 8)
    torch.testing.assert_close(whole, cut)
    other = linear(accumulator_of(20, seed=1), y, V)
    assert not torch.allclose(whole, other, rtol=1e-2)


@pytest.mark.parametrize(("samples", "probes"), [(1, 4), (128, 4), (256, 2), (512, 1), (9999, 1)])
def test_more_samples_get_fewer_probes(samples, probes):
    y, asked = leaf(2, 3), []
    z = y * 1
    z.register_hook(asked.append)
    accumulator_of(samples).add_gradients(z, [("a", y)], range(2))
    assert len(asked) == probes


@pytest.mark.parametrize("sizes", [[3000], [1] * 3000, [64] * 46 + [56]])
def test_chosen_samples_are_spread_over_the_data(sizes):
    accumulator = accumulator_of(3000)
    begin, asked = 0, []
    for count in sizes:
        asked += [begin + int(i) for i in accumulator.choose(count)]
        begin += count
    assert len(asked) == output_sensitivity.SAMPLES
    assert np.diff([-1, *asked, 3000]).max() <= 3
    assert asked == [int(i) for i in accumulator_of(3000).choose(3000)]


def test_few_samples_are_all_chosen():
    assert list(accumulator_of(5).choose(5)) == [0, 1, 2, 3, 4]


def test_pieces_become_as_large_as_memory_allows():
    accumulator = accumulator_of(100, memory=2**20)
    pieces = accumulator.pieces(100)
    assert next(pieces) == slice(0, 2)
    y = leaf(2, 1000)
    with accumulator.bounded_gradients(2):
        _ = y.exp()  # 8,000 bytes kept; the reserve is one half
    piece = next(pieces)
    assert 2 + 50 < piece.stop <= 2 + 131


def test_pieces_are_bounded(monkeypatch):
    monkeypatch.setattr(output_sensitivity, "PIECE", 2**16)
    accumulator = accumulator_of(100, memory=2**30)
    pieces = accumulator.pieces(100)
    assert next(pieces) == slice(0, 2)
    with accumulator.bounded_gradients(2):
        _ = leaf(2, 1000).exp()
    piece = next(pieces)
    assert 2 + 2 <= piece.stop <= 2 + 8  # 4,000 bytes a sample or two, one half in reserve


def test_more_than_the_bound_is_refused():
    accumulator = accumulator_of(4, memory=3 * 3 * 4 + 1000)
    with (
        pytest.raises(NoSensitivityError, match="4 samples need more than 1000 bytes"),
        accumulator.bounded_gradients(4),
    ):
        _ = leaf(4, 1000).exp()
    big = leaf(4, 1000)
    with accumulator.bounded_gradients(4, [big]):
        _ = big * big  # a weight, which is in memory anyway
    with pytest.raises(NoSensitivityError, match="more than the bound"):
        accumulator_of(4, memory=3 * 3 * 4 - 1)


def test_sums_are_updated_in_place(monkeypatch):
    monkeypatch.setattr(output_sensitivity, "ROWS_AT_ONCE", 1)
    accumulator = accumulator_of(4)
    places, sizes = [], []
    for begin in (0, 2):
        y = leaf(2, 3)
        with accumulator.bounded_gradients(2):
            z = y * 2
        accumulator.add_gradients(z, [("a", y)], range(begin, begin + 2))
        places.append(accumulator._sums["a"].data_ptr())
        sizes.append(float(accumulator._sums["a"].diagonal(dim1=-2, dim2=-1).sum()))
    assert places[0] == places[1]
    assert sizes[0] < sizes[1]


def test_an_overwritten_value_is_refused():
    accumulator = accumulator_of(2)
    y = leaf(2, 3)
    with accumulator.bounded_gradients(2):
        z = y.exp()
        z.add_(1)
    with pytest.raises(NoSensitivityError, match="overwrites"):
        accumulator.add_gradients(z, [("a", y)], range(2))
    with accumulator.bounded_gradients(2):
        z = (y * 2).relu_()  # keeps what it wrote
    accumulator.add_gradients(z, [("a", y)], range(2))


def test_a_wide_site_has_no_sensitivity(monkeypatch, caplog):
    monkeypatch.setattr(output_sensitivity, "OUT_LIMIT", 2)
    with caplog.at_level(logging.INFO):
        accumulator = accumulator_of(2, site("a", 3), site("b", 2))
    assert set(accumulator.sites) == {"b"}
    assert "'a'" in caplog.text
    a, b = leaf(2, 3), leaf(2, 2)
    accumulator.add_gradients(a.sum(dim=1) + b.sum(dim=1), [("a", a), ("b", b)], range(2))
    assert set(accumulator.result()) == {"b"}


def test_one_feature_has_no_sensitivity():
    accumulator = accumulator_of(2, site("a", out=1), site("b"))
    y, z = leaf(2, 1), leaf(2, 3)
    accumulator.add_gradients(y * 2 + z, [("a", y), ("b", z)], range(2))
    assert set(accumulator.result()) == {"b"}  # its weight would be 1


def test_gradients_that_are_zero_or_not_finite_give_no_sensitivity():
    accumulator = accumulator_of(2, site("a"), site("b"), site("c"))
    a, b, c = leaf(2, 3), leaf(2, 3), leaf(2, 3)
    accumulator.add_gradients((a + b * torch.inf + c * 0).sum(dim=1), [("a", a), ("b", b), ("c", c)], range(2))
    assert set(accumulator.result()) == {"a"}


def test_an_output_without_gradients_is_refused():
    with pytest.raises(NoSensitivityError, match="no gradient passes"):
        accumulator_of(2).add_gradients(torch.zeros(2, 3), [("a", leaf(2, 3))], range(2))
    with pytest.raises(NoSensitivityError, match="no gradient passes"):
        accumulator_of(2).add_gradients(leaf(2, 3), [], range(2))


@pytest.mark.parametrize(
    ("kernel", "groups", "shape", "axis"),
    [
        ((), 1, (2, 5, 3), 2),
        ((), 1, (3,), 0),
        ((3, 3), 1, (2, 3, 4, 5), 1),
        ((3,), 2, (2, 6, 4), 1),
        ((3,), 2, (6, 4), 0),
    ],
)
def test_gradient_rows_by_position(kernel, groups, shape, axis):
    gradient = torch.arange(float(np.prod(shape))).reshape(shape)
    rows = gradient_rows(gradient, site(out=3, groups=groups, kernel=kernel))
    assert rows.shape == (groups, gradient.numel() // (3 * groups), 3)
    first = [0] * gradient.ndim
    for channel in range(3 * groups):
        first[axis] = channel
        assert rows[channel // 3, 0, channel % 3] == gradient[tuple(first)]


def test_failures_are_logged(caplog):
    def refused():
        raise NoSensitivityError("gradients do not pass Nonsense")

    def broken():
        raise RuntimeError("sizes of tensors must match")

    with caplog.at_level(logging.INFO):
        assert sensitivities_or_empty(refused) == {}
        assert sensitivities_or_empty(broken) == {}
        assert sensitivities_or_empty(lambda: {"a": torch.eye(1)}).keys() == {"a"}
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
    assert "Nonsense" in caplog.text
    assert "RuntimeError: sizes" in caplog.text


# -- rows


def test_row_weights_follow_the_gradient_energy():
    accumulator = accumulator_of(600, site(out=3))
    y = leaf(600, 2, 3)
    scale = torch.tensor([1.0, 3.0])[:, None]  # of the two positions of each sample
    with accumulator.bounded_gradients(600):
        z = (y * scale).reshape(600, 6)
    accumulator.add_gradients(z, [("a", y)], range(600))
    counts = accumulator.result()["a"].rows
    by_place = torch.stack([counts.by_sample[n] for n in range(600)]).mean(0)
    floor = output_sensitivity.COUNT_FLOOR
    assert float(by_place.mean()) == pytest.approx(1, rel=1e-3)
    assert float(by_place[1] - floor) == pytest.approx(9 * float(by_place[0] - floor), rel=0.1)


def test_padding_does_not_count_in_the_mean():
    energy = {0: torch.tensor([2.0, 4.0, 0.0, 0.0]), 7: torch.tensor([3.0, 3.0])}
    counts = output_sensitivity.counts_of(energy).by_sample
    assert float(torch.cat([counts[0][:2], counts[7]]).mean()) == pytest.approx(1)
    assert counts[0][2] == output_sensitivity.COUNT_FLOOR
    assert output_sensitivity.counts_of({}) is None
    assert output_sensitivity.counts_of({0: torch.zeros(3)}) is None


def test_only_rows_that_belong_to_a_sample_have_weights():
    sites = site("a"), site("conv", kernel=(3,)), site("turned")
    accumulator = accumulator_of(2, *sites)
    a, conv, turned = leaf(2, 5, 3), leaf(2, 3, 4), leaf(5, 2, 3)
    accumulator.add_gradients(a.sum(dim=(1, 2)) + conv.sum(dim=(1, 2)) + turned.sum(dim=(0, 2)),
                  [("a", a), ("conv", conv), ("turned", turned)], range(2))  # fmt: skip
    found = accumulator.result()
    assert found["a"].rows is not None
    assert found["conv"].rows is found["turned"].rows is None


def test_row_weights_by_position():
    counts = RowCounts(by_sample={4: torch.tensor([1.0, 2.0, 3.0]), 5: torch.tensor([4.0, 5.0])})
    at = torch.tensor([0, 2, 4])  # 2 samples with 3 positions each
    assert counts.of(4, 2, (2, 3, 8), at).tolist() == [
        1.0,
        3.0,
        1.0,
    ]  # sample 5 has 2 positions, so its weights are unknown
    assert counts.of(3, 2, (2, 3, 8), at).tolist() == [1.0, 1.0, 2.0]
    assert counts.of(6, 2, (2, 3, 8), at) is None
    assert counts.of(4, 2, (6, 8), at) is None
