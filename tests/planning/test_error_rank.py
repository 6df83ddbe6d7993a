import functools

import pytest
import torch
from spectra import spectral, values, weight_with

from rsi_deploy.core.errors import UsageError
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.error_rank import smallest_rank
from rsi_deploy.planning.planner import MaxError, Planner

SOLVER = Solver(route="direct", mixed_precision=False)


def relative(weight, rank):
    left, right = SOLVER(weight, rank)
    return spectral(weight.double() - left.double() @ right.double()) / spectral(weight)


@functools.cache
def weight_and_errors(name, shape):
    """Return a weight and its relative error at each rank."""
    weight = weight_with(values(name, 120), *shape).float()
    return weight, {rank: relative(weight, rank) for rank in range(1, 75)}


@pytest.mark.parametrize("text", ["5%", "20%", "60%"])
@pytest.mark.parametrize("name", ["slow", "medium", "fast"])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
def test_the_smallest_rank_for_a_relative_error(shape, name, text):
    weight, errors = weight_and_errors(name, shape)
    asked = MaxError.parse(text)
    rank = smallest_rank(weight, asked, SOLVER)
    possible = [r for r, error in errors.items() if error <= asked.value]
    if rank is None:
        assert not [r for r in possible if errors[r] <= asked.value / 1.05]
        return
    assert relative(weight, rank) <= asked.value
    assert min(possible) <= rank
    assert rank == 1 or relative(weight, rank - 1) > asked.value / 1.05  # the certified end is at most that much above


def test_a_normalized_error():
    weight = weight_with(values("slow", 120), 120, 200).float()
    rank = smallest_rank(weight, MaxError.parse("1.3x"), SOLVER)
    left, right = SOLVER(weight, rank)
    assert spectral(weight.double() - left.double() @ right.double()) <= 1.3 * float(values("slow", 120)[rank])


def test_every_group_must_meet_the_error():
    steep, flat = (weight_with(values(name, 60), 60, 90).float() for name in ("fast", "flat"))
    asked = MaxError.parse("50%")
    assert smallest_rank(steep[None], asked, SOLVER) is not None
    assert smallest_rank(torch.stack([steep, flat]), asked, SOLVER) is None
    assert smallest_rank(torch.zeros(60, 90), asked, SOLVER) == 1
    assert smallest_rank(torch.ones(1, 9), asked, SOLVER) is None  # no rank saves anything


@pytest.mark.parametrize("text", ["5%", "1.1x"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_of_nan_or_infinity_is_refused_by_name(text, bad):
    """The check comes before the spectrum, which torch cannot compute."""
    weight = weight_with(values("slow", 60), 60, 90).float()
    assert smallest_rank(weight, MaxError.parse("60%"), SOLVER, site="fc") is not None
    weight[3, 4] = bad
    with pytest.raises(ValueError, match="site 'fc': the weight has 1 NaN or infinite values of 5400; repair it"):
        smallest_rank(weight, MaxError.parse(text), SOLVER, site="fc")


@pytest.mark.parametrize("text", ["0.05", "5", "0%", "100%", "1x", "0.9x", "-5%", "x", "", "5 % x"])
def test_invalid_errors_are_refused(text):
    with pytest.raises(UsageError, match="--max-error"):
        MaxError.parse(text)


def test_the_planner_gives_a_reason():
    planner = Planner(spec=MaxError.parse("5%"), ranks={"a": 7, "b": None})
    assert planner.decide("a", 60, 90).rank == 7
    assert planner.decide("a", 60, 90).reason == "split: the smallest rank that meets --max-error 5%"
    assert planner.decide("b", 60, 90).rank is None
    assert planner.decide("b", 60, 90).reason == "no rank that saves anything meets --max-error 5%"
    assert str(MaxError.parse("1.10x")) == "1.1x"
