"""Decide the rank and form of every site from a rank, a budget or a plan file.

    --rank R        the same rank at every site that becomes smaller, in its usual form
    a budget        the options of least loss within the budget, in any form
    --plan FILE     the decisions in the file

The size that a budget limits is measured on a candidate model. If the estimate was wrong, the decisions are made again.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

import graph_passes as gp
from graph_passes.forms import FOLDED, Form, kept_columns, largest_rank
from rsi_deploy.calibration.activations import CalibratedSite, FittedSite, ModelActivations, Replacement
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.sites import site_name
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.knapsack import Option, SiteOptions, choose, smallest_cost, total_cost
from rsi_deploy.planning.plan_file import Plan, check_plan
from rsi_deploy.planning.planner import Decision, Filters, Planner, SitePlanner

Decisions = dict[str, Decision]

TRIES = 5
"""Largest number of plans for a budget; each corrects the estimate of the size outside the sites."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The decisions for all sites, and the fitted factors of those that are split."""

    planner: SitePlanner
    fitted: Mapping[str, FittedSite]


def decide_uniformly(planner: Planner, activations: ModelActivations) -> Decisions:
    """Decide the same rank for every site that calibration reaches, in its usual form. Other sites stay dense."""
    decisions = {
        site.name: planner.decide(site.name, site.out_features, site.in_features) for site in activations.sites
    }
    return decisions | _out_of_reach(activations)


def decide_by_budget(
    budget: Budget,
    options: Sequence[SiteOptions],
    dense: Size,
    activations: ModelActivations,
    measure: Callable[[Decisions], int] | None = None,
) -> Decisions:
    """Choose the options of least loss within a budget.

    Args:
        budget: budget of the whole model.
        options: options of every site that calibration reaches.
        dense: size of the whole dense model.
        activations: activations of the dense model.
        measure: function that returns the measured cost of a model with these decisions; None to estimate it.

    Raises:
        ModelError: no plan meets the budget (the message names the nearest one), or the dense model meets it.
    """
    total = total_of(budget, dense)
    allowed, smallest = budget.total(total), smallest_cost(options, cost=budget.cost)
    fixed = total - sum(getattr(site.options[0], budget.cost) for site in options)
    if total <= allowed:
        raise ModelError(f"{budget}: the dense model keeps it ({total:,} {budget.cost}); type a smaller budget")
    splittable = {site.name for site in options if len(site.options) > 1}
    offset, best = 0, None
    for _ in range(TRIES):
        room = allowed - fixed - offset
        choice = choose(options, cost=budget.cost, limit=max(room, smallest))
        estimate = fixed + total_cost(options, choice, cost=budget.cost)
        decisions = decisions_of(choice, splittable, activations)
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


def decisions_of(choice: Mapping[str, Option], splittable: Collection[str], activations: ModelActivations) -> Decisions:
    """Turn options into decisions. `splittable` names the sites with a split among their options."""
    return {name: _decision(option, name in splittable) for name, option in choice.items()} | _out_of_reach(activations)


def total_of(budget: Budget, dense: Size) -> int:
    """Return the cost of the whole dense model, in the unit of the budget.

    Raises:
        ModelError: the cost is zero, so a budget makes no sense.
    """
    total = {"params": dense.params, "macs": dense.macs, "bytes": dense.bytes}[budget.cost]
    if not total:
        raise ModelError(
            f"{budget}: this model has no {budget.cost} to count; type --keep-params or --max-size "
            f"instead, in a sweep --by params"
        )
    return total


def refuse_uncounted(budget: Budget | None, dense: Size, uncounted: str) -> None:
    """Refuse a budget of MACs if the MACs of some nodes are unknown.

    Args:
        budget: budget of the whole model, or None.
        dense: size of the whole dense model.
        uncounted: description of the nodes with unknown MACs; "" if there are none.

    Raises:
        ModelError: the budget is on MACs and some are unknown; the message names the nodes.
    """
    if budget is None or budget.cost != "macs":
        return
    if uncounted:
        raise ModelError(
            f"{budget}: the MACs of {uncounted} are not known, so this budget cannot be checked; "
            f"type --keep-params or --max-size instead, in a sweep --by params"
        )
    total_of(budget, dense)


def decide_by_plan(plan: Plan, sites: Iterable[gp.Site], filters: Filters, unsplit: Collection[str] = ()) -> Decisions:
    """Check a plan against the model's sites and return its decisions. Sites that the filters exclude stay dense.

    Args:
        plan: the plan.
        sites: the model's sites.
        filters: sites that may be split.
        unsplit: names of weights that are no sites; a plan may list them as dense.

    Raises:
        UsageError: the plan does not fit the model, or a glob matches nothing.
    """
    sites = list(sites)
    possible: dict[str, dict[str, int]] = {
        site_name(site.weight): {form: largest_rank(form, *site.shape(form)) for form in site.forms}
        for site in reversed(sites)
    }  # reversed, so that the first node that uses a weight wins, as in the report
    filters.check(list(possible))
    others: dict[str, dict[str, int]] = {name: {} for name in unsplit if name not in possible}
    decisions = {name: Decision(rank=None, reason="as the plan says", bits=bits) for name, bits in plan.tables.items()}
    for name, site in check_plan(plan, (possible | others).items()).items():
        if name in others:
            continue
        refusal, bits, repair = filters.refusal(name), site.bits or 32, site.repair or 0
        if refusal or site.form == "dense":
            decisions[name] = Decision(rank=None, reason=refusal or site.reason, bits=bits, repair=repair)
        else:
            reason = plan.sites[name].reason or "split"
            decisions[name] = Decision(rank=site.rank, reason=reason, form=site.form, bits=bits, repair=repair)
    for site_ in sites:
        _check_units(site_, decisions)
    return decisions


def refuse_units(decisions: Decisions) -> None:
    """Refuse forms that need calibration data, where there are none.

    Raises:
        UsageError: names the site.
    """
    found = [name for name, decision in decisions.items() if decision.form in FOLDED]
    if found:
        names = ", ".join(map(repr, found[:3])) + ", ..." * (len(found) > 3)
        raise UsageError(
            f"the plan has the form {decisions[found[0]].form!r} at site {names}, which is fitted to data: add --calib "
            f"DATA (and leave out --factors weights), or write another form"
        )


def _check_units(site: gp.Site, decisions: Decisions) -> None:
    """Refuse a plan that keeps a part of a unit, or splits what makes the units."""
    name = site_name(site.weight)
    decision = decisions.get(name)
    if decision is None or decision.form not in FOLDED or decision.rank is None or site.units is None:
        return
    run, in_heads = site.units.run, site.units.form == "heads"
    if decision.rank >= run * site.units.count:
        raise UsageError(
            f"the plan does not fit the model: site {name!r} has {decision.rank} inputs, and as "
            f'"{decision.form}" with that rank it would keep all; write "form": "dense", or a smaller rank'
        )
    if decision.rank % run:
        near = max(run, decision.rank // run * run)
        raise UsageError(
            f"the plan does not fit the model: site {name!r} has {run} "
            f"{'heads, which all keep as many inputs' if in_heads else 'inputs for each hidden unit'}; "
            f'write "rank": {near} or another multiple of {run}'
        )
    for maker in map(site_name, site.units.makers):
        if maker in decisions and decisions[maker].rank is not None:
            raise UsageError(
                f"the plan does not fit the model: site {name!r} keeps some of the "
                f"{'values of heads' if in_heads else 'hidden units'} that {maker!r} makes, "
                f'which is split; write "form": "dense" for {maker!r}, or another form for {name!r}'
            )


def planned_splits(decisions: Mapping[str, Decision], activations: ModelActivations) -> dict[str, tuple[Form, int]]:
    """Return site name -> (form, rank) of the splits among the sites that calibration reaches."""
    return {
        site.name: (site.forms[0] if decision.form == "first" else decision.form, decision.rank)
        for site in activations.sites
        if (decision := decisions.get(site.name)) is not None and decision.rank is not None
    }


def zero_filled(site: CalibratedSite, form: Form, rank: int) -> FittedSite:
    """Return zero factors of the size of a split, to measure a candidate model before factors are fitted."""
    rows, columns = site.shape(form)
    right = torch.zeros(site.groups, rank, columns)
    if site.units is not None and form in FOLDED:
        right[:] = torch.eye(columns)[kept_columns(form, rank, columns, site.units.run)]
    replacement = Replacement(
        form,
        torch.zeros(site.groups, rows, rank),
        right,
        torch.zeros(site.groups, site.out_features),
    )
    return FittedSite(replacement=replacement, response_error=0.0, seconds=0.0)


def _decision(option: Option, has_splits: bool) -> Decision:
    if option.rank is not None:
        return Decision(
            rank=option.rank, reason=f"loss {option.loss:.1g}", form=cast(Form, option.form), bits=option.bits
        )
    if option.bits < 32:
        repaired = f" repaired with rank {option.repair}" if option.repair else ""
        reason = f"{option.bits} bits{repaired}, loss {option.loss:.1g}"
        return Decision(rank=None, reason=reason, bits=option.bits, repair=option.repair)
    return Decision(rank=None, reason="worth its size" if has_splits else "no rank saves anything")


def _out_of_reach(activations: ModelActivations) -> Decisions:
    return {name: Decision(rank=None, reason=reason) for name, reason in activations.unreachable.items()}
