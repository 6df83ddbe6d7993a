"""The calibrated steps of an export: decide every site on unlabelled data, and fit the factors to them.

dense.onnx, data --> OnnxStreams --> options --> budget --> decisions --> fitted factors
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from graph_passes.forms import Form
from rsi_deploy.calibration.activations import FittedSite
from rsi_deploy.calibration.calibration_data import BATCH, CalibrationData, refuse_shared
from rsi_deploy.calibration.output_agreement import PartOutputs, dense_outputs, measure_of
from rsi_deploy.calibration.record import CalibrationRecord, OutputQuality
from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.core.progress import at_samples
from rsi_deploy.core.sites import break_even_rank, site_name
from rsi_deploy.evaluation.accuracy import evaluate
from rsi_deploy.evaluation.intervals import share_at_least
from rsi_deploy.execution.result_store import ResultStore
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.plan_check import (
    OutputCheck,
    at_fault,
    foreseen_loss,
    is_much_worse,
    kept_dense,
    loss_shown,
    returned,
)
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.exporting.size_search import SizeSearch
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
    total_of,
    zero_filled,
)
from rsi_deploy.planning.knapsack import SiteOptions, smallest_cost
from rsi_deploy.planning.latency_search import options_with_saving, priced, saving_of
from rsi_deploy.planning.planner import Decision, Filters, FixedPlanner, Planner, SitePlanner
from rsi_deploy.planning.quality import KINDS, OPTIONS, Measure, QualityBudget
from rsi_deploy.planning.record import PlanRecord
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.report.outlook import Outlook, PointOutlook, SiteOutlook
from rsi_deploy.runtime.shape_trace import trace_run

Progress = Callable[[str, int, int], None]

NEAREST_STEPS = 4
"""Most models that are fitted to find the nearest budget that holds up."""
SHARES = (0.9, 0.8, 0.7, 0.5)
"""Shares of the parameters at which `inspect --calib` judges the whole model."""
DROP_AIM = 0.05
"""Foreseen loss of the first model that is tried for a drop of the accuracy."""
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
        outputs: part of the calibration data -> outputs of the dense model, as far as they were computed.
        notes: notes on the data, for the report.
        record: what was foreseen and tried; None where a rank or a plan decides.
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
    outputs: dict[str, PartOutputs] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    record: PlanRecord | None = None
    _streams: OnnxStreams | None = field(default=None, init=False)
    _data: CalibrationData | None = field(default=None, init=False)

    def planned(self) -> Planned:
        """Decide every site and fit the factors.

        Raises:
            UsageError: data, a plan or filters that do not fit the model.
            ModelError: NaN on the way, or a budget that no plan can meet.
            GateError: no model keeps `max_drop`, or the budget breaks the model.
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
        if self._data is None:
            request = self.request
            data = self._opened(request.calib, request.check_size)
            if request.quality is not None and request.check_size is None and request.calib_check is None:
                wished = request.quality.wished(data.available - request.calib_size)
                data = data if wished is None else self._opened(data.fit.feeding.dataset, wished)
            if request.quality is not None:
                self._refuse_quality(request.quality, data)
            self._data = data
        return self._data

    def _opened(self, source: Any, check_size: int | None) -> CalibrationData:
        request, dense = self.request, self.dense
        return CalibrationData(
            source,
            dense.inputs,
            dense.preprocessing,
            request.calib_size,
            check_size=check_size,
            check_source=request.calib_check,
            seed=self.solver.seed,
        )

    def _calibrated(self, data: CalibrationData, decisions: Decisions | None) -> Planned:
        """Decide what no plan has decided, and fit."""
        request, streams = self.request, self._streams_of(data)
        if not streams.sites and decisions is None:
            raise ModelError(
                f"calibration reaches no site: {listed(streams.unreachable) or 'the filters let none through'}"
                f"; change --include or --exclude, or leave out --calib"
            )
        calibration = self._calibration()

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
                made = self._checked(request.budget, options, streams, fit)
            else:
                made = self._smallest(options, streams, fit)
        self.notes.extend(remarks(streams, data))
        return made

    def _calibration(self) -> Calibration:
        request = self.request
        return Calibration(solver=self.solver, min_rank=request.min_rank, rank_multiple=request.rank_multiple)

    @property
    def delivers_dense(self) -> bool:
        """Return whether the dense model is delivered, because no other is faster or keeps the limit."""
        of_time = self.timing is not None and self.timing.delivers_dense
        return of_time or (self.record is not None and self.record.delivers_dense)

    def measure(self) -> Measure:
        """Return the measure of quality that fits the model's outputs, from the first samples of the fit part."""
        request, dense = self.request, self.dense
        whole = CalibrationData(request.calib or {}, dense.inputs, dense.preprocessing, request.calib_size)
        some = CalibrationData(
            whole.fit.feeding.dataset, dense.inputs, dense.preprocessing, whole.axes.fixed or BATCH, check_size=0
        )
        return measure_of(dense_outputs(dense.path, some.fit, self.provider, dense.proto).batches)

    def _refuse_quality(self, quality: QualityBudget, data: CalibrationData) -> None:
        """Refuse a quality that the outputs do not have, or that the check part cannot show.

        Raises:
            UsageError: says what to type.
        """
        if quality.measure != "output_error" and (fits := self.measure()) != quality.measure:
            found = KINDS[fits] if fits != "output_error" else "neither class scores nor embeddings"
            fitting = " or ".join(dict.fromkeys((OPTIONS[fits], OPTIONS["output_error"])))
            raise UsageError(
                f"{OPTIONS[quality.measure]} is for {KINDS[quality.measure]}, but this model's outputs are {found}; "
                f"type {fitting}"
            )
        samples = 0 if data.check is None else data.check.samples
        option = "--calib-check" if data.is_separate else "--calib"
        if quality.measure == "agreement" and not quality.holds(highest := share_at_least(samples, samples) / 100):
            needed = quality.needed
            would_do = "no number of samples shows 100 %"
            if needed is not None:
                would_do = f"{option} with {needed if data.is_separate else 2 * needed:,} samples would do"
            raise UsageError(
                f"{quality}: the check part has {samples:,} samples, which can show {100 * highest:.1f} % at most; "
                f"{would_do}, or --min-agreement {_floor(100 * highest)}%"
            )
        if data.needed is not None:
            raise UsageError(
                f"{quality}: the check part has {samples:,} samples, too few to judge by; {option} with {data.needed} "
                f"samples would do"
            )

    def outlook(self) -> Outlook:
        """Return what unseen data keep of every site at half of its parameters, and of the model at several sizes.

        Raises:
            UsageError: too few samples for a check part.
            ModelError: calibration reaches no site.
        """
        data = self.data()
        if data.check is None:
            raise UsageError("--calib has a single sample, so none is left to check on; add more samples")
        streams, calibration = self._streams_of(data), self._calibration()
        options = self._options(calibration, streams)
        half = {}
        for site in streams.sites:
            rank = int(break_even_rank(*site.shape(site.forms[0])) / 2)
            if rank:
                half[site.name] = Decision(rank=rank, reason="", form=site.forms[0])
        fitted = self._made(half, streams, calibration).fitted
        points = []
        for share in SHARES:
            try:
                decisions = decide_by_budget(Budget(keep_params=share), options, self.dense.size, streams)
            except ModelError:  # no plan is so small
                continue
            quality = self._check.quality(self._made(decisions, streams, calibration))
            points.append(PointOutlook(share=share, quality=quality))
        sites = tuple(
            SiteOutlook(
                name=name,
                form=site.replacement.form,
                rank=site.replacement.right.shape[-2],
                held_out=site.held_out_error,
                in_sample=site.response_error,
            )
            for name, site in fitted.items()
        )
        return Outlook(samples=data.samples, check_samples=data.check.samples, sites=sites, points=tuple(points))

    def missed(self, found: CalibrationRecord | None) -> list[str]:
        """Return a note where the delivered model does not keep the quality: splits were undone after the search."""
        quality = self.request.quality
        if quality is None or found is None or self.delivers_dense or quality.holds(quality.limit_of(found.quality)):
            return []
        return [f"{quality} is MISSED by the finished model: splits were undone after planning; export again"]

    @cached_property
    def _check(self) -> OutputCheck:
        """What judges candidates on the check part."""
        dense = self.dense
        return OutputCheck(
            dense=dense.path,
            proto=dense.proto,
            data=self.data(),
            provider=self.provider,
            candidate=self._candidate,
            outputs=self.outputs,
        )

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

    def _checked(
        self,
        budget: Budget,
        options: Sequence[SiteOptions],
        streams: OnnxStreams,
        fit: Callable[[Decisions], Planned],
    ) -> Planned:
        """The model within a budget, compared with what its plan foresaw.

        Raises:
            GateError: the model is broken on the check part; names the nearest budget that holds up.
        """
        decisions = self._within(budget, options, streams)
        made = fit(decisions)
        if not self._check.is_possible:
            self.record = PlanRecord(foreseen=foreseen_loss(decisions, options))
            return made
        foreseen, quality = foreseen_loss(decisions, options), self._check.quality(made)
        shown, given_back = loss_shown(quality), tuple[str, ...]()
        if is_much_worse(shown, foreseen):
            guilty = at_fault(made, decisions, options, self._check)
            if again := self._without(guilty, budget, options, streams):
                names, others = again
                other = fit(others)
                if (less := loss_shown(better := self._check.quality(other))) < shown:
                    made, quality, shown, given_back = other, better, less, names
                    foreseen = foreseen_loss(others, options)
        self.record = PlanRecord(
            foreseen=foreseen, shown=shown if math.isfinite(shown) else None, given_back=given_back
        )
        if (quality is None or quality.is_broken) and not self.request.allow_broken:
            kept = "gives NaN or infinite outputs" if quality is None else f"keeps {_kept(quality)}"
            nearest = self._nearest(budget, options, streams, fit)
            if nearest is None:
                raise GateError(
                    f"{budget}: the compressed model is broken: it {kept} on the check part, and no larger budget that "
                    f"was tried holds up; leave sites dense (--exclude), give more samples, or add --allow-broken"
                )
            raise GateError(
                f"{budget}: the compressed model is broken: it {kept} on the check part; type {nearest}, the nearest "
                f"that was found to hold up, or add --allow-broken"
            )
        return made

    def _without(
        self, names: Sequence[str], budget: Budget, options: Sequence[SiteOptions], streams: OnnxStreams
    ) -> tuple[tuple[str, ...], Decisions] | None:
        """Return the most helpful of these sites that can be dense within a budget, and the decisions without them."""
        for count in range(len(names), 0, -1):
            try:
                decisions = self._within(budget, kept_dense(options, names[:count]), streams)
            except ModelError:  # the budget cannot spare these splits
                continue
            return tuple(names[:count]), returned(decisions, names[:count])
        return None

    def _nearest(
        self,
        budget: Budget,
        options: Sequence[SiteOptions],
        streams: OnnxStreams,
        fit: Callable[[Decisions], Planned],
    ) -> Budget | None:
        """Return the smallest larger budget that holds up, found by bisection; None if none does that is tried."""
        total = self._total(budget)
        low, high, nearest = min(budget.total(total) / total, 1.0), 1.0, None
        for _ in range(NEAREST_STEPS):
            share = round((low + high) / 2, 3)
            found = self._check.quality(fit(self._at(budget, share, total, options, streams)))
            if found is None or found.is_broken:
                low = share
            else:
                high, nearest = share, budget.at(share, total)
        return nearest

    def _at(
        self, budget: Budget, share: float, total: int, options: Sequence[SiteOptions], streams: OnnxStreams
    ) -> Decisions:
        """The decisions for a budget of the same kind; times are those of the table."""
        if budget.cost != "nanoseconds":
            return decide_by_budget(budget.at(share, total), options, self.dense.size, streams)
        return self._in_time(share, options, streams)

    def _total(self, budget: Budget) -> int:
        """The cost of the dense model in the budget's unit."""
        if budget.cost != "nanoseconds":
            return total_of(budget, self.dense.size)
        assert self.timing is not None
        return self.timing.table.model.dense_nanoseconds

    def _in_time(self, share: float, options: Sequence[SiteOptions], streams: OnnxStreams) -> Decisions:
        """The decisions for a share of the dense model's time by the table."""
        assert self.timing is not None
        table = self.timing.table
        choice = options_with_saving(priced(options, table), saving_of(share, table), table)
        return decisions_of(choice, {site.name for site in options if len(site.options) > 1}, streams)

    def _smallest(
        self, options: Sequence[SiteOptions], streams: OnnxStreams, fit: Callable[[Decisions], Planned]
    ) -> Planned:
        """The smallest or fastest model that keeps `max_drop` or `quality`; the dense one where none keeps `quality`.

        Raises:
            ModelError: no rank of any site saves anything.
            GateError: no model keeps `max_drop`.
        """
        request, size = self.request, self.dense.size
        limit = f"--max-drop {request.max_drop:g}" if request.quality is None else str(request.quality)
        if request.fastest:
            assert self.timing is not None
            table = self.timing.table
            rated = priced(options, table)
            saved = sum(site.options[0].nanoseconds for site in rated) - smallest_cost(rated, cost="nanoseconds")
            smallest = 1 - table.model.scale * saved / table.model.dense_nanoseconds
        else:
            saved = sum(site.options[0].params for site in options) - smallest_cost(options, cost="params")
            smallest = 1 - saved / size.params
        if not saved:
            raise ModelError(
                f"{limit.split()[0]}: no rank of any site saves anything; let more sites be split (--include)"
            )

        def plan(share: float) -> Decisions:
            if request.fastest:
                return self._in_time(share, options, streams)
            return decide_by_budget(Budget(keep_params=share), options, size, streams)

        search = SizeSearch(
            plan=plan,
            foreseen=lambda decisions: foreseen_loss(decisions, options),
            splits=lambda decisions: planned_splits(decisions, streams),
            fit=fit,
            judge=self._drop if request.quality is None else self._quality,
            smallest=max(smallest, 0.0),
            aim=DROP_AIM if request.quality is None else request.quality.foreseen,
        )
        best = search.run()
        if best is not None and request.quality is not None and not request.fastest and self._is_larger(best):
            best = None
        self.record = PlanRecord(
            limit=limit,
            is_default=request.is_default,
            is_fastest=request.fastest,
            trials=tuple(search.trials),
            delivers_dense=best is None,
        )
        if best is None and request.quality is None:
            least = min(trial.value for trial in search.trials if trial.value is not None)
            raise GateError(
                f"{limit}: no compressed model keeps it; the least drop seen is {least:.2f} points; allow more, or "
                f"give more calibration data"
            )
        if best is None:
            return self._made({site.name: Decision(rank=None, reason=f"no split keeps {limit}") for site in options})
        assert isinstance(best.planner, FixedPlanner)
        shown = None if request.quality is None else loss_shown(self._check.quality(best))
        foreseen = foreseen_loss(dict(best.planner.decisions), options)
        self.record = self.record.model_copy(update={"foreseen": foreseen, "shown": shown})
        return best

    def _is_larger(self, made: Planned) -> bool:
        """Return whether a model has a larger file than the user's."""
        with self._candidate(made) as (path, _):
            return file_bytes(path) > self.dense.size.bytes

    def _quality(self, made: Planned) -> tuple[float | None, bool]:
        """The one-sided limit of the quality on the check part, and whether it keeps the request's."""
        budget, found = self.request.quality, self._check.quality(made)
        assert budget is not None
        limit = None if found is None else budget.limit_of(found)
        return limit, budget.holds(limit)

    def _drop(self, made: Planned) -> tuple[float | None, bool]:
        """The drop of top-1 in points, and whether the request allows it."""
        assert self.request.max_drop is not None
        assert self.dense.accuracy is not None
        assert self.dense.accuracy.top1 is not None
        drop = self.dense.accuracy.top1 - self._top1(made)
        return drop, drop <= self.request.max_drop

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


def _kept(quality: OutputQuality) -> str:
    """Return the first value of a quality in words."""
    if quality.agreement is not None:
        return f"{quality.agreement:.1f} % of the answers"
    if quality.cosine is not None:
        return f"a mean cosine of {quality.cosine:.3f}"
    return f"an output error of {100 * (quality.output_error or 0):.0f} %"


def _floor(percent: float) -> str:
    """Return a number of percent, rounded down to a tenth.

    Example:
        >>> _floor(95.42), _floor(98.0)
        ('95.4', '98')
    """
    return f"{math.floor(10 * percent) / 10:g}"


def remarks(streams: OnnxStreams, data: CalibrationData) -> list[str]:
    """Return notes on sites out of reach and on scarce data."""
    found = []
    if streams.unreachable:
        found.append(f"not calibrated: {listed(streams.unreachable)}")
    rows = {site: count for site in streams.sites if (count := streams.rows_of(site.name))}
    scarce = [site for site, count in rows.items() if count < ENOUGH_ROWS * site.in_features]
    if scarce:
        site = min(scarce, key=lambda site: rows[site] / site.in_features)
        enough = data.samples_for(-(-ENOUGH_ROWS * site.in_features * data.samples // max(rows[site], 1)))
        there_are = f" (--calib-size; there are {data.available:,})" if data.has_more else ""
        found.append(
            f"{data.samples} samples of the fit{there_are} give {len(scarce)} sites fewer than {ENOUGH_ROWS} rows an "
            f"input ({site.name}: {rows[site]} rows for {site.in_features}); about {enough:,} samples would do"
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
