import re

import numpy as np
import onnx_ir as ir
import pytest
from calibrated_nets import branch_net, conv_net

import graph_passes as gp
from rsi_deploy import export, read_report
from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import (
    decide_by_budget,
    decide_by_plan,
    decide_uniformly,
    planned_splits,
    total_of,
    zero_filled,
)
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.planning.plan_file import Plan, PlannedSite, read_plan
from rsi_deploy.planning.planner import Decision, Filters, Planner, RankSpec
from rsi_deploy.report.report_plan import plan_of

DENSE = Size(bytes=4000, params=1000, macs=2000)
REASON = "2 nodes share its weight"


class Known:
    """The part of `ModelActivations` that planning uses."""

    def __init__(self, sites=(), unreachable=None):
        self.sites = tuple(sites)
        self.unreachable = unreachable or {}


def site(name, out=20, into=10, **more):
    given = {"kind": "Gemm", "groups": 1, "forms": ("gemm",), "load": lambda: None} | more
    return CalibratedSite(name=name, out_features=out, in_features=into, **given)


def options(name, *ranks, dense=200, step=30):
    """Rank r costs `step * r` in everything and loses 1 / r."""
    return SiteOptions(
        name=name,
        options=(
            Option(form="dense", rank=None, params=dense, macs=dense, bytes=dense, loss=0.0),
            *(Option(form="gemm", rank=r, params=step * r, macs=step * r, bytes=step * r, loss=1 / r) for r in ranks),
        ),
    )


SITES = [options("a", 1, 2, 4), options("b", 1, 2, 4), options("never")]
"""600 of the 1,000 parameters, of which 60 + 200 are the least."""


def ranks(decisions):
    return {name: decision.rank for name, decision in decisions.items()}


# -- one rank everywhere


def test_uniform_ranks_and_unreachable_sites():
    planner = Planner(spec=RankSpec.parse("40%"), exclude=("c",))
    activations = Known([site("a"), site("b", 4, 4), site("c")], {"d": REASON})
    assert decide_uniformly(planner, activations) == {
        "a": Decision(rank=4, reason="split"),
        "b": Decision(rank=None, reason="rank 2 saves nothing: break-even is 2.0"),
        "c": Decision(rank=None, reason="excluded by --exclude c"),
        "d": Decision(rank=None, reason=REASON),
    }


# -- budgets


def test_a_budget_takes_the_options_of_least_loss():
    decisions = decide_by_budget(Budget(keep_params=0.8), SITES, DENSE, Known(unreachable={"far": REASON}))
    assert ranks(decisions) == {"a": 4, "b": 2, "never": None, "far": None}
    assert decisions["never"].reason == "no rank saves anything"
    assert decisions["far"].reason == REASON
    assert decisions["a"] == Decision(rank=4, reason="loss 0.2", form="gemm")


def test_a_site_that_stays_dense_has_a_reason():
    decisions = decide_by_budget(Budget(keep_params=0.92), SITES, DENSE, Known())
    assert sorted(d.reason for d in decisions.values()) == ["loss 0.2", "no rank saves anything", "worth its size"]


def test_each_budget_limits_its_own_cost():
    for budget in (Budget(keep_params=0.8), Budget(keep_macs=0.9), Budget(max_size=3800)):  # each leaves 400
        assert ranks(decide_by_budget(budget, SITES, DENSE, Known())) == {"a": 4, "b": 2, "never": None}, budget
    with pytest.raises(ModelError, match="--keep-params or --max-size"):
        total_of(Budget(keep_macs=0.5), DENSE.model_copy(update={"macs": 0}))


def cost_with(extra):
    """Measures 400 outside the sites, and `extra` at every split one."""

    def measure(decisions):
        measured.append(ranks(decisions))
        found = 400 + sum({None: 200, 1: 30, 2: 60, 4: 120}[d.rank] for d in decisions.values())
        return found + extra * sum(d.rank is not None for d in decisions.values())

    measured = []
    return measure, measured


@pytest.mark.parametrize("extra", [0, 7, 25, 45])
@pytest.mark.parametrize("allowed", [750, 760, 800, 850, 900])
def test_the_measured_cost_meets_the_budget_even_if_the_estimate_is_wrong(extra, allowed):
    measure, measured = cost_with(extra)
    decisions = decide_by_budget(Budget(keep_params=allowed / 1000), SITES, DENSE, Known(), measure)
    assert measure(decisions) <= allowed
    assert len(measured) <= 6


def test_a_too_large_estimate_is_corrected():
    believed = decide_by_budget(Budget(keep_params=0.70), SITES, DENSE, Known())
    measure, _ = cost_with(-30)  # every split costs less than its estimate
    known = decide_by_budget(Budget(keep_params=0.70), SITES, DENSE, Known(), measure)
    assert measure(known) <= 700
    assert sum(ranks(known)[n] or 9 for n in "ab") > sum(ranks(believed)[n] or 9 for n in "ab")


@pytest.mark.parametrize("extra", [0, 10])
def test_an_unreachable_budget_names_the_nearest_measured_one(extra):
    measure, _ = cost_with(extra)
    with pytest.raises(ModelError) as caught:
        decide_by_budget(Budget(keep_params=0.5), SITES, DENSE, Known(), measure)
    nearest = 400 + 60 + 200 + 2 * extra
    assert f"the smallest comes to {nearest} parameters" in str(caught.value)
    typed = float(re.search(r"type --keep-params ([\d.]+)%", str(caught.value))[1])
    assert measure(decide_by_budget(Budget(keep_params=typed / 100), SITES, DENSE, Known(), measure)) == nearest


def test_a_budget_that_needs_no_plan():
    for budget in (Budget(keep_params=1.0), Budget(max_size=4000), Budget(max_size=10**9)):
        with pytest.raises(
            ModelError, match=r"the dense model keeps it \([\d,]+ (params|bytes)\); type a smaller budget"
        ):
            decide_by_budget(budget, SITES, DENSE, Known())


# -- plans


def graph_sites(path):
    return [entry for entry in gp.find_sites(ir.load(path)) if isinstance(entry, gp.Site)]


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    return graph_sites(conv_net(tmp_path_factory.mktemp("net") / "m.onnx"))


def plan(**sites):
    return Plan(tool="", sites={name: PlannedSite(**values) for name, values in sites.items()})


def test_a_plan_decides_every_site(sites):
    written = plan(
        conv1={"form": "separable", "rank": 3},
        conv2={"form": "dense", "reason": "it is fast already"},
        head={"form": "gemm", "rank": 2, "reason": "why not"},
    )
    assert decide_by_plan(written, sites, Filters()) == {
        "conv1": Decision(rank=3, reason="split", form="separable"),
        "conv2": Decision(rank=None, reason="it is fast already"),
        "grouped": Decision(rank=None, reason="not in the plan"),
        "head": Decision(rank=2, reason="why not", form="gemm"),
    }
    filtered = decide_by_plan(written, sites, Filters(include=("conv*",), exclude=("conv1",)))
    assert filtered["conv1"] == Decision(rank=None, reason="excluded by --exclude conv1")
    assert filtered["head"] == Decision(rank=None, reason="not matched by --include")
    with pytest.raises(UsageError, match="--exclude 'nothing' matches none of the 4 sites"):
        decide_by_plan(written, sites, Filters(exclude=("nothing",)))


def test_the_largest_ranks_are_those_of_the_forms(sites):
    largest = {"channel": 24, "input": 3, "separable": 9}  # of 24 x 3 x 3 x 3
    for form, rank in largest.items():
        assert decide_by_plan(plan(conv1={"form": form, "rank": rank}), sites, Filters())["conv1"].rank == rank
        with pytest.raises(UsageError, match=f"cannot have rank {rank + 1}"):
            decide_by_plan(plan(conv1={"form": form, "rank": rank + 1}), sites, Filters())


def test_a_report_becomes_a_plan_that_gives_it_again(tmp_path):
    model = branch_net(tmp_path / "m.onnx")
    report = export(str(model), tmp_path / "b", rank="25%", exclude=["head"], measure=False)
    made = plan_of(report)
    assert made == read_plan(tmp_path / "b" / "plan.json")
    assert made.source_hash == read_report(tmp_path / "b").source.hash
    assert made.sites["fc"] == PlannedSite(form="gemm", rank=4)  # without a reason, which would become outdated
    assert made.sites["head"] == PlannedSite(form="dense", reason="excluded by --exclude head")
    again = export(str(model), tmp_path / "c", plan=tmp_path / "b" / "plan.json", measure=False)
    assert [(s.name, s.form, s.rank) for s in again.sites] == [(s.name, s.form, s.rank) for s in report.sites]
    assert (tmp_path / "c" / "plan.json").read_text() == (tmp_path / "b" / "plan.json").read_text()


# -- splits and zero-filled factors


def test_planned_splits_are_those_that_calibration_reaches():
    activations = Known([site("a", forms=("channel", "input")), site("b"), site("c")], {"d": REASON})
    decisions = {
        "a": Decision(rank=3, reason="split"),
        "b": Decision(rank=2, reason="split", form="gemm"),
        "c": Decision(rank=None, reason="dense"),
        "d": Decision(rank=5, reason="split"),
    }
    assert planned_splits(decisions, activations) == {"a": ("channel", 3), "b": ("gemm", 2)}


@pytest.mark.parametrize("form", ["channel", "input", "separable"])
def test_zero_filled_factors_have_the_size_of_real_ones(form):
    conv = site(
        "conv", 8, 36, kind="Conv", groups=2, kernel=(3, 3), strides=(1, 1), forms=("channel", "input", "separable")
    )
    made = zero_filled(conv, form, 2).replacement
    assert made.left.numel() + made.right.numel() == conv.split_params(form, 2)
    assert made.bias.shape == (2, 8)
    assert not np.any(made.left.numpy())
