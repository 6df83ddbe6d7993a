"""The calibrated steps of an export: decide every site on unlabelled data, and fit the factors to them.

dense.onnx, data --> OnnxStreams --> options --> budget --> decisions --> fitted factors
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graph_passes.forms import Form
from rsi_deploy.calibration.activations import FittedSite
from rsi_deploy.calibration.calibration_data import CalibrationData, refuse_shared
from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.core.progress import at_samples
from rsi_deploy.core.sites import site_name
from rsi_deploy.evaluation.accuracy import evaluate
from rsi_deploy.execution.result_store import ResultStore
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.exporting.timing.timed_export import TimedExport
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import (
    Decisions,
    Planned,
    decide_by_budget,
    decide_by_plan,
    decide_uniformly,
    decisions_of,
    planned_splits,
    zero_filled,
)
from rsi_deploy.planning.knapsack import SiteOptions, smallest_cost
from rsi_deploy.planning.planner import Decision, Filters, FixedPlanner, Planner, SitePlanner
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.runtime.shape_trace import trace_run

Progress = Callable[[str, int, int], None]

SEARCH_STEPS = 6
ENOUGH_ROWS = 4
"""Rows of calibration data for every input of a site below which the report warns."""


@dataclass(kw_only=True)
class Calibrator:
    """Decides the sites of one export and fits their factors.

    Attributes:
        request: what decides the ranks.
        dense: the dense model.
        planner: planner of the same rank everywhere; None where something else decides.
        filters: sites that may be split.
        solver: computes singular subspaces; the choice of rows takes its seed.
        write: writes a candidate as the final model is written.
        provider: onnxruntime provider.
        progress: called before each site.
        timing: the times to plan with; None where they decide nothing.
        kept: what earlier exports of the same model and data have found; None without.
        finished: results of an interrupted run of this export; None without.
        notes: notes on the data, for the report.
    """

    request: RankRequest
    dense: DenseModel
    planner: Planner | None
    filters: Filters
    solver: Solver
    write: Callable[[Planned, Path], SplitModel]
    provider: str
    progress: Progress | None
    timing: TimedExport | None = None
    kept: SweepCache | None = None
    finished: ResultStore | None = None
    notes: list[str] = field(default_factory=list)
    _streams: OnnxStreams | None = field(default=None, init=False)
    _data: CalibrationData | None = field(default=None, init=False)

    def planned(self) -> Planned:
        """Decide every site and fit the factors.

        Raises:
            UsageError: data, a plan or filters that do not fit the model.
            ModelError: NaN on the way, or a budget that no plan can meet.
            GateError: no model keeps `max_drop`.
        """
        request, dense, sites = self.request, self.dense, self.dense.sites
        if self.planner is not None:
            self.planner.check([(site_name(s.weight), s.out_features, s.in_features) for s in sites])
        self.filters.check([site_name(site.weight) for site in sites])
        decisions = None if request.plan is None else decide_by_plan(request.plan, sites, self.filters)
        if request.calib is not None:
            data = self.data()
            if dense.dataset is not None and not request.allow_shared_data:
                refuse_shared(data, dense.dataset, dense.inputs, dense.preprocessing)
            if request.is_fitted or request.is_searched:
                return self._calibrated(data, decisions)
        if decisions is None:
            assert self.planner is not None
            return Planned(planner=self.planner, fitted={})
        return self._made(decisions)

    def data(self) -> CalibrationData:
        """Return the calibration data, opened once.

        Raises:
            UsageError: data that do not fit the model, or check data that share samples with the fit part.
        """
        request, dense = self.request, self.dense
        assert request.calib is not None
        if self._data is None:
            self._data = CalibrationData(
                request.calib,
                dense.inputs,
                dense.preprocessing,
                request.calib_size,
                check_size=request.check_size,
                check_source=request.calib_check,
                seed=self.solver.seed,
            )
        return self._data

    def _calibrated(self, data: CalibrationData, decisions: Decisions | None) -> Planned:
        """Decide what no plan has decided, and fit."""
        request, streams = self.request, self._streams_of(data)
        if not streams.sites and decisions is None:
            raise ModelError(
                f"calibration reaches no site: {listed(streams.unreachable) or 'the filters let none through'}"
                f"; change --include or --exclude, or leave out --calib"
            )
        calibration = Calibration(solver=self.solver, min_rank=request.min_rank, rank_multiple=request.rank_multiple)

        def fit(decided: Decisions) -> Planned:
            return self._made(decided, streams, calibration)

        if decisions is not None:
            made = fit(decisions)
        elif self.planner is not None:
            made = fit(decide_uniformly(self.planner, streams))
        else:
            options = self._options(calibration, streams)
            if self.timing is not None:
                options = self.timing.narrowed(options)
            if (dense := self._nothing_faster(options, streams)) is not None:
                made = self._made(dense)
            elif request.budget is not None:
                made = fit(self._within(request.budget, options, streams))
            else:
                made = self._smallest(options, streams, fit)
        self.notes.extend(remarks(streams, data))
        return made

    def _streams_of(self, data: CalibrationData) -> OnnxStreams:
        """The model with the data; made once, for its sensitivities hold for every fit."""
        dense = self.dense
        if self._streams is None:
            self._streams = OnnxStreams(
                dense.path,
                data.feeds,
                data.samples,
                wanted=lambda name: not self.filters.refusal(name),
                # Of the products with weights alone, not of the attention that a node has beside.
                macs={node: count - dense.attention_macs.get(node, 0) for node, count in dense.macs.items()},
                provider=self.provider,
                seed=self.solver.seed,
                before_ids=True,
                sensitivities=None if self.kept is None else self.kept.sensitivities,
                proto=dense.proto,
                sites=dense.sites,
            )
        return self._streams

    def _nothing_faster(self, options: Sequence[SiteOptions], streams: OnnxStreams) -> Decisions | None:
        """All sites dense, where no split of any site is faster; None where some are.

        Raises:
            ModelError: the dense model misses the budget.
        """
        if self.timing is None or not self.timing.reasons or any(len(site.options) > 1 for site in options):
            return None
        self.timing.without_any(options, self.request.budget)
        choice = {site.name: site.options[0] for site in options}
        return self.timing.explained(decisions_of(choice, (), streams))

    def _options(self, calibration: Calibration, streams: OnnxStreams) -> Sequence[SiteOptions]:
        """Every site's options, from an earlier export or this calibration."""
        kept = self.kept
        if kept is None and self.finished is not None:
            kept = SweepCache(folder=self.finished.begun())
        if kept is not None and (known := kept.options()) is not None:
            calibration.declined.update(known[1])
            return known[0]
        options = calibration.options(streams, self.progress)
        if kept is not None:
            kept.keep_options(options, calibration.declined)
        return options

    def again(self, planner: SitePlanner) -> Planned:
        """Fit the factors of a planner's decisions, each in the network whose earlier sites are replaced."""
        decisions = {
            site_name(s.weight): planner.decide(site_name(s.weight), s.out_features, s.in_features)
            for s in self.dense.sites
        }
        return self._calibrated(self.data(), decisions)

    def _within(self, budget: Budget, options: Sequence[SiteOptions], streams: OnnxStreams) -> Decisions:
        """The decisions for a budget of the whole model."""
        if budget.cost == "nanoseconds":
            assert self.timing is not None
            return self.timing.explained(self.timing.within(budget, options, streams))
        try:
            decisions = decide_by_budget(budget, options, self.dense.size, streams, self._measure(budget, streams))
        except ModelError as error:
            if self.timing is None or not self.timing.reasons:
                raise
            raise ModelError(
                f"{error}; only splits that were measured faster were taken ({len(self.timing.reasons)} sites have "
                f"none): --allow-slower takes the others too"
            ) from error
        return decisions if self.timing is None else self.timing.explained(decisions)

    def _made(
        self, decisions: Decisions, streams: OnnxStreams | None = None, calibration: Calibration | None = None
    ) -> Planned:
        """The decisions, with fitted factors where the request has them."""
        fitted = {}
        if streams is not None and calibration is not None and self.request.is_fitted:
            wanted = planned_splits(decisions, streams)
            fitted = self._fitted(wanted, streams, calibration)
            idle = dict.fromkeys(wanted.keys() - fitted.keys(), "never executed on the calibration data")
            decisions |= {name: Decision(rank=None, reason=reason) for name, reason in idle.items()}
        if calibration is not None:
            decisions |= {name: Decision(rank=None, reason=why) for name, why in calibration.declined.items()}
        return Planned(planner=FixedPlanner(decisions=decisions, filters=self.filters), fitted=fitted)

    def _fitted(
        self, wanted: Mapping[str, tuple[Form, int]], streams: OnnxStreams, calibration: Calibration
    ) -> dict[str, FittedSite]:
        """Factors of these splits: of an interrupted run, or fitted now."""
        if self.finished is not None and (known := self.finished.fitted(wanted)) is not None:
            calibration.declined.update(known[1])
            return known[0]
        fitted = calibration.fit(streams.only(wanted), wanted, self.progress)
        if self.finished is not None:
            self.finished.keep_fitted(wanted, fitted, calibration.declined)
        if self.kept is not None:
            self.kept.sensitivities = streams.sensitivities()
        return fitted

    def _measure(self, budget: Budget, streams: OnnxStreams) -> Callable[[Decisions], int]:
        """A function that writes the model of some decisions and returns its cost in the budget's unit."""
        sites = {site.name: site for site in streams.sites}

        def measure(decisions: Decisions) -> int:
            fitted = {
                name: zero_filled(sites[name], *split) for name, split in planned_splits(decisions, streams).items()
            }
            planner = FixedPlanner(decisions=decisions, filters=self.filters)
            with self._candidate(Planned(planner=planner, fitted=fitted)) as (path, split):
                if budget.cost == "params":
                    return split.params
                if budget.cost == "bytes":
                    return file_bytes(path)
                return sum(trace_run(path, self.dense.feeds).macs.values()) // self.dense.batch

        return measure

    def _smallest(
        self, options: Sequence[SiteOptions], streams: OnnxStreams, fit: Callable[[Decisions], Planned]
    ) -> Planned:
        """The smallest model that keeps `max_drop`, by bisection on the share of parameters."""
        assert self.request.max_drop is not None
        assert self.dense.accuracy is not None
        assert self.dense.accuracy.top1 is not None
        total = self.dense.size.params
        saved = sum(site.options[0].params for site in options) - smallest_cost(options, cost="params")
        if not saved:
            raise ModelError("--max-drop: no rank of any site saves anything; let more sites be split (--include)")
        low, high, best, least = 1 - saved / total, 1.0, None, 100.0
        for _ in range(SEARCH_STEPS):
            share = (low + high) / 2
            made = fit(decide_by_budget(Budget(keep_params=share), options, self.dense.size, streams))
            drop = self.dense.accuracy.top1 - self._top1(made)
            least = min(least, drop)
            if drop <= self.request.max_drop:
                high, best = share, made
            else:
                low = share
        if best is None:
            raise GateError(
                f"--max-drop {self.request.max_drop:g}: no compressed model keeps it; the least drop seen is "
                f"{least:.2f} points; allow more, or give more calibration data"
            )
        return best

    def _top1(self, made: Planned) -> float:
        dataset = self.dense.dataset
        assert dataset is not None
        steps = self.dense.preprocessing if dataset.kind == "images" else None
        with self._candidate(made) as (path, _):
            result = evaluate(path, dataset, preprocessing=steps, provider=self.provider, progress=at_samples)
        return result.top1 or 0.0

    @contextmanager
    def _candidate(self, made: Planned) -> Iterator[tuple[Path, SplitModel]]:
        """A model that is written to be measured, and deleted."""
        path = self.dense.path.with_name("candidate.onnx")
        try:
            yield path, self.write(made, path)
        finally:
            for file in (path, path.with_name(f"{path.name}.data")):
                file.unlink(missing_ok=True)


def remarks(streams: OnnxStreams, data: CalibrationData) -> list[str]:
    """Return notes on sites out of reach and on scarce data."""
    found = []
    if streams.unreachable:
        found.append(f"not calibrated: {listed(streams.unreachable)}")
    rows = {site: count for site in streams.sites if (count := streams.rows_of(site.name))}
    scarce = [site for site, count in rows.items() if count < ENOUGH_ROWS * site.in_features]
    if scarce:
        site = min(scarce, key=lambda site: rows[site] / site.in_features)
        wanted = data.samples_for(-(-ENOUGH_ROWS * site.in_features * data.samples // max(rows[site], 1)))
        there_are = f" (--calib-size; there are {data.available:,})" if data.has_more else ""
        found.append(
            f"{data.samples} samples of the fit{there_are} give {len(scarce)} sites fewer than {ENOUGH_ROWS} rows an "
            f"input ({site.name}: {rows[site]} rows for {site.in_features}); about {wanted:,} samples would do"
        )
    return found


def listed(reasons: Mapping[str, str]) -> str:
    """Return the names by reason, a few of each.

    Example:
        >>> listed({"a": "shared", "b": "shared", "c": "nested"})
        'a, b (shared); c (nested)'
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(who[:3])}{', ...' * (len(who) > 3)} ({why})" for why, who in names.items())
