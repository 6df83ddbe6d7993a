"""Decide every site under a budget of the whole model, and fit factors to the calibration data.

options      from the cache of a sweep, from an interrupted run, or from a survey of the data
decisions    by counted size, or by the times of the cost table
factors      from an interrupted run, or fitted now
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from graph_passes.forms import Form
from rsi_deploy.calibration.activations import FittedSite
from rsi_deploy.core.errors import ModelError
from rsi_deploy.execution.result_store import ResultStore
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.calibrated.candidates import Candidates
from rsi_deploy.exporting.timing.timed_export import TimedExport
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import (
    Decisions,
    Planned,
    decide_by_budget,
    decisions_of,
    planned_splits,
    total_of,
    zero_filled,
)
from rsi_deploy.planning.knapsack import SiteOptions, choose, smallest_cost
from rsi_deploy.planning.latency_search import options_with_saving, priced, saving_of
from rsi_deploy.planning.planner import Decision, Filters, FixedPlanner
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.runtime.shape_trace import trace_run

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class CalibratedPlanner:
    """Decides the sites of one export, and fits their factors.

    Attributes:
        streams: the dense model with the calibration data.
        calibration: settings of the calibration.
        candidates: writes and judges models.
        timing: the times to plan with; None where they decide nothing.
        filters: sites that may be split.
        is_fitted: whether factors are fitted to the data; otherwise they are those of the weights alone.
        progress: function that is called before each site.
        kept: results of earlier exports of the same model and data; None without.
        finished: results of an interrupted run of this export; None without.
        options: options of every site; empty where no budget chooses among them.
        unit: what the shares of `in_size` and `smallest` are of.
        fixed_bytes: bytes of a model beside what its options count, for shares of bytes.
    """

    streams: OnnxStreams
    calibration: Calibration
    candidates: Candidates
    timing: TimedExport | None
    filters: Filters
    is_fitted: bool
    progress: Progress | None
    kept: SweepCache | None
    finished: ResultStore | None
    options: Sequence[SiteOptions] = ()
    unit: Literal["params", "bytes"] = "params"
    fixed_bytes: int = 0

    def with_options(self) -> "CalibratedPlanner":
        """Return this planner with the options of every site that may be chosen."""
        options = self._options()
        return replace(self, options=options if self.timing is None else self.timing.narrowed(options))

    def dense(self, reason: str) -> Planned:
        """Return all sites dense, for this reason."""
        return unfitted({site.name: Decision(rank=None, reason=reason) for site in self.options}, self.filters)

    def fit(self, decisions: Decisions) -> Planned:
        """Return the decisions with fitted factors. Sites that cannot be fitted become dense."""
        fitted = {}
        if self.is_fitted:
            splits = planned_splits(decisions, self.streams)
            fitted = self._factors(splits, {name: decisions[name].bits for name in splits})
            idle = splits.keys() - fitted.keys()
            decisions |= dict.fromkeys(idle, Decision(rank=None, reason="never executed on the calibration data"))
        declined = self.calibration.declined
        decisions |= {name: Decision(rank=None, reason=reason) for name, reason in declined.items()}
        return replace(unfitted(decisions, self.filters), fitted=fitted)

    def within(self, budget: Budget) -> Decisions:
        """Return the decisions for a budget, which measured models keep.

        Raises:
            ModelError: no plan can meet it.
        """
        timing = self.timing
        if budget.cost == "nanoseconds":
            assert timing is not None
            return timing.explained(timing.within(budget, self.options, self.streams))
        try:
            decisions = self._for(budget)._by_budget(budget, lambda decisions: self._measured(budget, decisions))
        except ModelError as error:
            if timing is None or not timing.reasons:
                raise
            raise ModelError(
                f"{error}; only splits that were measured faster were taken ({len(timing.reasons)} sites have "
                f"none): --allow-slower takes the others too"
            ) from error
        return decisions if timing is None else timing.explained(decisions)

    def at(self, share: float, budget: Budget) -> Decisions:
        """Return the decisions for a share of the dense model, in the unit of a budget; the size is estimated.

        Raises:
            ModelError: no plan can meet it.
        """
        if budget.cost == "nanoseconds":
            return self.in_time(share)
        return self._for(budget)._by_budget(budget.at(share, self.total(budget)))

    def _for(self, budget: Budget) -> "CalibratedPlanner":
        """Return the planner of a budget. MACs stand for time, and at equal MACs plain splits are the faster ones."""
        if budget.cost != "macs" or self.timing is None or not self.timing.must_be_faster:
            return self
        plain = [tuple(option for option in site.options if option.form != "pivoted") for site in self.options]
        kept = [replace(site, options=options) for site, options in zip(self.options, plain, strict=True)]
        return replace(self, options=kept)

    def in_size(self, share: float) -> Decisions:
        """Return the decisions for a share of the dense model's parameters or bytes."""
        if self.unit == "bytes":
            return self.in_bytes(int(share * self.candidates.dense.size.bytes))
        return self._by_budget(Budget(keep_params=share))

    def in_bytes(self, size: int) -> Decisions:
        """Return the decisions for a file of so many bytes, by the counted bytes of the options.

        Raises:
            ModelError: no plan is so small.
        """
        smallest = smallest_cost(self.options, cost="bytes")
        if size - self.fixed_bytes < smallest:
            raise Budget(max_size=size).unreachable(self.candidates.dense.size.bytes, self.fixed_bytes + smallest)
        choice = choose(self.options, cost="bytes", limit=size - self.fixed_bytes)
        return decisions_of(choice, {site.name for site in self.options if len(site.options) > 1}, self.streams)

    def in_time(self, share: float) -> Decisions:
        """Return the decisions for a share of the dense model's time by the cost table."""
        assert self.timing is not None
        table = self.timing.table
        choice = options_with_saving(priced(self.options, table), saving_of(share, table), table)
        return decisions_of(choice, {site.name for site in self.options if len(site.options) > 1}, self.streams)

    def total(self, budget: Budget) -> int:
        """Return the cost of the dense model in the unit of a budget."""
        if budget.cost != "nanoseconds":
            return total_of(budget, self.candidates.dense.size)
        assert self.timing is not None
        return self.timing.table.model.dense_nanoseconds

    def smallest(self, *, fastest: bool) -> float:
        """Return the share of the smallest or fastest plan; 1.0 where no option of any site saves anything."""
        if not fastest and self.unit == "bytes":
            size = self.fixed_bytes + smallest_cost(self.options, cost="bytes")
            return size / self.candidates.dense.size.bytes
        if not fastest:
            saved = sum(site.options[0].params for site in self.options) - smallest_cost(self.options, cost="params")
            return 1 - saved / self.candidates.dense.size.params
        assert self.timing is not None
        table = self.timing.table
        rated = priced(self.options, table)
        saved = sum(site.options[0].nanoseconds for site in rated) - smallest_cost(rated, cost="nanoseconds")
        return 1 - table.model.scale * saved / table.model.dense_nanoseconds

    def _options(self) -> Sequence[SiteOptions]:
        """The options of every site, known or computed now."""
        kept = self.kept
        if kept is None and self.finished is not None:
            kept = SweepCache(folder=self.finished.begun())
        if kept is not None and (known := kept.options()) is not None:
            self.calibration.declined.update(known[1])
            return known[0]
        options = self.calibration.options(self.streams, self.progress)
        if kept is not None:
            kept.keep_options(options, self.calibration.declined)
        return options

    def _factors(self, splits: Mapping[str, tuple[Form, int]], bits: Mapping[str, int]) -> dict[str, FittedSite]:
        """Factors of these splits in these bits: of an interrupted run, or fitted now."""
        wanted = {name: (*split, bits[name]) for name, split in splits.items()}
        if self.finished is not None and (known := self.finished.fitted(wanted)) is not None:
            self.calibration.declined.update(known[1])
            return known[0]
        fitted = self.calibration.fit(self.streams.only(splits), splits, self.progress, bits)
        if self.finished is not None:
            self.finished.keep_fitted(wanted, fitted, self.calibration.declined)
        if self.kept is not None:
            self.kept.sensitivities = self.streams.sensitivities()
        return fitted

    def _by_budget(self, budget: Budget, measure: Callable[[Decisions], int] | None = None) -> Decisions:
        return decide_by_budget(budget, self.options, self.candidates.dense.size, self.streams, measure)

    def _measured(self, budget: Budget, decisions: Decisions) -> int:
        """Write the model of some decisions and return its cost in the unit of a budget."""
        sites = {site.name: site for site in self.streams.sites}
        splits = planned_splits(decisions, self.streams)
        fitted = {name: zero_filled(sites[name], *split) for name, split in splits.items()}
        with self.candidates.written(replace(unfitted(decisions, self.filters), fitted=fitted)) as (path, split):
            if budget.cost == "params":
                return split.params
            if budget.cost == "bytes":
                return file_bytes(path)
            dense = self.candidates.dense
            return sum(trace_run(path, dense.feeds).macs.values()) // dense.batch


def unfitted(decisions: Decisions, filters: Filters) -> Planned:
    """Return decisions without fitted factors."""
    return Planned(planner=FixedPlanner(decisions=decisions, filters=filters), fitted={})
