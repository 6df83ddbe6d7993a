"""Plans by time: options priced from a cost table, and a plan closed in on by the whole model's time.

    price of an option    its site's time alone, by the table
    saving of a plan      sum over its splits of (price of dense - price)
    whole model           dense model's time - scale * saving

`scale` is what the whole model says. A plan is made, its model measured beside the dense one with blank factors, and
what is planned for moved, until it lands: by the line through what was measured, and where that line is bent or broken
(a fusion that is lost, threads that stop waiting for each other) by halves (`rsi_deploy.planning.bracket`). What is
delivered was measured to keep the time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rsi_deploy.calibration.activations import ModelActivations
from rsi_deploy.core.errors import ModelError
from rsi_deploy.costing.cost_table import CostTable, PlanCheck, SiteCost
from rsi_deploy.planning.bracket import Aim, Trial, next_planned
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Decisions, decisions_of, wanted_splits
from rsi_deploy.planning.knapsack import Option, SiteOptions, choose, smallest_cost

TRIALS = 6
"""Plans that are measured at the most; seven where none of these keeps the time: the fastest of all comes last."""
STEPS = 24
"""Moves of what is planned for; those that lead to a plan that was measured already cost nothing."""
AIM = 0.97
"""Of the budget that is planned for: what is measured afterwards varies."""
LOW, HIGH = 0.93, 1.0
"""Shares of the budget between which a measured plan is as good as any."""
FAR = 0.87
"""Share of the budget below which it is said why a plan is so much faster than asked for."""
VAGUE = 0.1
"""Relative half width of a measured share's interval from which on it is said that nothing was to be told better."""
FASTER = "no split of it is measured faster"
NOISY = "too noisy to tell whether a split is faster"

Check = Callable[[Mapping[str, tuple[str, int]], CostTable], PlanCheck]
"""Measures the model of some splits, site name -> (form, rank), beside the dense one."""


@dataclass(frozen=True, kw_only=True)
class Landed:
    """A plan within a time.

    Attributes:
        decisions: of every site.
        table: with the scale that the plan's model has told.
        checks: the plans that were measured, the one that was taken last.
        says: why it is much faster than asked for, or how little is known of that; "" where it is neither.
    """

    decisions: Decisions
    table: CostTable
    checks: tuple[PlanCheck, ...]
    says: str = ""


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
    """The options with their sites' times, by the table; splits that it says nothing of are left out."""
    costs, result = table.by_site(), []
    for site in options:
        cost = costs.get(site.name)
        if cost is None:
            result.append(SiteOptions(name=site.name, options=site.options[:1]))
            continue
        priced = [replace(site.options[0], nanoseconds=cost.dense_nanoseconds)]
        for option in site.options[1:]:
            time = cost.nanoseconds(option.form, option.rank or 0)
            if time is not None:
                priced.append(replace(option, nanoseconds=time))
        result.append(SiteOptions(name=site.name, options=tuple(priced)))
    return result


def saving_of(share: float, table: CostTable) -> float:
    """What sites must save together, as a share of the dense model's time, for a model of this share of it."""
    return (1 - share) / max(table.model.scale, 1e-3)


def with_saving(options: Sequence[SiteOptions], saving: float, table: CostTable) -> dict[str, Option]:
    """The options with the least loss whose sites save this share of the dense model's time together, or all they can.

    Args:
        options: priced.
        saving: of the sites alone.
        table: that they were priced by.
    """
    dense = sum(site.options[0].nanoseconds for site in options)
    limit = math.floor(dense - saving * table.model.dense_nanoseconds)
    return choose(options, cost="nanoseconds", limit=max(limit, smallest_cost(options, cost="nanoseconds")))


def in_time(
    budget: Budget, options: Sequence[SiteOptions], table: CostTable, streams: ModelActivations, check: Check | None
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
    search = _Search(options=priced(options, table), table=table, streams=streams, check=check, target=target)
    if check is None:
        decisions, splits = search.plan(saving_of(target, table))
        if (fastest := table.predicted(splits)) > target * (1 + 1e-9):  # but for rounding
            raise _refused(budget, table, fastest)
        return Landed(decisions=decisions, table=table, checks=())
    search.run()
    if not search.keeping:  # the fastest plan was measured: no table's word alone refuses
        fastest = min(landed.checks[0].measured for landed in search.tried)
        raise _refused(budget, table, fastest)
    return search.landed()


def _refused(budget: Budget, table: CostTable, fastest: float) -> ModelError:
    """The error for a time that no plan reaches, and whether times were too noisy to know of faster splits."""
    total, costs = table.model.dense_nanoseconds, table.by_site()
    error = budget.unreachable(total, math.ceil(fastest * total))
    noisy = [name for name, cost in costs.items() if all(cost.is_noisy(s.form, s.rank) for s in cost.splits)]
    if not noisy:
        return error
    return ModelError(
        f"{error}. Of {len(noisy)} of {len(costs)} sites the times are too noisy to tell whether a split is faster: "
        f"give the cost table more time (--cost-budget; profile's --budget), or a quieter machine"
    )


@dataclass(kw_only=True)
class _Search:
    """Plans for other and other savings, each measured as a whole, until one lands.

    Attributes:
        options: priced.
        table: with the scale that the last measured plan has told.
        streams: of the dense model.
        check: measures a plan.
        target: share of the dense model's time.
        tried: one for every plan that was measured.
    """

    options: Sequence[SiteOptions]
    table: CostTable
    streams: ModelActivations
    check: Check | None
    target: float

    def __post_init__(self) -> None:
        self.tried: list[Landed] = []
        self._measured: dict[frozenset[tuple[str, tuple[str, int]]], float] = {}

    @property
    def keeping(self) -> list[Landed]:
        """Those that keep the time."""
        return [landed for landed in self.tried if landed.checks[0].measured <= HIGH * self.target]

    def run(self) -> None:
        """Measure plans until one lands, none is left between two that do not, or enough were tried."""
        aim = Aim(low=1 - HIGH * self.target, middle=1 - AIM * self.target, high=1 - LOW * self.target)
        dense = sum(site.options[0].nanoseconds for site in self.options)
        largest = (dense - smallest_cost(self.options, cost="nanoseconds")) / self.table.model.dense_nanoseconds
        trials: list[Trial] = []
        saving = min(saving_of(AIM * self.target, self.table), largest)
        for _ in range(STEPS):
            trials.append(Trial(planned=saving, came=1 - self._share(saving)))
            if aim.side(trials[-1].came) == 0 or len(self.tried) >= TRIALS:
                break
            if saving >= largest and aim.side(trials[-1].came) < 0:
                break
            saving = next_planned(trials, aim, largest)
        if not self.keeping:
            self._share(largest)

    def plan(self, saving: float) -> tuple[Decisions, Mapping[str, tuple[str, int]]]:
        """The decisions for a saving, and their splits."""
        choice = with_saving(self.options, saving, self.table)
        several = {site.name for site in self.options if len(site.options) > 1}
        decisions = decisions_of(choice, several, self.streams)
        return decisions, wanted_splits(decisions, self.streams)

    def landed(self) -> Landed:
        """The slowest of those that keep the time, with all that was measured."""
        best = max(self.keeping, key=lambda landed: landed.checks[0].measured)
        others = [landed.checks[0] for landed in self.tried if landed is not best]
        return replace(best, checks=(*others, best.checks[0]), says=self._says(best.checks[0]))

    def _share(self, saving: float) -> float:
        """The measured share of the dense model's time of the plan for a saving."""
        decisions, splits = self.plan(saving)
        key = frozenset(splits.items())
        if key not in self._measured:
            assert self.check is not None
            found = self.check(splits, self.table)
            self.table = corrected(self.table, splits, found)
            self.tried.append(Landed(decisions=decisions, table=self.table, checks=(found,)))
            self._measured[key] = found.measured
        return self._measured[key]

    def _says(self, taken: PlanCheck) -> str:
        """What a reader must know of where the plan that was taken lies."""
        low, high = taken.measured_interval
        if high - low > VAGUE * (high + low):
            return (
                f"the machine is too noisy to land on {100 * self.target:.1f} % of the dense model's time: the plan "
                f"takes between {100 * low:.0f} % and {100 * high:.0f} % of it; export again on a quieter one"
            )
        if taken.measured >= FAR * self.target:
            return ""
        slower = [share for share in self._measured.values() if share > HIGH * self.target]
        told = f"; the next slower one took {100 * min(slower):.1f} %" if slower else ""
        return (
            f"the plan takes {100 * taken.measured:.1f} % of the dense model's time where {100 * self.target:.1f} % "
            f"were allowed: none of the {len(self.tried)} plans measured came nearer from below{told}. Times that jump "
            f"so are those of a busy machine, or of threads that wait for each other: other --threads may tell"
        )


def corrected(table: CostTable, splits: Mapping[str, tuple[str, int]], found: PlanCheck) -> CostTable:
    """The table with the scale that a measured plan tells."""
    saving = table.saving(splits) / table.model.dense_nanoseconds
    scale = table.model.scale if saving <= 0 else max((1 - found.measured) / saving, 1e-3)
    model = table.model.model_copy(update={"scale": scale, "checks": (*table.model.checks, found)})
    return table.model_copy(update={"model": model})


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
