"""A site that keeps some of its hidden units makes the sites before it smaller, which then have no split."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_deploy.core.errors import UsageError
from rsi_deploy.planning.decide import refuse_units
from rsi_deploy.planning.knapsack import Option, SiteOptions, UnreachableLimitError, choose, smallest_cost, total_cost
from rsi_deploy.planning.planner import Decision


def option(form: str, cost: int, loss: float, *, rank: int | None = None, bits: int = 32, share: float = 1.0) -> Option:
    return Option(
        form=form, rank=rank, params=cost, macs=cost, bytes=cost, loss=loss, bits=bits, share=share, nanoseconds=cost
    )


def tied(reader: list[tuple[int, float]], units: list[tuple[float, int, float]], makers: list[list[tuple[int, float]]]):
    """A site with dense cost 40, splits and units `(share, cost, loss)`, and the sites that make its units."""
    dense = option("dense", 40, 0.0)
    splits = [option("gemm", cost, loss, rank=1 + n) for n, (cost, loss) in enumerate(reader)]
    kept = [option("units", cost, loss, rank=1 + n, share=share) for n, (share, cost, loss) in enumerate(units)]
    names = tuple(f"m{n}" for n in range(len(makers)))
    sites = [SiteOptions(name="r", options=(dense, *splits, *kept), makers=names)]
    for name, points in zip(names, makers, strict=True):
        own = [option("gemm", cost, loss, rank=1 + n) for n, (cost, loss) in enumerate(points)]
        eight = replace(option("dense", 40, 0.25, bits=8), bytes=10)
        sites.append(SiteOptions(name=name, options=(dense, eight, *own)))
    return sites


def allowed(sites: list[SiteOptions]):
    """Every choice in which units go with dense makers."""
    for picks in itertools.product(*(site.options for site in sites)):
        if picks[0].form != "units" or all(pick.form == "dense" for pick in picks[1 : 1 + len(sites[0].makers)]):
            yield {site.name: pick for site, pick in zip(sites, picks, strict=True)}


COSTS, LOSSES = st.integers(0, 40), st.integers(0, 30).map(float)
POINTS = st.lists(st.tuples(COSTS, LOSSES), max_size=4)
UNITS = st.lists(st.tuples(st.sampled_from([0.25, 0.5, 0.75]), st.integers(-20, 40), LOSSES), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(POINTS, UNITS, st.lists(POINTS, min_size=1, max_size=2), POINTS, st.integers(0, 160))
def test_the_choice_is_allowed_fits_and_is_near_the_best(reader, units, makers, other, limit):
    sites = [*tied(reader, units, makers), *tied(other, [], [])[:1]]
    sites[-1] = SiteOptions(name="z", options=sites[-1].options)
    every = [(total_cost(sites, choice, cost="macs"), choice) for choice in allowed(sites)]
    assert smallest_cost(sites, cost="macs") == min(cost for cost, _ in every)
    fitting = [choice for cost, choice in every if cost <= limit]
    if not fitting:
        with pytest.raises(UnreachableLimitError):
            choose(sites, cost="macs", limit=limit)
        return
    found = choose(sites, cost="macs", limit=limit)
    assert found in fitting
    losses = [math.fsum(pick.loss for pick in choice.values()) for choice in fitting]
    assert math.fsum(pick.loss for pick in found.values()) <= min(losses) + 30 * len(sites) / 2


def test_units_are_chosen_where_they_win_together_and_never_beside_a_split():
    sites = tied([(20, 5.0)], [(0.5, 20, 3.0)], [[(20, 5.0)]])
    assert {n: o.form for n, o in choose(sites, cost="macs", limit=40).items()} == {"r": "units", "m0": "dense"}
    dear = tied([(20, 1.0)], [(0.5, 20, 3.0)], [[(20, 1.0)]])
    assert {n: o.form for n, o in choose(dear, cost="macs", limit=40).items()} == {"r": "gemm", "m0": "gemm"}
    both = choose(sites, cost="bytes", limit=25)  # half of eight bits
    assert (both["r"].form, both["m0"].bits) == ("units", 8)


def test_times_of_units_are_of_all_nodes_together():
    sites = tied([], [(0.5, -5, 1.0)], [[]])
    chosen = choose(sites, cost="nanoseconds", limit=36)
    assert chosen["r"].form == "units"
    assert total_cost(sites, chosen, cost="nanoseconds") == 35  # the maker's time is not halved once more


@pytest.mark.parametrize("broken", ["shared", "missing", "chained"])
def test_ties_must_be_whole(broken):
    sites = tied([], [(0.5, 20, 3.0)], [[]])
    if broken == "shared":
        sites.append(SiteOptions(name="other", options=sites[0].options, makers=("m0",)))
    elif broken == "missing":
        sites.pop()
    else:
        sites[1] = SiteOptions(name="m0", options=sites[0].options, makers=("z",))
        sites.append(SiteOptions(name="z", options=sites[0].options[:1]))
    with pytest.raises(ValueError, match="hidden units"):
        choose(sites, cost="macs", limit=30)


def test_a_plan_with_units_needs_data():
    refuse_units({"a": Decision(rank=3, reason="")})
    with pytest.raises(UsageError, match="--calib"):
        refuse_units({"a": Decision(rank=3, reason="", form="units")})


def test_options_are_kept_with_their_ties(tmp_path):
    from rsi_deploy.exporting.cache import SweepCache

    cache = SweepCache(folder=tmp_path)
    sites = tied([(20, 5.0)], [(0.5, 20, 3.0)], [[(20, 5.0)]])
    cache.keep_options(sites, {})
    assert cache.options() == (sites, {})
    assert "makers" in json.loads((tmp_path / "options.json").read_text())["sites"][0]
