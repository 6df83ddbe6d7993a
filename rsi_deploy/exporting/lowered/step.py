"""The precision step of an export: rank and precision in one plan, beside what onnxruntime offers for the dense model.

dense model --> onnxruntime's schemes (the rivals) --> bases: int8 products, float32 products of few bits
--> plan of ranks and bits in each base --> fit, split, lower --> points
points      --> sites whose inputs cost most when they are rounded go back to float32 --> more points
points      --> outputs on the check part, one interleaved measurement --> rule --> the delivered model
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.exporting.lowered.bases import Bases
from rsi_deploy.exporting.lowered.maker import Base, PointMaker, decisions_in
from rsi_deploy.exporting.lowered.points import NEAR_BYTES, Point, Rule, refuse_broken
from rsi_deploy.exporting.lowered.requested_points import RequestedPoints
from rsi_deploy.exporting.results import Delivered
from rsi_deploy.exporting.timing.stage_clock import StageClock
from rsi_deploy.planning.latency_search import NEAR_MISS
from rsi_deploy.planning.record import PlanRecord
from rsi_deploy.precision.record import PrecisionRecord
from rsi_deploy.precision.rivals import rival_schemes
from rsi_deploy.precision.schemes import FEW_BITS, FLOAT16, FLOAT32, Kind, is_int8
from rsi_deploy.runtime.placement import node_placement
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.providers import short_name

INT8: frozenset[Kind] = frozenset({"static int8", "dynamic int8"})
INT4: frozenset[Kind] = INT8 | {"int4 weights", FEW_BITS.kind}
KINDS: dict[str, frozenset[Kind]] = {
    "auto": INT4 | {"float32", "float16"},
    "float16": frozenset({"float16"}),
    "int8": INT8,
    "int4": INT4,
}
"""Value of `--precision` -> kinds of schemes that it lets be delivered."""
LONGER = 3
"""Runs that a measurement takes which decides whether a time is refused."""
FLOAT16_ON_CPU = (
    "onnxruntime's CPU provider has no float16 kernels for most operators: it casts their inputs to float32. The file "
    "is half as large; only the measured speed-up tells whether it is faster here"
)
"""Note on a float16 model for the CPU."""


@dataclass(kw_only=True)
class PrecisionStep:
    """Makes models of several precisions, and chooses one.

    Attributes:
        maker: makes the models.
        clock: times the stages.
        config: settings of the export.
    """

    maker: PointMaker
    clock: StageClock
    config: ExportConfig

    def run(self) -> Delivered:
        """Return the chosen model, in the place of the export's model, with the record of the choice.

        Raises:
            UsageError: a precision that needs data, or that the provider does not run; a cost table that does not fit.
            ModelError: no model keeps the budget.
            GateError: no model keeps the limit.
        """
        maker = self.maker
        with self.clock.stage("plan and compare precisions"):
            if maker.request.calib is None:
                raise UsageError(
                    f"--precision {maker.precision} needs unlabelled data to choose and to check; add --calib"
                )
            maker.times.check_cost()
            points, latency, rule = self._measured(self._points())
            chosen = self._chosen(points, rule)
            if chosen.scheme is FLOAT16 and self._provider == "cpu":
                maker.notes.append(FLOAT16_ON_CPU)
            maker.deliver(chosen)
            maker.calibrator.record = self._search(chosen)
            record = self._record(chosen, points, rule)
        if latency is not None and chosen.timing is not None:
            timing = chosen.timing.model_copy(update={"label": "compressed"})
            latency = latency.model_copy(update={"arms": (latency.arms[0], timing)})
        split = chosen.split or maker.unsplit()
        return Delivered(split=split, predicted=None, latency=latency, precision=record, notes=tuple(maker.notes))

    @property
    def _provider(self) -> str:
        return short_name(parse_provider(self.maker.calibrator.provider).name)

    @cached_property
    def _requested(self) -> RequestedPoints:
        return RequestedPoints(maker=self.maker, bases=Bases(maker=self.maker))

    def _points(self) -> list[Point]:
        """Return the dense model, the rivals, and the models that are planned for the request."""
        maker, requested, quality = self.maker, self._requested, self.maker.request.quality
        operators = frozenset(site.op_type for site in maker.dense.sites)
        rivals = rival_schemes(operators, self._provider, maker.target)
        points = [maker.rival(scheme) for scheme in (FLOAT32, *rivals)]
        bases = requested.bases.chosen()
        if not bases:
            raise UsageError(
                f"--precision {maker.precision}: {self._provider} runs no such precision of this model; type "
                f"--precision float32 or auto"
            )
        for base in bases:
            if len(bases) == 1 or base.scheme is not FEW_BITS or requested.needs_float_products(points):
                points += requested.planned(base)
        small = [point for point in points if NEAR_BYTES * point.bytes < maker.dense.size.bytes]
        if maker.precision == "auto" and quality is not None and not any(point.keeps(quality) for point in small):
            points += requested.planned(Base(scheme=FLOAT32))  # ranks alone
        return points

    def _measured(self, points: Sequence[Point]) -> tuple[list[Point], BenchResult | None, Rule]:
        """Return the points with their times, and the rule.

        All are measured again for longer where the time of a better one is missed by little, or where none keeps it.
        """
        measured, latency = self.maker.measured(points)
        rule = self._rule(latency)
        budget, allowed = self.maker.request.budget, [point for point in measured if self._is_allowed(point)]
        if budget is None or budget.cost != "nanoseconds":
            return measured, latency, rule
        best, near = rule.chosen(allowed), replace(rule, slack=NEAR_MISS).chosen(allowed)
        if near is None or near is best or (best is not None and not rule.may_keep(near)):
            return measured, latency, rule
        measured, latency = self.maker.measured(points, runs=LONGER)
        return measured, latency, self._rule(latency)

    def _rule(self, latency: BenchResult | None) -> Rule:
        return Rule(
            request=self.maker.request,
            dense_bytes=self.maker.dense.size.bytes,
            dense_ms=None if latency is None else latency.arms[0].median_ms,
            allow_slower=self.config.allow_slower,
            allow_larger=self.config.allow_larger,
        )

    def _chosen(self, points: list[Point], rule: Rule) -> Point:
        """Return the best model that keeps the limit; the dense one, which is added, where none keeps a quality."""
        request, maker = self.maker.request, self.maker
        chosen = rule.chosen([point for point in points if self._is_allowed(point)])
        if chosen is None and request.quality is not None:
            made = maker.point(maker.all_dense(32), Base(scheme=FLOAT32))
            chosen = replace(made, name="dense", is_rival=True)
            points.append(chosen)
        if chosen is None:
            raise self._refusal(points, rule)
        if request.budget is not None and not request.allow_broken:
            refuse_broken(chosen, request.budget, points)
        return chosen

    def _is_allowed(self, point: Point) -> bool:
        """Return whether `--precision` lets a point be delivered."""
        if self.maker.precision == "int4" and point.is_rival and is_int8(point.scheme):
            return False
        return point.scheme.kind in KINDS[self.maker.precision] and point.path != self.maker.dense.reference

    def _search(self, chosen: Point) -> PlanRecord | None:
        """Return the record of the search that found a model, or of another one; None without any."""
        searches = self._requested.searches
        search = searches.get(chosen.scheme) or next(iter(searches.values()), None)
        return None if search is None else search.model_copy(update={"delivers_dense": chosen.name == "dense"})

    def _record(self, chosen: Point, points: Sequence[Point], rule: Rule) -> PrecisionRecord:
        maker, dense = self.maker, self.maker.dense
        stored = {} if chosen.made is None else maker.stored_bits(chosen.made, chosen.scheme)
        decisions = {} if chosen.made is None else decisions_in(chosen.made)
        tables = {table.name for table in maker.tables}
        return PrecisionRecord(
            request=maker.precision,
            target=maker.target.name,
            scheme=chosen.scheme.name,
            rule=rule.text,
            points=tuple(point.record(chosen, rule) for point in points),
            bits={name: bits for name, bits in stored.items() if name not in tables},
            tables={name: bits for name, bits in stored.items() if name in tables},
            in_float=tuple(sorted(chosen.in_float)),
            repairs={name: d.repair for name, d in decisions.items() if d.repair and chosen.scheme is FEW_BITS},
            operators=node_placement(dense.target, maker.calibrator.provider, dense.feeds).op_counts,
        )

    def _refusal(self, points: Sequence[Point], rule: Rule) -> ModelError | GateError:
        """Return the error that says which of the models comes nearest to the limit."""
        request, dense, precision = self.maker.request, self.maker.dense, self.maker.precision
        made = [point for point in points if point.path is not None and point.path != dense.reference]
        if made and request.budget is not None and request.budget.cost == "bytes":
            smallest = min([*self._requested.smallest, *(point.bytes for point in made)])
            return request.budget.unreachable(dense.size.bytes, smallest)
        times = [point.timing.median_ms for point in made if point.timing is not None]
        if times and request.budget is not None and request.budget.cost == "nanoseconds" and rule.dense_ms is not None:
            return request.budget.unreachable(round(1e6 * rule.dense_ms), round(1e6 * min(times)))
        limit = str(request.quality or request.budget or f"--precision {precision}")
        return GateError(
            f"{limit}: no model of {len(made)} that were tried in --precision {precision} keeps it; allow more, or "
            f"type --precision auto"
        )
