import pytest

from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.evaluation.intervals import share_at_least
from rsi_deploy.planning.quality import QualityBudget, parse_quality
from rsi_deploy.planning.request import RankRequest


def request(**settings):
    return RankRequest.of(ExportConfig.of(calib="c.npz", **settings))


def test_the_limit_counts_and_not_the_value():
    quality = OutputQuality(
        samples=300, output_error=0.02, output_error_at_most=0.04, agreement=99.0, agreement_at_least=97.4,
        cosine=0.99, cosine_at_least=0.985, data_fingerprint="",
    )  # fmt: skip
    for measure, good, bad in (("agreement", 0.97, 0.98), ("cosine", 0.98, 0.99), ("output_error", 0.05, 0.03)):
        for limit, holds in ((good, True), (bad, False)):
            budget = QualityBudget(measure=measure, limit=limit)
            assert budget.holds(budget.limit_of(quality)) is holds
    assert not QualityBudget(measure="cosine", limit=0.1).holds(None)


def test_a_perplexity_must_stay_below_its_limit_for_sure():
    quality = OutputQuality(
        samples=64, output_error=0.1, perplexity=20.0, perplexity_at_most=21.0, perplexity_ratio=1.02,
        perplexity_ratio_at_most=1.07, data_fingerprint="",
    )  # fmt: skip
    for good, bad in (("+7%", "+6%"), ("21", "20.5")):
        for text, holds in ((good, True), (bad, False)):
            budget = QualityBudget.of_perplexity(text)
            assert budget.holds(budget.limit_of(quality)) is holds
            assert (budget.excess(budget.limit_of(quality)) > 0) is not holds
    assert QualityBudget.of_perplexity("+0%").excess(1.01) > 5
    assert not QualityBudget.of_perplexity("25").holds(None)


@pytest.mark.parametrize("limit", [0.5, 0.9, 0.97, 0.99, 0.995])
def test_so_many_samples_show_the_share_and_one_less_does_not(limit):
    needed = QualityBudget(measure="agreement", limit=limit).needed
    assert share_at_least(needed, needed) >= 100 * limit - 1e-9
    assert share_at_least(needed - 1, needed - 1) < 100 * limit


def test_the_wished_samples_allow_two_other_answers():
    for limit in (0.9, 0.97, 0.99):
        budget = QualityBudget(measure="agreement", limit=limit)
        assert share_at_least(budget.check_size(0) - 2, budget.check_size(0)) >= 100 * limit
        assert budget.check_size(10) == budget.check_size(0) < budget.check_size(10**6) <= 4 * budget.needed + 1


@pytest.mark.parametrize(
    ("settings", "decided_by"),
    [
        ({"min_agreement": "98%"}, "--min-agreement 98%"),
        ({"min_agreement": 0.985, "fastest": True}, "--min-agreement 98.5% --fastest"),
        ({"min_cosine": 0.98}, "--min-cosine 0.98"),
        ({"min_cosine": "98%"}, "--min-cosine 0.98"),
        ({"max_perplexity": "+5%"}, "--max-perplexity +5%"),
        ({"max_perplexity": "+0.50%", "fastest": True}, "--max-perplexity +0.5% --fastest"),
        ({"max_perplexity": 25}, "--max-perplexity 25"),
        ({"max_output_error": "3%"}, "--max-output-error 3%"),
        ({"max_output_error": 0.03}, "--max-output-error 3%"),
        ({"min_agreement": 0.98, "max_output_error": 0.03}, "--min-agreement 98%"),
    ],
)
def test_what_decides(settings, decided_by):
    found = request(**settings)
    assert (found.decided_by, found.is_searched, found.needs_quality) == (decided_by, True, False)
    option, _, value = decided_by.partition(" ")
    assert parse_quality(option, value.partition(" ")[0]) == found.quality


def test_beside_another_size_the_error_is_a_gate():
    for settings in ({"rank": 4}, {"keep_macs": 0.5}, {"max_drop": 1}):
        assert request(max_output_error=0.03, **settings).quality is None
    assert request(max_output_error=0.03).is_limited_by_error


def test_calibration_data_alone_let_the_outputs_choose():
    found = request()
    assert found.needs_quality
    assert found.is_searched
    assert all(option in found.decided_by for option in ("--min-agreement 99%", "--min-cosine 0.99", "error 1%"))
    assert not request(rank=4).needs_quality


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_agreement": 0.9, "min_cosine": 0.9}, "--min-agreement and --min-cosine"),
        ({"min_agreement": 0.9, "keep_macs": 0.5}, "but got --keep-macs and --min-agreement"),
        ({"min_agreement": "0%"}, "--min-agreement"),
        ({"min_agreement": 98}, "write --min-agreement 98%"),
        ({"max_perplexity": "+5%", "min_agreement": 0.9}, "--max-perplexity"),
        ({"max_perplexity": "+5%", "keep_macs": 0.5}, "but got --keep-macs and --max-perplexity"),
        ({"max_perplexity": "5%"}, "write --max-perplexity +5%"),
        ({"max_perplexity": "+5"}, "write --max-perplexity +5%"),
        ({"max_perplexity": "-5%"}, "write --max-perplexity +5%"),
        ({"max_perplexity": "0.5"}, "no perplexity is below 1"),
        ({"max_output_error": -1}, "--max-output-error must be at least 0"),
        ({"keep_macs": 0.5, "fastest": True}, "--fastest goes with --max-perplexity, --min-agreement"),
        ({"min_agreement": 0.9, "allow_broken": True}, "--allow-broken goes with a budget"),
        ({"rank": 4, "allow_broken": True}, "--allow-broken goes with a budget"),
    ],
)
def test_what_contradicts_itself(settings, words):
    with pytest.raises(UsageError) as caught:
        request(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_agreement": 0.9}, "--min-agreement is planned on calibration data: add --calib DATA"),
        ({"max_output_error": 0.1}, "--max-output-error is planned on calibration data: add --calib DATA"),
        ({"rank": 4, "check_size": 100}, "--check-size is a part of --calib"),
        ({"fastest": True}, "but got none"),
    ],
)
def test_what_needs_calibration_data(settings, words):
    with pytest.raises(UsageError) as caught:
        RankRequest.of(ExportConfig.of(**settings))
    assert words in str(caught.value)
