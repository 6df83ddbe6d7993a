"""The ways to compress that are compared: which ranks a budget gives, and what the factors are fitted to.

    RSVD, RSI, exact SVD     the same ratio everywhere     the weight alone
    response-aware           the same                      each site's response in the dense network
    sequential               the same                      its response when the sites before it are compressed
    sensitivities            planned, any form or dense    the same, in the output's metric; what an export does

"The same ratio everywhere" is the largest whose model keeps the budget, in each operation's usual form (channel, for
Conv); output layers of at most `OUTPUTS` rows stay dense, where the baselines would do the most damage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from bench.cases import Case
from rsi_deploy.calibration.activations import CalibratedSite, FittedSite, ModelActivations
from rsi_deploy.calibration.als import product_of
from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import response_error
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.model_size import Size
from rsi_deploy.io.onnx_file import write_external
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.split import split_model
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Decisions, decide_by_budget, decide_uniformly, planned_splits, zero_filled
from rsi_deploy.planning.knapsack import SiteOptions
from rsi_deploy.planning.planner import Decision, FixedPlanner, Planner, RankSpec
from rsi_deploy.planning.site_options import Calibration

OUTPUTS = 10
BISECTIONS = 12
"""Ratios to a 4096th: finer than a rank, at any width here."""

Unit = Literal["MACs", "parameters", "linear parameters"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method under comparison; those that look at no calibration data are `drawn` once."""

    name: str
    fitted_to: Literal["weight", "dense network", "sequence"]
    planned: bool = False
    solver: Solver = field(default_factory=Solver)

    @property
    def drawn(self) -> bool:
        """Whether the arm uses calibration data."""
        return self.fitted_to != "weight"


PRODUCT = Arm(name="sensitivities", fitted_to="sequence", planned=True)
ARMS = (
    Arm(name="RSVD", fitted_to="weight", solver=Solver(method="rsvd")),
    Arm(name="RSI q=4", fitted_to="weight", solver=Solver(power_iterations=4, route="direct")),
    Arm(name="exact SVD", fitted_to="weight", solver=Solver(method="svd")),
    Arm(name="response-aware", fitted_to="dense network"),
    Arm(name="sequential", fitted_to="sequence"),
    PRODUCT,
)


def budget_of(unit: Unit, keep: float, dense: Size, streams: ModelActivations) -> Budget:
    """The budget of the whole model that keeps the share `keep` of its `unit`."""
    if unit == "MACs":
        return Budget(keep_macs=keep)
    if unit == "parameters":
        return Budget(keep_params=keep)
    return Budget(keep_params=1 - (1 - keep) * linear_parameters(streams) / dense.params)


def kept(unit: Unit, size: Size, dense: Size, streams: ModelActivations) -> float:
    """The share of the dense model's `unit` that a model of `size` has left."""
    if unit == "MACs":
        return size.macs / dense.macs
    return 1 - (dense.params - size.params) / (dense.params if unit == "parameters" else linear_parameters(streams))


def linear_parameters(streams: ModelActivations) -> int:
    """Numbers in the weights of all sites."""
    return sum(site.groups * site.out_features * site.in_features for site in streams.sites)


def same_ratio(case: Case, streams: ModelActivations, budget: Budget, dense: Size) -> Decisions:
    """The largest ratio for all sites whose model, as written, keeps the budget.

    Raises:
        ModelError: even the smallest ratio does not.
    """
    outputs = tuple(site.name for site in streams.sites if site.out_features <= OUTPUTS)
    allowed = budget.total(getattr(dense, budget.cost))
    low, high, best = 0.0, 1.0, None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        decisions = decide_uniformly(Planner(spec=RankSpec(ratio=ratio), exclude=outputs), streams)
        cost = cost_of(case, streams, decisions, budget)
        if cost <= allowed:
            low, best = ratio, decisions
        else:
            high = ratio
    if best is None:
        raise ModelError(f"{case.name}: no uniform ratio keeps {budget}; the smallest comes to {cost:,} {budget.cost}")
    return best


def planned(
    case: Case, streams: ModelActivations, options: Sequence[SiteOptions], budget: Budget, dense: Size
) -> Decisions:
    """Return what an export decides under the budget from the options of all sites."""
    return decide_by_budget(
        budget, options, dense, streams, lambda decisions: cost_of(case, streams, decisions, budget)
    )


def cost_of(case: Case, streams: ModelActivations, decisions: Decisions, budget: Budget) -> int:
    """Return the cost of the model with these decisions in the unit of the budget, measured on the written file."""
    sites = {site.name: site for site in streams.sites}
    empty = {name: zero_filled(sites[name], *split) for name, split in planned_splits(decisions, streams).items()}
    size = case.measured(write(case, decisions, empty, Solver(), case.path.with_name("candidate.onnx")))
    cost: int = getattr(size, budget.cost)
    return cost


def factors(
    arm: Arm, calibration: Calibration, streams: ModelActivations, decisions: Decisions
) -> dict[str, FittedSite]:
    """Return the fitted factors of the sites to split; nothing for an arm that looks at the weight alone."""
    wanted = planned_splits(decisions, streams)
    if arm.fitted_to == "weight":
        return {}
    if not arm.planned:  # as published: no metric of the output, one ridge
        calibration = replace(calibration, use_gradients=False, cross_validate=False, scarcity=0.0)
    if arm.fitted_to == "sequence":
        return calibration.fit(streams, wanted)
    made: dict[str, FittedSite] = {}

    def visit(site: CalibratedSite, moments: Moments | Samples) -> None:
        if site.name in wanted and moments.varies:
            replacement = calibration.replacement(site, moments, *wanted[site.name])
            error = response_error(product_of(site, replacement), moments)
            made[site.name] = FittedSite(replacement=replacement, response_error=error, seconds=0.0)

    streams.survey(visit)
    return made


def write(case: Case, decisions: Decisions, fitted: Mapping[str, FittedSite], solver: Solver, path: Path) -> Path:
    """Write the compressed model; fitted sites that calibration declined stay dense."""
    if fitted:
        declined = {name: Decision(rank=None, reason="declined") for name in decisions.keys() - fitted.keys()}
        decisions = decisions | declined
    model = ir.load(case.path)
    split_model(model, FixedPlanner(decisions=decisions), solver, fitted=fitted, joint=False)
    write_external(model, path)
    return path
