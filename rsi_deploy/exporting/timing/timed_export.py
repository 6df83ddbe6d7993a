"""The times that an export plans with: a cost table of this machine or of another one.

--cost FILE    a table by `rsi-deploy profile`; one of other conditions is refused without --allow-cost-mismatch
a budget       a table that is measured here, or comes from the cache
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rsi_deploy.calibration.activations import ModelActivations
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.costing.cost_table import CostTable, PlanCheck, read_cost_table
from rsi_deploy.costing.trial_plans import measured_plans, share_of
from rsi_deploy.exporting.timing.profile import Costing
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Decisions
from rsi_deploy.planning.knapsack import SiteOptions
from rsi_deploy.planning.latency_search import corrected, decide_by_time, faster_only
from rsi_deploy.planning.planner import Decision
from rsi_deploy.runtime.feeds.values import describe_array
from rsi_deploy.runtime.providers import resolve_provider

CHECK_SECONDS = 15.0
"""Seconds to measure a plan; on a quiet machine the result is precise much sooner."""
LONG_CHECK_SECONDS = 45.0
"""Seconds to measure the fastest plan once more, before a budget that it has missed by little is refused."""


@dataclass(kw_only=True)
class TimedExport:
    """The times that one export plans with.

    Attributes:
        table: cost table of the model's sites.
        source: origin of the table, in words.
        is_foreign: whether the table is of another machine, so that nothing is measured here.
        must_be_faster: whether a site is split only where that is measured faster.
        dense: the dense model's file.
        feeds: inputs that the models are measured with.
        seconds: time that it took to get the table.
        checks: measurements of whole models while planning.
        reasons: site name -> reason why it stays dense, for lack of a faster split.
        remarks: notes on the plan, for the report.
        delivers_dense: whether the dense model is delivered, because no split is faster.
    """

    table: CostTable
    source: str
    is_foreign: bool
    must_be_faster: bool
    dense: Path
    feeds: Feeds
    seconds: float = 0.0
    checks: list[PlanCheck] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    delivers_dense: bool = False

    def narrowed(self, options: Sequence[SiteOptions]) -> list[SiteOptions]:
        """Return the options that may be chosen, and set `reasons` of sites that lose all their splits."""
        if not self.must_be_faster:
            return list(options)
        kept, self.reasons = faster_only(options, self.table)
        return kept

    def deliver_dense(self, options: Sequence[SiteOptions], budget: Budget | None) -> None:
        """Deliver the dense model, with a remark, because no split of any site is faster.

        Budgets of parameters and MACs are a means to a faster model, and the dense one is the fastest here. Budgets of
        time and size are goals of their own, which the dense model misses.

        Args:
            options: options of all sites, all of them dense.
            budget: budget of the export; None for an accuracy to keep.

        Raises:
            ModelError: a budget of time or size.
        """
        some = "; ".join(f"{name}: {reason}" for name, reason in list(self.reasons.items())[:3])
        reason = f"no split of any of {len(options)} sites is measured faster than dense ({some})"
        if budget is not None and budget.cost == "nanoseconds":
            raise ModelError(
                f"no plan can meet {budget}: {reason}, so the dense model is the fastest here; leave {budget} out, "
                f"or let more sites be split (--include, --exclude)"
            )
        if budget is not None and budget.cost == "bytes":
            raise ModelError(
                f"no plan can meet {budget} with splits that are faster: {reason}. Where smaller is enough, add "
                f"--allow-slower"
            )
        self.delivers_dense = True
        self.remarks.append(f"{reason}: the DENSE model is delivered. Where smaller is enough, add --allow-slower")

    def within(self, budget: Budget, options: Sequence[SiteOptions], streams: ModelActivations) -> Decisions:
        """Return the decisions for a budget of time, and correct the table by the models measured for it.

        Raises:
            ModelError: no plan is fast enough; names the fastest.
        """
        if budget.max_latency is not None and not self.is_foreign:
            self.table = rescaled(self.table, self._dense_now())
        check, long_check = partial(self._check, CHECK_SECONDS), partial(self._check, LONG_CHECK_SECONDS)
        if self.is_foreign:
            found = decide_by_time(budget, options, self.table, streams, None)
        else:
            found = decide_by_time(budget, options, self.table, streams, check, long_check)
        self.table = found.table
        self.checks += found.checks
        self.remarks += [found.note] if found.note else []
        return found.decisions

    def explained(self, decisions: Decisions) -> Decisions:
        """Return the decisions, with the reasons of sites that stay dense for lack of a faster split."""
        late = {name: why for name, why in self.reasons.items() if decisions[name].rank is None}
        return decisions | {name: Decision(rank=None, reason=why) for name, why in late.items()}

    def correct(self, splits: Mapping[str, tuple[str, int]], share: float) -> None:
        """Correct the table by the share of the dense model's time that a model with these splits was measured at."""
        scale, predicted = self.table.model.scale, self.table.predicted(splits)
        check = PlanCheck(scale=scale, predicted=predicted, measured=share, measured_interval=(share, share))
        self.table = corrected(self.table, splits, check)
        self.checks.append(check)

    def _dense_now(self) -> int:
        """Nanoseconds of a call of the dense model, measured now: the machine may have changed since the table."""
        conditions = self.table.conditions
        result = measured_plans(self.dense, self.feeds, [], conditions.provider, conditions.threads, CHECK_SECONDS / 2)
        return round(1e6 * result.arms[0].median_ms)

    def _check(self, seconds: float, splits: Mapping[str, tuple[str, int]], table: CostTable) -> PlanCheck:
        conditions = table.conditions
        result = measured_plans(self.dense, self.feeds, [splits], conditions.provider, conditions.threads, seconds)
        share, ends = share_of(result.arms[1])
        return PlanCheck(
            scale=table.model.scale, predicted=table.predicted(splits), measured=share, measured_interval=ends
        )


def rescaled(table: CostTable, dense_nanoseconds: int) -> CostTable:
    """Return the table scaled to the time that the dense model takes now; shares of its time stay."""
    factor = dense_nanoseconds / table.model.dense_nanoseconds
    update = {"dense_nanoseconds": dense_nanoseconds, "scale": table.model.scale * factor}
    return table.model_copy(update={"model": table.model.model_copy(update=update)})


def timed_export(
    dense: Path,
    feeds: Feeds,
    costing: Costing,
    *,
    cost: str | Path | None,
    foreign: bool,
    must_be_faster: bool,
    name: str,
    command: str,
) -> TimedExport:
    """Return the times for an export, from a file or measured.

    Args:
        dense: the dense model's file.
        feeds: inputs that the models are measured with.
        costing: how tables are made here.
        cost: file of a table; None measures one.
        foreign: accept a table of another machine.
        must_be_faster: split a site only where that is measured faster.
        name: name of the model.
        command: command line for a table that is measured.

    Raises:
        UsageError: a table of other conditions, inputs or shapes; names the differences.
    """
    started = time.monotonic()
    if cost is None:
        table, source, elsewhere = costing.table(dense, feeds, name=name, command=command), "measured here", False
    else:
        table, elsewhere = read_fitting_table(cost, costing, dense, feeds, foreign=foreign)
        source = f"--cost {Path(cost).name}"
    return TimedExport(
        table=table,
        source=source,
        is_foreign=elsewhere,
        must_be_faster=must_be_faster,
        dense=dense,
        feeds=feeds,
        seconds=time.monotonic() - started,
    )


def read_fitting_table(
    cost: str | Path, costing: Costing, dense: Path, feeds: Feeds, *, foreign: bool
) -> tuple[CostTable, bool]:
    """Return the table of a file with this model's sites, and whether it is of another machine.

    Raises:
        UsageError: as `timed_export`.
    """
    table = read_cost_table(cost)
    differences = table.conditions.differences(costing.conditions)
    if table.conditions.scheme != costing.scheme.name:
        raise UsageError(
            f"--cost {cost} has times of {table.conditions.scheme}, but this export plans in {costing.scheme.name}",
            hint=f"{'add --precision auto or ' if costing.scheme.name == 'float32' else ''}leave out --cost",
        )
    if differences and not foreign:
        raise UsageError(
            f"--cost {cost} holds for another machine or setting: {'; '.join(differences)}{_absent(table)}. Make one "
            f"here (rsi-deploy profile), give the same --provider and --threads, or add --allow-cost-mismatch to plan "
            f"for that machine: nothing is measured here then"
        )
    return _of_this_model(table, dense, feeds, costing, cost), bool(differences)


def _absent(table: CostTable) -> str:
    """A hint for a table whose provider is not available here; else ""."""
    try:
        resolve_provider(table.conditions.provider)
    except UsageError as error:
        return f" (its provider is not here: {error})"
    return ""


def _of_this_model(table: CostTable, dense: Path, feeds: Feeds, costing: Costing, cost: str | Path) -> CostTable:
    """The table with this model's sites, found by their shapes."""
    inputs = {key: describe_array(array) for key, array in feeds.items()}
    if inputs != table.model.inputs:
        theirs, ours = (", ".join(f"{k}: {v}" for k, v in each.items()) for each in (table.model.inputs, inputs))
        raise UsageError(
            f"--cost {cost} was measured with {theirs}, but this export measures with {ours}; give --bench-batch, "
            f"--input-shape or --feeds as for the table, or make one with these"
        )
    found, untimed = costing.pieces(dense, feeds)
    known = {entry.signature for entry in table.costs}
    keys = ((name, key) for name, piece in found.items() for key in (piece.signature, piece.key))
    sites = {name: key for name, key in keys if key in known}  # older tables have no times of hidden units
    if not sites:
        raise UsageError(
            f"--cost {cost} knows no site shape of this model: it was made for {table.model.name}"
            f"; make one of this model with rsi-deploy profile"
        )
    return table.model_copy(update={"sites": sites, "untimed": untimed})
