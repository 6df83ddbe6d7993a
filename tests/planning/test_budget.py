import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.units import parse_nanoseconds
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.knapsack import Option, SiteOptions, UnreachableLimitError, choose, smallest_cost


def test_a_budget_is_exactly_one_of_three():
    assert Budget.parse(keep_params="50%") == Budget(keep_params=0.5)
    assert Budget.parse(keep_macs=0.25) == Budget(keep_macs=0.25)
    assert Budget.parse(max_size="20MB") == Budget(max_size=20_000_000)
    assert [Budget(keep_params=1.0).cost, Budget(keep_macs=1.0).cost, Budget(max_size=1).cost] == [
        "params",
        "macs",
        "bytes",
    ]
    with pytest.raises(UsageError, match="exactly one of .*, but got none of them"):
        Budget()
    with pytest.raises(UsageError, match="but got --keep-params and --max-size"):
        Budget.parse(keep_params="0.5", max_size="1MB")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keep_params": 0.0}, r"--keep-params must lie in \(0, 1\], but got 0.0"),
        ({"keep_params": 50.0}, r"--keep-params must lie in \(0, 1\], but got 50.0"),
        ({"keep_macs": 1.1}, r"--keep-macs must lie in \(0, 1\], but got 1.1"),
        ({"keep_macs": float("nan")}, r"--keep-macs must lie in \(0, 1\], but got nan"),
        ({"max_size": 0}, "--max-size must be at least 1 byte, but got 0"),
    ],
)
def test_budgets_that_are_invalid(wrong, words):
    with pytest.raises(UsageError, match=words):
        Budget(**wrong)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--keep-params", "50%"),
        ("--keep-params", "100%"),
        ("--keep-macs", "12.5%"),
        ("--keep-macs", "0.001%"),
        ("--max-size", "20MB"),
        ("--max-size", "20MiB"),
        ("--max-size", "3GB"),
        ("--max-size", "1234567"),
    ],
)
def test_a_budget_prints_as_it_is_typed(option, text):
    assert str(Budget.parse(**{option[2:].replace("-", "_"): text})) == f"{option} {text}"


@given(st.floats(1e-9, 1) | st.integers(1, 10**12))
@example(0.1 + 0.2)
@example(1e-9)
def test_a_printed_budget_can_be_parsed(value):
    budget = Budget(max_size=value) if isinstance(value, int) else Budget(keep_macs=value)
    option, text = str(budget).split()
    assert Budget.parse(**{option[2:].replace("-", "_"): text}) == budget


def test_the_share_is_of_the_whole_model():
    # 1000 parameters, 100 of them in no site: half of the model leaves 400 for the sites, not 450.
    assert Budget(keep_params=0.5).limit(1000, 100) == 400
    assert Budget(keep_macs=0.5).limit(1000, 0) == 500
    assert Budget(max_size=700).limit(1000, 100) == 600
    assert Budget(max_size=5000).limit(1000, 100) == 4900
    assert Budget(keep_params=1.0).limit(1000, 100) == 900


def test_whole_percentages_of_whole_hundreds_are_exact():
    for percent in range(1, 101):
        assert Budget.parse(keep_params=f"{percent}%").total(700) == 7 * percent
    assert Budget(keep_params=0.5).total(7) == 3
    assert Budget(keep_params=0.999999999).total(10**18) == 999999999 * 10**9


@pytest.mark.parametrize(
    ("budget", "nearest", "message"),
    [
        (
            Budget(keep_params=0.1),
            312,
            "no plan can meet --keep-params 10% (100 of 1,000 parameters): the smallest comes to 312 parameters; "
            "type --keep-params 31.2% or more, or let more sites be split (--include, --exclude)",
        ),
        (Budget(keep_macs=0.3), 301, "the smallest comes to 301 MACs a sample; type --keep-macs 30.1% or more"),
        (Budget(max_size=200), 300, "no plan can meet --max-size 200B (200 bytes): the smallest comes to 300 bytes"),
        (Budget(max_size=200), 12_345_678, "12,345,678 bytes; type --max-size 12.4MB or more"),
    ],
)
def test_a_budget_that_no_plan_meets_names_the_nearest(budget, nearest, message):
    with pytest.raises(ModelError) as caught:
        budget.limit(1000, nearest - 20, smallest=20)
    assert message in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_fixed_cost_above_the_budget_is_refused():
    assert Budget(keep_params=0.3).limit(1000, 300) == 0
    with pytest.raises(ModelError, match="type --keep-params 30.1% or more"):
        Budget(keep_params=0.3).limit(1000, 301)


@given(st.integers(1, 10**9), st.data())
def test_the_budget_in_the_message_can_be_met_and_is_near(dense_total, data):
    nearest = data.draw(st.integers(1, dense_total))
    for option, budget in (("keep_params", Budget(keep_params=1e-12)), ("max_size", Budget(max_size=1))):
        typed = re.search(r"type --[a-z-]+ (\S+) or more", str(budget.unreachable(dense_total, nearest)))[1]
        total = Budget.parse(**{option: typed}).total(dense_total)
        # A tenth of a percent, or a tenth of a unit, above it at most.
        assert nearest <= total <= nearest + (dense_total / 1000 if option == "keep_params" else nearest / 10)


def test_with_the_knapsack():
    dense = Option(form="dense", rank=None, params=100, macs=100, bytes=400, loss=0.0)
    split = Option(form="gemm", rank=2, params=40, macs=40, bytes=160, loss=0.5)
    sites = [SiteOptions(name=name, options=(dense, split)) for name in "ab"]
    smallest = smallest_cost(sites, cost="params")
    met = Budget(keep_params=0.5)
    chosen = choose(sites, cost=met.cost, limit=met.limit(220, 20, smallest=smallest))
    assert 20 + sum(option.params for option in chosen.values()) <= 110
    missed = Budget(keep_params=0.45)
    with pytest.raises(
        ModelError, match=r"99 of 220 parameters\): the smallest comes to 100 .* type --keep-params 45.5%"
    ):
        missed.limit(220, 20, smallest=smallest)
    with pytest.raises(UnreachableLimitError) as caught:
        choose(sites, cost=missed.cost, limit=missed.limit(220, 20))
    assert "comes to 100 parameters" in str(missed.unreachable(220, 20 + caught.value.smallest))


@pytest.mark.parametrize(
    ("text", "nanoseconds"), [("25ms", 25_000_000), ("1.5 us", 1500), ("2s", 2 * 10**9), (".5ms", 500_000)]
)
def test_times_of_a_call(text, nanoseconds):
    assert parse_nanoseconds(text, "--max-latency") == nanoseconds
    assert Budget.parse(max_latency=text) == Budget(max_latency=nanoseconds)
    assert Budget.parse(max_latency=str(Budget(max_latency=nanoseconds)).split()[1]).max_latency == nanoseconds


def test_budgets_of_time_are_of_the_dense_models_time():
    assert Budget(keep_latency=0.6).cost == Budget(max_latency=7).cost == "nanoseconds"
    assert Budget(keep_latency=0.6).total(1000) == 600
    assert Budget(max_latency=700).total(1000) == 700
    assert str(Budget(keep_latency=0.6)) == "--keep-latency 60%"
    for budget in (Budget(keep_latency=0.6), Budget(max_latency=600)):
        message = str(budget.unreachable(1_000_000, 700_001))
        assert "the fastest takes 0.7ms of the dense model's 1ms (70.1 %)" in message
    assert "type --max-latency 0.701ms or more" in message
    with pytest.raises(UsageError, match="in \\(0, 1\\]"):
        Budget(keep_latency=1.5)
