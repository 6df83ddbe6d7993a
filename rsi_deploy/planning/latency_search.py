"""Plan under a latency budget: price options by a cost table, then correct the plan by measuring candidate models.

    price of an option    time of its site alone, from the table
    saving of a plan      sum over its splits of (price of dense - price)
    whole model           time of the dense model - scale * saving

`scale` is estimated from measured models. Each plan is measured as a whole model with zero-filled factors, interleaved
with the dense model, and the planned saving is moved until the measured time meets the budget: by interpolation, or by
bisection where the response is bent or broken, for example by a lost fusion (`rsi_deploy.planning.bracket`). The plan
that is delivered was measured within the budget.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rsi_deploy.calibration.activations import ModelActivations
from rsi_deploy.core.errors import ModelError
from rsi_deploy.costing.cost_table import CostTable, PlanCheck, SiteCost
from rsi_deploy.planning.bracket import Target, Trial, next_planned
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Decisions, decisions_of, planned_splits
from rsi_deploy.planning.knapsack import Option, SiteOptions, choose, smallest_cost

TRIALS = 6
"""Largest number of measured plans. If none of them meets the budget, the fastest plan of all is measured too."""
STEPS = 24
"""Largest number of planned savings; those that repeat an already measured plan cost nothing."""
TARGET = 0.97
"""Share of the budget that is planned for, because later measurements vary."""
LOW, HIGH = 0.93, 1.0
"""Shares of the budget between which a measured plan is accepted."""
FAR = 0.87
"""Share of the budget below which a note explains why the plan is faster than necessary."""
NEAR_MISS = 1.25
"""Share of the budget up to which the fastest model is measured once more, for longer, before the budget is refused."""
VAGUE = 0.1
"""Relative half width of a measured interval above which a note warns about noise."""
FASTER = "no split of it is measured faster"
NOISY = "too noisy to tell whether a split is faster"

Check = Callable[[Mapping[str, tuple[str, int]], CostTable], PlanCheck]
"""Function that measures a model with splits, site name -> (form, rank), interleaved with the dense model."""


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """A plan within a latency budget.

    Attributes:
        decisions: decisions for every site.
        table: cost table with the scale measured on the plan's model.
        checks: measurements of all plans; the last one is that of this plan.
        note: note for the report about noise or about a time far below the budget; "" for none.
    """

    decisions: Decisions
    table: CostTable
    checks: tuple[PlanCheck, ...]
    note: str = ""


def faster_only(options: Sequence[SiteOptions], table: CostTable) -> tuple[list[SiteOptions], dict[str, str]]:
    """Drop the splits that were not measured faster; also return site name -> reason for sites without a split left."""
    costs, kept, reasons = table.by_site(), [], {}
    for site in options:
        cost = costs.get(site.name)
        splits = [o for o in site.options[1:] if cost is not None and _is_faster(cost, o)]
        if len(site.options) > 1 and not splits:
            reasons[site.name] = _why_dense(site, cost, table)
        kept.append(replace(site, options=(site.options[0], *splits)))
    return kept, reasons


def priced(options: Sequence[SiteOptions], table: CostTable) -> list[SiteOptions]:
    """Return the options with their times from the table, without the splits that it does not cover."""
    costs, result = table.by_site(), []
    for site in options:
        cost = costs.get(site.name)
        if cost is None:
            result.append(replace(site, options=site.options[:1]))
            continue
        priced = [replace(site.options[0], nanoseconds=cost.dense_nanoseconds)]
        for option in site.options[1:]:
            time = cost.nanoseconds(option.form, option.rank or 0)
            if time is not None:
                priced.append(replace(option, nanoseconds=time))
        result.append(replace(site, options=tuple(priced)))
    return result


def saving_of(share: float, table: CostTable) -> float:
    """Return the total saving of the sites that makes the model take this share of the dense model's time.

    The saving is a share of the dense model's time, too.
    """
    return (1 - share) / max(table.model.scale, 1e-3)


def options_with_saving(options: Sequence[SiteOptions], saving: float, table: CostTable) -> dict[str, Option]:
    """Choose the options of least loss that save this share of the dense model's time, or the fastest ones.

    Args:
        options: options with prices.
        saving: total saving of the sites as a share of the dense model's time.
        table: cost table of the prices.
    """
    dense = sum(site.options[0].nanoseconds for site in options)
    limit = math.floor(dense - saving * table.model.dense_nanoseconds)
    return choose(options, cost="nanoseconds", limit=max(limit, smallest_cost(options, cost="nanoseconds")))


def decide_by_time(
    budget: Budget,
    options: Sequence[SiteOptions],
    table: CostTable,
    activations: ModelActivations,
    check: Check | None,
    long_check: Check | None = None,
) -> LatencyPlan:
    """Choose the options of least loss whose model meets a latency budget.

    Args:
        budget: `--keep-latency` or `--max-latency`.
        options: options of every site that calibration reaches.
        table: cost table of the target machine.
        activations: activations of the dense model.
        check: function that measures the model of a plan; None to trust the table of another machine.
        long_check: function that does so for longer, before a budget that is missed by little is refused.

    Raises:
        ModelError: no plan meets the budget (the message names the fastest one), or the dense model meets it.
    """
    total = table.model.dense_nanoseconds
    target = budget.total(total) / total
    if target >= 1:
        raise ModelError(f"{budget}: the dense model keeps it ({total / 1e6:.4g} ms); type a smaller budget")
    search = _Search(options=priced(options, table), table=table, activations=activations, check=check, target=target)
    if check is None:
        decisions, splits = search.plan(saving_of(target, table))
        if (fastest := table.predicted(splits)) > target * (1 + 1e-9):  # tolerates rounding
            raise _refused(budget, table, fastest)
        return LatencyPlan(decisions=decisions, table=table, checks=())
    search.run()
    if not search.within and long_check is not None:
        search.measure_again(long_check)
    if not search.within:  # the fastest plan was measured, too: the table alone never refuses a budget
        raise _refused(budget, table, min(plan.checks[0].measured for plan in search.tried))
    return search.best()


def _refused(budget: Budget, table: CostTable, fastest: float) -> ModelError:
    """Return the error for a budget that no plan meets, with a hint if times are too noisy."""
    total, costs = table.model.dense_nanoseconds, table.by_site()
    error = budget.unreachable(total, math.ceil(fastest * total))
    noisy = [name for name, cost in costs.items() if all(cost.is_noisy(s.form, s.rank) for s in cost.splits)]
    if not noisy:
        return error
    return ModelError(
        f"{error}. The times of {len(noisy)} of {len(costs)} sites are too noisy to tell whether a split is faster: "
        f"give the cost table more time (--cost-budget; profile's --budget), or use a quieter machine"
    )


@dataclass(kw_only=True)
class _Search:
    """A search over planned savings, with one measured model per plan.

    Attributes:
        options: options with prices.
        table: cost table with the scale from the last measurement.
        activations: activations of the dense model.
        check: function that measures a plan.
        target: budget as a share of the dense model's time.
        tried: measured plans in order.
    """

    options: Sequence[SiteOptions]
    table: CostTable
    activations: ModelActivations
    check: Check | None
    target: float

    def __post_init__(self) -> None:
        self.tried: list[LatencyPlan] = []
        self._measured: dict[frozenset[tuple[str, tuple[str, int]]], float] = {}

    @property
    def within(self) -> list[LatencyPlan]:
        """The measured plans that meet the budget."""
        return [plan for plan in self.tried if plan.checks[0].measured <= HIGH * self.target]

    def run(self) -> None:
        """Measure plans until one is accepted, no further saving is possible, or the number of trials is reached."""
        aim = Target(low=1 - HIGH * self.target, middle=1 - TARGET * self.target, high=1 - LOW * self.target)
        dense = sum(site.options[0].nanoseconds for site in self.options)
        largest = (dense - smallest_cost(self.options, cost="nanoseconds")) / self.table.model.dense_nanoseconds
        trials: list[Trial] = []
        saving = min(saving_of(TARGET * self.target, self.table), largest)
        for _ in range(STEPS):
            trials.append(Trial(planned=saving, reached=1 - self._share(saving)))
            if aim.side(trials[-1].reached) == 0 or len(self.tried) >= TRIALS:
                break
            if saving >= largest and aim.side(trials[-1].reached) < 0:
                break
            saving = next_planned(trials, aim, largest)
        if not self.within:
            self._share(largest)

    def measure_again(self, check: Check) -> None:
        """Measure the fastest plan once more where it has missed the budget by little; that measurement then counts."""
        place = min(range(len(self.tried)), key=lambda place: self.tried[place].checks[0].measured)
        plan = self.tried[place]
        if plan.checks[0].measured > NEAR_MISS * self.target:
            return
        splits = planned_splits(plan.decisions, self.activations)
        found = check(splits, self.table)
        self.table = corrected(self.table, splits, found)
        self.tried[place] = replace(plan, table=self.table, checks=(found,))

    def plan(self, saving: float) -> tuple[Decisions, Mapping[str, tuple[str, int]]]:
        """Return the decisions for a saving, and their splits."""
        choice = options_with_saving(self.options, saving, self.table)
        splittable = {site.name for site in self.options if len(site.options) > 1}
        decisions = decisions_of(choice, splittable, self.activations)
        return decisions, planned_splits(decisions, self.activations)

    def best(self) -> LatencyPlan:
        """Return the slowest plan within the budget, with the checks of all plans."""
        best = max(self.within, key=lambda plan: plan.checks[0].measured)
        others = [plan.checks[0] for plan in self.tried if plan is not best]
        return replace(best, checks=(*others, best.checks[0]), note=self._note(best.checks[0]))

    def _share(self, saving: float) -> float:
        """Return the measured share of the dense model's time for a planned saving."""
        decisions, splits = self.plan(saving)
        key = frozenset(splits.items())
        if key not in self._measured:
            assert self.check is not None
            check = self.check(splits, self.table)
            self.table = corrected(self.table, splits, check)
            self.tried.append(LatencyPlan(decisions=decisions, table=self.table, checks=(check,)))
            self._measured[key] = check.measured
        return self._measured[key]

    def _note(self, taken: PlanCheck) -> str:
        """Return a note about noise, or about a time far below the budget; "" for none."""
        low, high = taken.measured_interval
        if high - low > VAGUE * (high + low):
            return (
                f"the machine is too noisy to meet {100 * self.target:.1f} % of the dense model's time: the plan "
                f"takes between {100 * low:.0f} % and {100 * high:.0f} % of it; export again on a quieter one"
            )
        if taken.measured >= FAR * self.target:
            return ""
        slower = [share for share in self._measured.values() if share > HIGH * self.target]
        next_slower = f"; the next slower one takes {100 * min(slower):.1f} %" if slower else ""
        return (
            f"the plan takes {100 * taken.measured:.1f} % of the dense model's time and {100 * self.target:.1f} % "
            f"are allowed: none of the {len(self.tried)} measured plans is nearer below the budget{next_slower}. Such "
            f"jumps come from a busy machine, or from threads that wait for each other: try other --threads"
        )


def corrected(table: CostTable, splits: Mapping[str, tuple[str, int]], check: PlanCheck) -> CostTable:
    """Return the table with the scale and the check of a measured plan."""
    saving = table.saving(splits) / table.model.dense_nanoseconds
    scale = table.model.scale if saving <= 0 else max((1 - check.measured) / saving, 1e-3)
    model = table.model.model_copy(update={"scale": scale, "checks": (*table.model.checks, check)})
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
