"""From what a user asks for (a rank, a budget, a plan) to a decision for every site.

    --rank R        every site that R makes smaller                        its usual form
    a budget        the options with the least loss that keep it           any form
    --plan FILE     what the file says

What a budget is on is measured on the model that the decisions give; where the estimate was off they are made again.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

import graph_passes as gp
from rsi_deploy.calibration.activations import CalibratedSite, Fitted, Form, ModelActivations, Replacement
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.sites import site_name
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.knapsack import Option, SiteOptions, choose, smallest_cost
from rsi_deploy.planning.plan_file import Plan, check_plan
from rsi_deploy.planning.planner import Decision, Filters, Planner, SitePlanner

Decisions = dict[str, Decision]

TRIES = 5
"""How often a budget is planned, each time knowing better what lies outside the sites."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Who decides every site, and what calibration has made of those that are split."""

    planner: SitePlanner
    fitted: Mapping[str, Fitted]


def uniform(planner: Planner, streams: ModelActivations) -> Decisions:
    """The same rank at every site that calibration reaches, in its usual form; the others stay dense."""
    decisions = {site.name: planner.decide(site.name, site.out_features, site.in_features) for site in streams.sites}
    return decisions | _out_of_reach(streams)


def under(
    budget: Budget,
    options: Sequence[SiteOptions],
    dense: Size,
    streams: ModelActivations,
    measure: Callable[[Decisions], int] | None = None,
) -> Decisions:
    """The options with the least loss that keep a budget.

    Args:
        budget: of the whole model.
        options: of every site that calibration reaches, dense first.
        dense: size of the whole dense model.
        streams: of the dense model.
        measure: what the model costs that these decisions give; without it the options' own costs are believed.

    Raises:
        ModelError: no plan can meet the budget, and which is the nearest; or the dense model keeps it.
    """
    total = total_of(budget, dense)
    allowed, smallest = budget.total(total), smallest_cost(options, cost=budget.cost)
    fixed = total - sum(getattr(site.options[0], budget.cost) for site in options)
    if total <= allowed:
        raise ModelError(f"{budget}: the dense model keeps it ({total:,} {budget.cost}); type a smaller budget")
    several = {site.name for site in options if len(site.options) > 1}
    offset, best = 0, None
    for _ in range(TRIES):
        room = allowed - fixed - offset
        choice = choose(options, cost=budget.cost, limit=max(room, smallest))
        estimate = fixed + sum(getattr(option, budget.cost) for option in choice.values())
        decisions = decisions_of(choice, several, streams)
        cost = estimate if measure is None else measure(decisions)
        if cost <= allowed:
            best = decisions
            if cost - estimate >= offset:
                break
            offset = cost - estimate
        elif best is not None or room <= smallest:
            break
        else:
            offset = max(offset + cost - allowed, cost - estimate)
    if best is None:
        raise budget.unreachable(total, cost)
    return best


def decisions_of(choice: Mapping[str, Option], several: Collection[str], streams: ModelActivations) -> Decisions:
    """The options as decisions, those out of reach dense; `several` names the sites that have any split to choose."""
    return {name: _decision(option, name in several) for name, option in choice.items()} | _out_of_reach(streams)


def total_of(budget: Budget, dense: Size) -> int:
    """What the whole dense model costs.

    Raises:
        ModelError: it costs nothing that could be counted.
    """
    total = {"params": dense.params, "macs": dense.macs, "bytes": dense.bytes}[budget.cost]
    if not total:
        raise ModelError(
            f"{budget}: this model has no {budget.cost} that could be counted; type --keep-params or --max-size "
            f"instead, in a sweep --by params"
        )
    return total


def refuse_uncounted(budget: Budget | None, dense: Size, uncounted: str) -> None:
    """Refuse a budget of MACs for a model whose MACs are not known to the last node.

    Args:
        budget: of the whole model; None where none is given.
        dense: size of the whole dense model.
        uncounted: the nodes whose MACs are not known, in words; "" where all are counted.

    Raises:
        ModelError: the budget cannot be held against the whole model; names the nodes.
    """
    if budget is None or budget.cost != "macs":
        return
    if uncounted:
        raise ModelError(
            f"{budget}: the MACs of {uncounted} are not known, so nobody could say whether the model keeps the budget; "
            f"type --keep-params or --max-size instead, in a sweep --by params"
        )
    total_of(budget, dense)


def from_plan(plan: Plan, sites: Iterable[gp.Site], filters: Filters) -> Decisions:
    """What a plan file says, held against the model's sites; what the filters do not let through stays dense.

    Raises:
        UsageError: the plan does not fit the model, or a glob matches nothing.
    """
    possible: dict[str, dict[str, int]] = {
        site_name(site.weight): {form: min(site.shape(form)) for form in site.forms} for site in reversed([*sites])
    }  # of the first node that uses a weight, as the report has it
    filters.check(list(possible))
    decisions = {}
    for name, site in check_plan(plan, possible.items()).items():
        refusal = filters.refusal(name)
        if refusal or site.form == "dense":
            decisions[name] = Decision(rank=None, reason=refusal or site.reason)
        else:
            reason = plan.sites[name].reason or "split"
            decisions[name] = Decision(rank=site.rank, reason=reason, form=site.form)
    return decisions


def wanted_splits(decisions: Mapping[str, Decision], streams: ModelActivations) -> dict[str, tuple[Form, int]]:
    """(form, rank) of the sites that are to be split, of those that calibration reaches."""
    return {
        site.name: (site.forms[0] if decision.form == "first" else decision.form, decision.rank)
        for site in streams.sites
        if (decision := decisions.get(site.name)) is not None and decision.rank is not None
    }


def blank(site: CalibratedSite, form: Form, rank: int) -> Fitted:
    """Factors of the size that those of a split will have, and no content: to measure a model before it is made."""
    rows, columns = site.shape(form)
    replacement = Replacement(
        form,
        torch.zeros(site.groups, rows, rank),
        torch.zeros(site.groups, rank, columns),
        torch.zeros(site.groups, site.out_features),
    )
    return Fitted(replacement=replacement, response_error=0.0, seconds=0.0)


def _decision(option: Option, has_splits: bool) -> Decision:
    if option.rank is not None:
        return Decision(rank=option.rank, reason=f"loss {option.loss:.1g}", form=cast(Form, option.form))
    return Decision(rank=None, reason="worth its size" if has_splits else "no rank saves anything")


def _out_of_reach(streams: ModelActivations) -> Decisions:
    return {name: Decision(rank=None, reason=reason) for name, reason in streams.unreachable.items()}
