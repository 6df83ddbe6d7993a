"""The calibrated step of an export: decide every site on unlabelled data, and fit the factors to them.

dense.onnx, data --> OnnxStreams --> options --> budget --> decisions --> fitted factors
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from graph_passes.forms import FOLDED, Form
from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.calibration.calibration_data import CalibrationData, refuse_shared
from rsi_deploy.calibration.output_agreement import PartOutputs
from rsi_deploy.calibration.record import CalibrationRecord
from rsi_deploy.calibration.rounding import keep_second_moments_
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.sites import site_name
from rsi_deploy.execution.result_store import ResultStore
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.calibrated.candidates import Candidates
from rsi_deploy.exporting.calibrated.data_checks import listed, opened_data, remarks
from rsi_deploy.exporting.calibrated.outlook import outlook_of
from rsi_deploy.exporting.calibrated.plan_check import checked_model
from rsi_deploy.exporting.calibrated.planner import CalibratedPlanner, Progress, unfitted
from rsi_deploy.exporting.calibrated.size_search import searched_model
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.exporting.timing.timed_export import TimedExport
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.decide import Decisions, Planned, decide_by_plan, decide_uniformly, decisions_of, refuse_units
from rsi_deploy.planning.planner import Filters, Planner, SitePlanner
from rsi_deploy.planning.record import PlanRecord
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.planning.site_options import FORMS, LOW_FORMS, Calibration
from rsi_deploy.report.outlook import Outlook


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
        kept: results of earlier exports of the same model and data; None without.
        finished: results of an interrupted run of this export; None without.
        outputs: part of the calibration data -> outputs of the dense model, as far as they were computed.
        inputs: second moments of the sites' inputs in the dense model, as far as they were computed.
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
    inputs: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    record: PlanRecord | None = None

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
        decisions = None if request.plan is None else decide_by_plan(request.plan, sites, self.filters, dense.unsplit)
        if decisions is not None and not request.is_fitted:
            refuse_units(decisions)
        if request.calib is not None:
            if dense.dataset is not None and not request.allow_shared_data:
                refuse_shared(self.data, dense.dataset, dense.inputs, dense.preprocessing)
            if request.is_fitted or request.is_searched:
                return self._calibrated(decisions)
        if decisions is not None:
            return unfitted(decisions, self.filters)
        assert self.planner is not None
        return Planned(planner=self.planner, fitted={})

    def again(self, planner: SitePlanner) -> Planned:
        """Fit the factors of a planner's decisions, each in the network whose earlier sites are replaced."""
        sites = [(site_name(site.weight), site) for site in self.dense.sites]
        return self._calibrated({name: planner.decide(name, s.out_features, s.in_features) for name, s in sites})

    def outlook(self) -> Outlook:
        """Return what unseen data keep of every site at half of its parameters, and of the model at several sizes.

        Raises:
            UsageError: too few samples for a check part.
            ModelError: calibration reaches no site.
        """
        if self.data.check is None:
            raise UsageError("--calib has a single sample, so none is left to check on; add more samples")
        return outlook_of(self._planner().with_options())

    def planner_for(
        self, bits_of: Callable[[CalibratedSite], tuple[int, ...]], *, with_repairs: bool
    ) -> CalibratedPlanner:
        """Return a planner with the options of every site in every number of bits that it may be stored in.

        Raises:
            UsageError: data or filters that do not fit the model.
            ModelError: NaN on the way.
        """
        self.filters.check([site_name(site.weight) for site in self.dense.sites])
        planner = self._planner()
        calibration = replace(
            planner.calibration, bits_of=bits_of, with_repairs=with_repairs, inputs=self.inputs, forms=self._forms
        )
        found = replace(planner, calibration=calibration, finished=None).with_options()
        self.notes.extend(remarks(self._streams, self.data))
        return found

    def input_moments(self) -> Mapping[str, Tensor]:
        """Return site name -> second moments of its inputs in the dense model, float32 `(groups, in, in)`."""
        if not self.inputs:
            self._streams.survey(lambda site, moments: keep_second_moments_(self.inputs, site.name, moments))
        return self.inputs

    def missed(self, found: CalibrationRecord | None) -> list[str]:
        """Return a note where the delivered model does not keep the quality: splits were undone after the search."""
        quality = self.request.quality
        if quality is None or found is None or self.delivers_dense or quality.holds(quality.limit_of(found.quality)):
            return []
        return [f"{quality} is MISSED by the finished model: splits were undone after planning; export again"]

    @property
    def delivers_dense(self) -> bool:
        """Return whether the dense model is delivered, because no other is faster or keeps the limit."""
        of_time = self.timing is not None and self.timing.delivers_dense
        return of_time or (self.record is not None and self.record.delivers_dense)

    @cached_property
    def data(self) -> CalibrationData:
        """The calibration data.

        Raises:
            UsageError: data that do not fit the model, or that cannot show the quality.
        """
        return opened_data(self.request, self.dense, self.solver.seed, self.provider)

    def _calibrated(self, decisions: Decisions | None) -> Planned:
        """Decide what no plan has decided, and fit."""
        streams, planner = self._streams, self._planner()
        if decisions is None and not streams.sites:
            raise ModelError(
                f"calibration reaches no site: {listed(streams.unreachable) or 'the filters let none through'}"
                f"; change --include or --exclude, or leave out --calib"
            )
        if decisions is None and self.planner is not None:
            decisions = decide_uniformly(self.planner, streams)
        made = self._searched(planner.with_options()) if decisions is None else planner.fit(decisions)
        self.notes.extend(remarks(streams, self.data))
        return made

    def _searched(self, planner: CalibratedPlanner) -> Planned:
        """The model within the budget, or the smallest or fastest one that keeps a limit."""
        request, timing, options = self.request, self.timing, planner.options
        if timing is not None and timing.reasons and not any(len(site.options) > 1 for site in options):
            timing.deliver_dense(options, request.budget)
            choice = {site.name: site.options[0] for site in options}
            return unfitted(timing.explained(decisions_of(choice, (), self._streams)), self.filters)
        if request.budget is None:
            made, self.record = searched_model(request, planner)
        else:
            made, self.record = checked_model(request.budget, planner, allow_broken=request.allow_broken)
        return made

    def _planner(self) -> CalibratedPlanner:
        """What decides and fits the sites; a new one for each plan, because it records sites that it declines."""
        request = self.request
        return CalibratedPlanner(
            streams=self._streams,
            calibration=Calibration(
                solver=self.solver,
                min_rank=request.min_rank,
                rank_multiple=request.rank_multiple,
                forms=self._forms,
            ),
            candidates=Candidates(
                dense=self.dense, data=self.data, provider=self.provider, write=self.write, outputs=self.outputs
            ),
            timing=self.timing,
            filters=self.filters,
            is_fitted=request.is_fitted,
            progress=self.progress,
            kept=self.kept,
            finished=self.finished,
        )

    @property
    def _forms(self) -> tuple[Form, ...]:
        """The forms that a budget may choose. Folded ones need fitted factors."""
        forms = FORMS if self.request.pivoted else LOW_FORMS
        return forms if self.request.is_fitted else tuple(form for form in forms if form not in FOLDED)

    @cached_property
    def _streams(self) -> OnnxStreams:
        """The model with the data; made once, because its sensitivities hold for every fit."""
        dense = self.dense
        return OnnxStreams(
            dense.path,
            self.data.feeds,
            self.data.samples,
            may_split=lambda name: not self.filters.refusal(name),
            macs={
                node: _macs_of_weights(count, dense.attention_macs.get(node, 0)) for node, count in dense.macs.items()
            },
            provider=self.provider,
            seed=self.solver.seed,
            before_ids=True,
            sensitivities=None if self.kept is None else self.kept.sensitivities,
            proto=dense.proto,
            sites=dense.sites,
        )


def _macs_of_weights(count: int, attention: int) -> int:
    """Return the MACs of a node that factorization may change: without the attention beside its weights.

    Of an attention without weights half is left, the product with the values, which the form "heads" makes smaller.
    """
    return count - attention or attention // 2
