import pytest

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.plan_file import Plan
from rsi_deploy.planning.planner import RankSpec
from rsi_deploy.planning.request import RankRequest

RANK = {"rank": RankSpec.parse("25%")}
BUDGET = {"budget": Budget(keep_macs=0.5), "calib": "c.npz"}
PLAN = {"plan": Plan(tool="", sites={}), "plan_name": "mine.json"}
DROP = {"max_drop": 1.0, "calib": "c.npz"}


@pytest.mark.parametrize(
    ("given", "decided_by", "searched", "fitted"),
    [
        (RANK, "", False, False),
        (RANK | {"calib": "c.npz"}, "", False, True),
        (RANK | {"calib": "c.npz", "factors": "weights"}, "", False, False),
        (BUDGET, "--keep-macs 50%", True, True),
        (BUDGET | {"factors": "weights", "min_rank": 4, "rank_multiple": 8}, "--keep-macs 50%", True, False),
        (PLAN, "--plan mine.json", False, False),
        (DROP, "--max-drop 1", True, True),
    ],
)
def test_what_decides(given, decided_by, searched, fitted):
    request = RankRequest(**given)
    assert (request.decided_by, request.is_searched, request.is_fitted) == (decided_by, searched, fitted)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "but got none"),
        (RANK | BUDGET, "but got --rank and --keep-macs;"),
        (BUDGET | PLAN | DROP, "but got --keep-macs and --plan and --max-drop"),
        (BUDGET | {"calib": None}, "--keep-macs is planned on calibration data: add --calib DATA"),
        (DROP | {"calib": None}, "--max-drop is planned on calibration data: add --calib DATA"),
        (RANK | {"min_rank": 2}, "--min-rank holds ranks that a budget chooses, but got --rank; leave --min-rank out"),
        (PLAN | {"rank_multiple": 8}, "--rank-multiple holds ranks that a budget chooses, but got --plan"),
    ],
)
def test_contradictions(given, words):
    with pytest.raises(UsageError) as caught:
        RankRequest(**given)
    assert words in str(caught.value)


def test_what_goes_with_nothing_else():
    RankRequest(**DROP).check_against(data="d.npz", always_split=False)
    RankRequest(**RANK).check_against(data=None, always_split=True)
    with pytest.raises(UsageError, match="--max-drop is measured on labelled data: add --data DATA"):
        RankRequest(**DROP).check_against(data=None, always_split=False)
    for given, option in ((BUDGET, "--keep-macs"), (PLAN, "--plan"), (DROP, "--max-drop")):
        with pytest.raises(UsageError, match=f"--always-split goes with --rank alone, but got {option}; leave it out"):
            RankRequest(**given).check_against(data="d.npz", always_split=True)


def test_a_rank_and_an_error_are_two_answers():
    def decided(**settings):
        return str(RankRequest.of(ExportConfig.of(**settings)).rank)

    assert decided(rank=8) == decided(rank=RankSpec(rank=8)) == "8"
    assert decided(rank="auto", max_error="5%") == decided(max_error="5%") != decided(max_error="1.1x")
    with pytest.raises(UsageError, match="exactly one of --rank and --max-error"):
        decided(rank=8, max_error="5%")
    with pytest.raises(UsageError, match="but got none"):
        decided()
