"""Plans by time: options priced from a cost table, and a plan corrected by the whole model's time.

    price of a split = price of dense - scale * (dense time - split time)    each of the site alone, by the table
    price of dense   = max(1, scale) * dense time                            so that no price falls below 0
    whole model      = dense model's time - sum over sites (price of dense - price)

`scale` is what the whole model says: a plan is made, its model measured beside the dense one with blank factors, the
scale set right by what was saved there, and the plan made again, until it lands.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rsi_deploy.calibrate.streams import Streams
from rsi_deploy.errors import ModelError
from rsi_deploy.measure.cost_table import CostTable, PlanCheck, SiteCost
from rsi_deploy.plan.budget import Budget
from rsi_deploy.plan.decide import Decisions, decisions_of, wanted_splits
from rsi_deploy.plan.knapsack import Option, SiteOptions, choose, smallest_cost

ROUNDS = 4
AIM = 0.97
"""Of the budget that is planned for: what is measured afterwards varies."""
LOW, HIGH = 0.93, 1.0
"""Shares of the budget between which a measured plan is as good as any."""
FASTER = "no split of it is measured faster"
NOISY = "too noisy to tell whether a split is faster"

Check = Callable[[Mapping[str, tuple[str, int]], CostTable], PlanCheck]
"""Measures the model of some splits, site name -> (form, rank), beside the dense one."""


@dataclass(frozen=True, kw_only=True)
class Landed:
    """A plan within a time.

    Attributes:
        decisions: of every site.
        table: with the scale that the plans' models have told.
        checks: the plans that were measured, the one that was taken last.
    """

    decisions: Decisions
    table: CostTable
    checks: tuple[PlanCheck, ...]


def faster_only(options: Sequence[SiteOptions], table: CostTable) -> tuple[list[SiteOptions], dict[str, str]]:
    """The options without the splits that were not shown faster, and name -> reason of sites that have none left."""
    costs, kept, reasons = table.by_site(), [], {}
    for site in options:
        cost = costs.get(site.name)
        splits = [o for o in site.options[1:] if cost is not None and _is_faster(cost, o)]
        if len(site.options) > 1 and not splits:
            reasons[site.name] = _why_dense(site, cost, table)
        kept.append(SiteOptions(name=site.name, options=(site.options[0], *splits)))
    return kept, reasons


def priced(options: Sequence[SiteOptions], table: CostTable) -> list[SiteOptions]:
    """The options with their times, by the table and its scale; splits that it says nothing of are left out."""
    costs, result = table.by_site(), []
    for site in options:
        cost = costs.get(site.name)
        if cost is None:
            result.append(SiteOptions(name=site.name, options=site.options[:1]))
            continue
        dense, scale = cost.dense_nanoseconds, table.model.scale
        whole = round(max(1.0, scale) * dense)
        priced = [replace(site.options[0], nanoseconds=whole)]
        for option in site.options[1:]:
            time = cost.nanoseconds(option.form, option.rank or 0)
            if time is not None:
                priced.append(replace(option, nanoseconds=max(whole - round(scale * (dense - time)), 0)))
        result.append(SiteOptions(name=site.name, options=tuple(priced)))
    return result


def in_time(
    budget: Budget, options: Sequence[SiteOptions], table: CostTable, streams: Streams, check: Check | None
) -> Landed:
    """The options with the least loss whose model keeps a time.

    Args:
        budget: `--keep-latency` or `--max-latency`.
        options: of every site that calibration reaches, dense first.
        table: of the machine that the plan is for.
        streams: of the dense model.
        check: measures a plan's whole model; None believes the table: it is of another machine.

    Raises:
        ModelError: no plan is so fast, and which is the fastest; or the dense model is.
    """
    total = table.model.dense_nanoseconds
    target = budget.total(total) / total
    if target >= 1:
        raise ModelError(f"{budget}: the dense model keeps it ({total / 1e6:.4g} ms); type a smaller budget")
    tried: list[Landed] = []
    for _ in range(ROUNDS if check is not None else 1):
        decisions, nearest = _planned(budget, priced(options, table), table, streams, target * (AIM if check else 1))
        if check is None:
            if nearest is not None:
                raise budget.unreachable(total, nearest)
            return Landed(decisions=decisions, table=table, checks=())
        splits = wanted_splits(decisions, streams)
        found = check(splits, table)
        table = corrected(table, splits, found)
        if nearest is not None and found.measured > target:  # the fastest plan, measured: no table's word alone refuses
            raise budget.unreachable(total, math.ceil(found.measured * total))
        tried.append(Landed(decisions=decisions, table=table, checks=(found,)))
        if LOW * target <= found.measured <= HIGH * target:
            break
    best = min(tried, key=lambda landed: _miss(landed.checks[0].measured, target))
    checks = [landed.checks[0] for landed in tried if landed is not best]
    return Landed(decisions=best.decisions, table=best.table, checks=(*checks, best.checks[0]))


def corrected(table: CostTable, splits: Mapping[str, tuple[str, int]], found: PlanCheck) -> CostTable:
    """The table with the scale that a measured plan tells."""
    saving = table.saving(splits) / table.model.dense_nanoseconds
    scale = table.model.scale if saving <= 0 else max((1 - found.measured) / saving, 1e-3)
    model = table.model.model_copy(update={"scale": scale, "checks": (*table.model.checks, found)})
    return table.model_copy(update={"model": model})


def _planned(
    budget: Budget, options: Sequence[SiteOptions], table: CostTable, streams: Streams, share: float
) -> tuple[Decisions, int | None]:
    """The plan whose model takes this share of the dense one's time, by the table.

    Where there is none within the budget, the fastest plan, and the nanoseconds that its model takes by the table.
    """
    total = table.model.dense_nanoseconds
    fixed = total - sum(site.options[0].nanoseconds for site in options)
    smallest = smallest_cost(options, cost="nanoseconds")
    limit = int(share * total) - fixed
    nearest = fixed + smallest if smallest > max(limit, budget.total(total) - fixed) else None
    choice = choose(options, cost="nanoseconds", limit=max(limit, smallest))
    several = {site.name for site in options if len(site.options) > 1}
    return decisions_of(choice, several, streams), nearest


def _miss(measured: float, target: float) -> float:
    """How far a measured plan is from the budget; above it counts five times."""
    return 5 * (measured - target) if measured > target else target - measured


def _is_faster(cost: SiteCost, option: Option) -> bool:
    rank = option.rank or 0
    return cost.nanoseconds(option.form, rank) is not None and cost.is_faster(option.form, rank)


def _why_dense(site: SiteOptions, cost: SiteCost | None, table: CostTable) -> str:
    if cost is None:
        return f"not timed: {table.untimed.get(site.name, 'its shape is not in the cost table')}"
    timed = [o for o in site.options[1:] if cost.nanoseconds(o.form, o.rank or 0) is not None]
    if timed and all(cost.is_noisy(o.form, o.rank or 0) for o in timed):
        return NOISY
    return FASTER
