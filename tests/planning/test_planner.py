import pytest

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.sites import break_even_rank, site_name
from rsi_deploy.planning.planner import Planner, RankSpec

SITES = [("features.0", 64, 27), ("features.3", 128, 576), ("classifier", 10, 512)]


def planner(rank, **options):
    return Planner(spec=RankSpec.parse(rank), **options)


@pytest.mark.parametrize(
    ("text", "rank", "ratio"),
    [
        ("64", 64, None),
        (64, 64, None),
        (" 64 ", 64, None),
        ("+8", 8, None),
        ("40%", None, 0.4),
        (" 25 %", None, 0.25),
        ("12.5%", None, 0.125),
        (".5%", None, 0.005),
        ("100%", None, 1.0),
        (RankSpec(rank=3), 3, None),
    ],
)
def test_spellings(text, rank, ratio):
    assert RankSpec.parse(text) == RankSpec(rank=rank, ratio=ratio)


@pytest.mark.parametrize(
    ("text", "to_type"),
    [
        ("0.4", "--rank 40%"),
        (0.4, "--rank 40%"),
        (".125", "--rank 12.5%"),
        ("1.0", "--rank 100%"),
        ("64.0", "a rank such as 64"),
        ("-0.5", "a rank such as 64"),
        ("1.5e-1", "--rank 15%"),
        ("0", "at least 1"),
        ("-3", "at least 1"),
        ("0%", "in (0 %, 100 %]"),
        ("101%", "in (0 %, 100 %]"),
        ("-5%", "in (0 %, 100 %]"),
        ("1e3", "a rank such as 64 or a ratio such as 40%"),
        ("abc", "a rank such as 64 or a ratio such as 40%"),
        ("", "a rank such as 64 or a ratio such as 40%"),
        ("%", "a rank such as 64 or a ratio such as 40%"),
        (".", "a rank such as 64 or a ratio such as 40%"),
        ("nan%", "a rank such as 64 or a ratio such as 40%"),
        ("40%%", "a rank such as 64 or a ratio such as 40%"),
        ("6 4", "a rank such as 64 or a ratio such as 40%"),
        ("0x10", "a rank such as 64 or a ratio such as 40%"),
        (True, "a rank such as 64 or a ratio such as 40%"),
    ],
)
def test_refusals_say_what_to_type(text, to_type):
    with pytest.raises(UsageError) as caught:
        RankSpec.parse(text)
    assert to_type in str(caught.value)
    assert str(text) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["64", "40%", "12.5%", "100%"])
def test_a_spec_prints_as_it_is_typed(text):
    assert str(RankSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "out_features", "in_features", "rank"),
    [
        ("40%", 1000, 300, 120),
        ("40%", 300, 1000, 120),
        ("10%", 30, 99, 3),  # 0.1 * 30 is 3.0000000000000004 in some orders of evaluation; the rank is still 3
        ("10%", 31, 99, 4),
        ("7%", 100, 100, 7),  # 0.07 * 100 is 7.000000000000001
        ("29%", 100, 100, 29),
        ("1%", 10, 10, 1),
        ("0.0000000001%", 10, 10, 1),
        ("100%", 17, 40, 17),
        ("33.3%", 3, 3, 1),
        ("64", 10, 10, 64),
    ],
)
def test_resolve_rounds_up(text, out_features, in_features, rank):
    assert RankSpec.parse(text).resolve(out_features, in_features) == rank


def test_whole_percentages_of_whole_hundreds_are_exact():
    for percent in range(1, 101):
        assert RankSpec.parse(f"{percent}%").resolve(700, 900) == 7 * percent


@pytest.mark.parametrize(("out_features", "in_features"), [(10, 10), (7, 300), (512, 4608), (1, 5)])
def test_at_break_even_the_factors_have_as_many_parameters(out_features, in_features):
    limit = break_even_rank(out_features, in_features)
    assert limit * (out_features + in_features) == pytest.approx(out_features * in_features, rel=1e-12)
    for rank in range(1, min(out_features, in_features) + 1):
        saves = rank * (out_features + in_features) < out_features * in_features
        assert (planner(rank).decide("a", out_features, in_features).rank == rank) == saves


def test_a_site_that_saves_nothing_stays_dense_and_names_break_even():
    decision = planner(5).decide("a", 10, 10)  # exactly break-even
    assert decision.rank is None
    assert decision.reason == "rank 5 saves nothing: break-even is 5.0"
    assert planner(4).decide("a", 10, 10).rank == 4


def test_always_split_ignores_break_even_and_stops_at_full_rank():
    always = planner(64, always_split=True)
    assert always.decide("a", 10, 30).rank == 10
    assert always.decide("a", 100, 80).rank == 64
    assert "--always-split" in always.decide("a", 10, 30).reason
    assert planner("100%", always_split=True).decide("a", 33, 44).rank == 33


@pytest.mark.parametrize(
    ("include", "exclude", "split"),
    [
        ((), (), {"features.0", "features.3", "classifier"}),
        (("features.*",), (), {"features.0", "features.3"}),
        (("features.?", "classifier"), (), {"features.0", "features.3", "classifier"}),
        ((), ("classifier",), {"features.0", "features.3"}),
        (("features.*",), ("*.0",), {"features.3"}),
        (("*",), ("*",), set()),
        (("Features.*",), (), set()),
        (("features",), (), set()),
    ],
)
def test_filters(include, exclude, split):
    plan = planner(4, include=include, exclude=exclude)
    decisions = {name: plan.decide(name, out, in_) for name, out, in_ in SITES}
    assert {name for name, decision in decisions.items() if decision.rank} == split
    for name, decision in decisions.items():
        if name not in split:
            assert ("--exclude" in decision.reason) or ("--include" in decision.reason)


def test_filters_win_over_always_split():
    assert planner(4, exclude=("a",), always_split=True).decide("a", 9, 9).rank is None


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option):
    with pytest.raises(UsageError, match=rf"--{option} 'clasifier' matches none of the 3 sites \(features\.0, "):
        planner(4, **{option: ("features.*", "clasifier")}).check(SITES)


def test_a_rank_above_every_site_is_refused_and_one_that_fits_a_single_site_is_not():
    with pytest.raises(UsageError, match=r"--rank 129 is above the full rank of every site \(the largest is 128\)"):
        planner(129).check(SITES)
    planner(128).check(SITES)
    planner("100%").check(SITES)
    planner(64, include=("features.*",), exclude=("classifier",)).check(iter(SITES))


def test_an_absolute_rank_is_accepted_without_sites():
    assert planner(64).check([]) is None
    with pytest.raises(UsageError, match="above the full rank"):
        planner(64).check([("a", 8, 8)])


@pytest.mark.parametrize(
    ("weight", "name"),
    [("fc.weight", "fc"), ("attn.in_proj_weight", "attn.in_proj_weight"), ("weight.0.weight", "weight.0")],
)
def test_site_names(weight, name):
    assert site_name(weight) == name
