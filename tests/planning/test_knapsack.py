import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_deploy.planning import knapsack
from rsi_deploy.planning.knapsack import Option, SiteOptions, UnreachableLimitError, choose, smallest_cost


def dense(cost):
    return Option(form="dense", rank=None, params=cost, macs=cost, bytes=cost, loss=0)


def split(cost, loss, *, rank=1, form="gemm"):
    return Option(form=form, rank=rank, params=cost, macs=cost, bytes=cost, loss=loss)


def site(name, dense_cost, *points):
    """A site whose split of rank i is the i-th `(cost, loss)`."""
    splits = [split(cost, loss, rank=rank) for rank, (cost, loss) in enumerate(points, start=1)]
    return SiteOptions(name=name, options=(dense(dense_cost), *splits))


# Whole losses: sums are exact, and ties and collinear points are frequent.
POINTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=6)
SITES = st.lists(st.tuples(st.integers(0, 40), POINTS), min_size=1, max_size=6).map(
    lambda drawn: [site(f"s{number}", cost, *points) for number, (cost, points) in enumerate(drawn)]
)


def large(count, options, *, seed=0):
    """Realistic sites: losses roughly fall with the rank."""
    rng = random.Random(seed)
    sites = []
    for number in range(count):
        out, in_, weight = rng.choice([64, 128, 512]), rng.choice([64, 576, 1152]), rng.expovariate(1)
        limit = out * in_ / (out + in_)
        ranks = sorted({1 + int(k * (limit - 1) / options) for k in range(options)})
        points = [(r * (out + in_), weight * math.exp(-4 * r / limit) * rng.uniform(0.8, 1.2)) for r in ranks]
        sites.append(site(f"layer.{number}", out * in_, *points))
    return sites


def cost_of(chosen, cost="params"):
    return sum(getattr(option, cost) for option in chosen.values())


def loss_of(chosen):
    return math.fsum(option.loss for option in chosen.values())


def optimum(sites, limit, cost="params"):
    """The least loss within `limit` by an exact dynamic program over total costs, or None."""
    least = {0: 0.0}
    for one in sites:
        sums = {}
        for so_far, option in itertools.product(least.items(), one.options):
            total = so_far[0] + getattr(option, cost)
            if total <= limit:
                sums[total] = min(sums.get(total, math.inf), so_far[1] + option.loss)
        least = sums
    return min(least.values(), default=None)


def largest_hull_step(sites):
    """The largest loss between neighbours on a lower hull, found the slow way: a hull point is best at some price."""
    largest = 0.0
    for one in sites:
        points = sorted({(option.params, option.loss) for option in one.options})
        points = [p for p in points if all(p[1] < q[1] for q in points if q[0] < p[0])]
        points = [p for i, p in enumerate(points) if i == 0 or p[0] != points[i - 1][0]]
        hull = [p for p in points if not any(above_chord(p, q, r) for q in points for r in points if q < p < r)]
        largest = max([largest, *(a[1] - b[1] for a, b in itertools.pairwise(hull))])
    return largest


def above_chord(p, q, r):
    return (p[1] - q[1]) * (r[0] - q[0]) > (r[1] - q[1]) * (p[0] - q[0])


def faults(sites, limit, chosen, *, gap):
    """The faults of a choice: names, unknown options, cost, and loss above optimum + gap."""
    found = []
    if list(chosen) != [one.name for one in sites]:
        found.append("names")
    elif any(chosen[one.name] not in one.options for one in sites):
        found.append("options")
    if cost_of(chosen) > limit:
        found.append("cost")
    if loss_of(chosen) > optimum(sites, limit) + gap:
        found.append("loss")
    return found


def limits_of(sites):
    """Every limit with an effect, and one that is too generous."""
    return range(smallest_cost(sites, cost="params"), sum(one.options[0].params for one in sites) + 2)


@given(SITES, st.data())
@settings(max_examples=300, deadline=None)
def test_small_instances_are_solved_exactly(sites, data):
    limit = data.draw(st.sampled_from(limits_of(sites)))
    assert faults(sites, limit, choose(sites, cost="params", limit=limit), gap=0) == []


@given(SITES, st.data(), st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_with_any_core_the_gap_is_at_most_one_hull_step(sites, data, core, states):
    limit = data.draw(st.sampled_from(limits_of(sites)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "CORE", core)
        patch.setattr(knapsack, "STATES", states)
        chosen = choose(sites, cost="params", limit=limit)
    assert faults(sites, limit, chosen, gap=largest_hull_step(sites)) == []


@given(SITES, st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_larger_limit_never_gives_a_larger_loss(sites, core, states):
    for sizes in ((knapsack.CORE, knapsack.STATES), (core, states)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(knapsack, "CORE", sizes[0])
            patch.setattr(knapsack, "STATES", sizes[1])
            losses = [loss_of(choose(sites, cost="params", limit=limit)) for limit in limits_of(sites)]
        assert losses == sorted(losses, reverse=True)


def test_the_checks_reject_wrong_choices():
    sites = [site("a", 10, (4, 6.0)), site("b", 10, (4, 5.0))]
    good = choose(sites, cost="params", limit=14)
    assert faults(sites, 14, good, gap=0) == []
    assert faults(sites, 14, {"a": good["a"]}, gap=0) == ["names"]
    assert faults(sites, 14, {"b": good["b"], "a": good["a"]}, gap=0) == ["names"]
    assert faults(sites, 14, {"a": dense(10), "b": dense(10)}, gap=0) == ["cost"]
    assert faults(sites, 14, {"a": split(4, 6.0), "b": dense(10)}, gap=0) == ["loss"]
    assert faults(sites, 14, {"a": split(4, 6.0), "b": dense(10)}, gap=1.0) == []
    assert faults(sites, 14, {"a": dense(10), "b": split(4, 0.0)}, gap=0) == ["options"]
    assert largest_hull_step(sites) == 6.0
    # (5, 9) lies above the chord from (4, 10) to (7, 1), and (8, 2) is beaten: one step of 9 and one of 1.
    assert largest_hull_step([site("a", 10, (4, 10.0), (5, 9.0), (7, 1.0), (8, 2.0))]) == 9.0


@given(SITES, st.data())
@settings(max_examples=50, deadline=None)
def test_the_oracle_agrees_with_trying_everything(sites, data):
    sites = sites[:3]
    limit = data.draw(st.sampled_from(limits_of(sites)))
    every = itertools.product(*(one.options for one in sites))
    assert optimum(sites, limit) == min(sum(o.loss for o in c) for c in every if sum(o.params for o in c) <= limit)
    assert optimum(sites, smallest_cost(sites, cost="params") - 1) is None


def test_the_sweep_alone_is_not_optimal_and_the_core_is():
    # The sweep takes a's step first (slope 2 against 1.5), then nothing fits; b's step alone saves more.
    sites = [site("a", 6, (1, 10.0)), site("b", 10, (1, 13.5))]
    assert loss_of(choose(sites, cost="params", limit=11)) == 10.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "CORE", 0)
        assert loss_of(choose(sites, cost="params", limit=11)) == 13.5


def test_an_option_inside_the_hull_fills_the_remaining_room():
    # (3, 9) is no hull point, but all that a limit of 3 can pay for.
    assert loss_of(choose([site("a", 10, (1, 10.0), (3, 9.0))], cost="params", limit=3)) == 9.0


def test_small_instances_with_real_losses():
    # Sums in another order differ in the last digits: 1e-12 of losses around 1.
    for seed in range(30):
        rng = random.Random(seed)
        sites = [site(f"s{i}", 60, *((rng.randint(1, 59), rng.random()) for _ in range(5))) for i in range(6)]
        before = math.inf
        for limit in limits_of(sites)[::9]:
            chosen = choose(sites, cost="params", limit=limit)
            assert faults(sites, limit, chosen, gap=1e-12) == []
            assert loss_of(chosen) <= before + 1e-12
            before = loss_of(chosen)


def test_many_sites():
    sites = large(150, 60)
    total, before = sum(one.options[0].params for one in sites), math.inf
    for percent in range(15, 101, 5):
        limit = total * percent // 100
        chosen = choose(sites, cost="params", limit=limit)
        assert cost_of(chosen) <= limit
        assert loss_of(chosen) <= before
        before = loss_of(chosen)
        # A choice without the core is the sweep's: within one step of the optimum, and not better.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(knapsack, "CORE", 0)
            sweep = choose(sites, cost="params", limit=limit)
        assert cost_of(sweep) <= limit
        assert loss_of(chosen) <= loss_of(sweep)
    assert before == 0


@pytest.mark.parametrize("cost", ["params", "macs", "bytes"])
def test_the_limit_applies_to_the_named_cost(cost):
    costs = {"params": 9, "macs": 9, "bytes": 9} | {cost: 3}
    cheap = Option(form="gemm", rank=1, loss=1.0, **costs)
    other = Option(form="matmul", rank=1, loss=0.5, params=6, macs=6, bytes=6)
    one = SiteOptions(name="a", options=(dense(10), cheap, other))
    assert choose([one], cost=cost, limit=5) == {"a": cheap}
    assert choose([one], cost=cost, limit=6) == {"a": other}
    assert smallest_cost([one], cost=cost) == 3
    for wrong in {"params", "macs", "bytes"} - {cost}:
        with pytest.raises(UnreachableLimitError):
            choose([one], cost=wrong, limit=5)


@given(SITES, st.data())
@settings(max_examples=100, deadline=None)
def test_the_order_of_sites_changes_nothing(sites, data):
    limit = data.draw(st.sampled_from(limits_of(sites)))
    shuffled = data.draw(st.permutations(sites))
    chosen = choose(shuffled, cost="params", limit=limit)
    assert chosen == choose(sites, cost="params", limit=limit)
    assert list(chosen) == [one.name for one in shuffled]


def test_ties_are_broken_by_name_and_then_by_the_order_of_options():
    sites = [site(name, 10, (4, 1.0)) for name in "cab"]
    assert [name for name, option in choose(sites, cost="params", limit=24).items() if option.form == "dense"] == [
        "a",
        "b",
    ]
    one = SiteOptions(name="a", options=(dense(10), split(4, 1, form="channel"), split(4, 1, form="input")))
    assert choose([one], cost="params", limit=9)["a"].form == "channel"
    assert (
        choose([SiteOptions(name="a", options=(dense(10), *one.options[:0:-1]))], cost="params", limit=9)["a"].form
        == "input"
    )


@given(SITES, st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_all_stay_dense_where_the_limit_allows_it(sites, more):
    total = sum(one.options[0].params for one in sites)
    chosen = choose(sites, cost="params", limit=total + more)
    assert [option.form for option in chosen.values()] == ["dense"] * len(sites)


def test_an_option_without_loss_is_taken_only_if_the_limit_requires_it():
    sites = [site("a", 10, (4, 0.0)), site("b", 10, (4, 2.0))]
    assert [option.form for option in choose(sites, cost="params", limit=20).values()] == ["dense", "dense"]
    assert [option.form for option in choose(sites, cost="params", limit=19).values()] == ["gemm", "dense"]


def test_a_limit_below_every_choice_names_the_smallest():
    sites = [site("a", 10, (4, 1.0), (3, 2.0)), site("b", 7)]
    with pytest.raises(UnreachableLimitError, match="no choice costs 9 or less; the smallest costs 10") as caught:
        choose(sites, cost="params", limit=9)
    assert (caught.value.limit, caught.value.smallest) == (9, 10)
    assert cost_of(choose(sites, cost="params", limit=10)) == 10
    with pytest.raises(UnreachableLimitError):
        choose(sites, cost="params", limit=-1)


def test_no_sites():
    assert choose([], cost="params", limit=0) == {}
    with pytest.raises(UnreachableLimitError):
        choose([], cost="params", limit=-1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"form": "dense", "rank": 3}, "None for dense"),
        ({"rank": None}, "rank of at least 1"),
        ({"rank": 0}, "rank of at least 1"),
        ({"params": -1}, "params, macs, bytes and nanoseconds of at least 0"),
        ({"macs": -1}, "params, macs, bytes and nanoseconds of at least 0"),
        ({"bytes": -1}, "params, macs, bytes and nanoseconds of at least 0"),
        ({"loss": -0.1}, "finite loss"),
        ({"loss": math.inf}, "finite loss"),
        ({"loss": math.nan}, "finite loss"),
        ({"form": "dense", "rank": None, "loss": 0.1}, "0 for dense"),
    ],
)
def test_options_that_are_invalid(wrong, words):
    right = {"form": "gemm", "rank": 2, "params": 4, "macs": 4, "bytes": 16, "loss": 0.5}
    assert Option(**right).rank == 2
    with pytest.raises(ValueError, match=words):
        Option(**right | wrong)


def test_sites_that_are_invalid():
    for options in ((), (split(1, 1),), (split(1, 1), dense(4)), (dense(4), dense(5))):
        with pytest.raises(ValueError, match="site fc: expected dense first and then changes, but got"):
            SiteOptions(name="fc", options=options)
    with pytest.raises(ValueError, match="expected every site once, but got a twice"):
        choose([site("a", 3), site("b", 3), site("a", 3)], cost="params", limit=9)


def in_bits(cost, loss, bits):
    return Option(form="dense", rank=None, params=40, macs=40, bytes=cost, loss=loss, bits=bits)


def test_a_dense_weight_of_fewer_bits_is_a_change_with_a_loss():
    exact = dense(160)
    one = SiteOptions(name="s", options=(exact, in_bits(40, 0.1, 8), in_bits(20, 0.5, 4)))
    for limit, bits in ((160, 32), (159, 8), (40, 8), (39, 4), (20, 4)):
        assert choose([one], cost="bytes", limit=limit)["s"].bits == bits
    with pytest.raises(UnreachableLimitError):
        choose([one], cost="bytes", limit=19)
    assert smallest_cost([one], cost="bytes") == 20


def test_bits_are_spent_where_they_prevent_most():
    options = [(dense(160), in_bits(40, 0.0, 8), in_bits(20, loss, 4)) for loss in (0.1, 0.9)]
    sites = [SiteOptions(name=name, options=drawn) for name, drawn in zip("ab", options, strict=True)]
    chosen = choose(sites, cost="bytes", limit=60)
    assert {name: option.bits for name, option in chosen.items()} == {"a": 4, "b": 8}


@pytest.mark.parametrize(
    ("bits", "loss", "is_allowed"), [(8, 0.1, True), (8, 0.0, True), (32, 0.0, True), (32, 0.1, False)]
)
def test_only_the_dense_weight_as_it_is_loses_nothing(bits, loss, is_allowed):
    if is_allowed:
        assert in_bits(40, loss, bits).is_exact == (bits == 32)
        return
    with pytest.raises(ValueError, match="0 for dense"):
        in_bits(40, loss, bits)


def test_the_first_option_is_the_weight_as_it_is():
    for options in ((in_bits(40, 0.0, 8),), (dense(160), dense(160)), (dense(160), in_bits(40, 0, 8), dense(160))):
        with pytest.raises(ValueError, match="expected dense first"):
            SiteOptions(name="s", options=options)
