"""Models with ranks and bits, planned in a base for the request: a size, a quality, a time, or the fastest."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.costing.zero_filled import Splits
from rsi_deploy.exporting.calibrated.plan_check import foreseen_loss
from rsi_deploy.exporting.calibrated.planner import CalibratedPlanner
from rsi_deploy.exporting.calibrated.size_search import searched_model
from rsi_deploy.exporting.lowered.base_planners import BasePlanners
from rsi_deploy.exporting.lowered.bases import Bases
from rsi_deploy.exporting.lowered.float_sites import FloatSites
from rsi_deploy.exporting.lowered.maker import Base, PointMaker, decisions_in
from rsi_deploy.exporting.lowered.points import CLOSE_LOSS, Point
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import planned_splits
from rsi_deploy.planning.knapsack import smallest_cost
from rsi_deploy.planning.record import PlanRecord
from rsi_deploy.precision.schemes import Scheme, has_bits, is_int8

TRIES = 3
"""Most models that are fitted for a size: the counted bytes may be too few."""
SAVINGS = (0.4, 0.7, 1.0)
"""Shares of the largest saving of time that are tried for the fastest model of a quality."""
TIMED = 4
"""Models of a base that are fitted and measured for a time."""
NEAR_TIME = 0.93
"""Share of the time of a plan from which on its model is not much faster than needed."""
SPARE = 0.97
"""Share of a time that a model may take in the search; the last measurement differs a little."""
ROUNDING_SHARE = 0.5
"""Loss of rounded inputs over that of the weights, which sites in float32 bring down to this."""


@dataclass(kw_only=True)
class RequestedPoints:
    """The models that are planned for one request.

    Attributes:
        maker: makes the models.
        bases: the bases, with the dense model in each of their schemes.
        searches: scheme -> record of the search for a quality.
        smallest: bytes of the smallest plan of each base, where a size is requested.
    """

    maker: PointMaker
    bases: Bases
    searches: dict[Scheme, PlanRecord] = field(default_factory=dict, init=False)
    smallest: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._request, self._planners = self.maker.request, BasePlanners(maker=self.maker, bases=self.bases)
        self._float_sites = FloatSites(planners=self._planners)

    def planned(self, base: Base) -> Iterator[Point]:
        """Yield models with ranks and bits, planned for the request in a base."""
        request, budget, maker, dense = self._request, self._request.budget, self.maker, self.bases.dense
        if base.scheme in dense and self._dense_may_keep:
            yield maker.point(maker.all_dense(4), base) if maker.precision == "int4" else dense[base.scheme]
        if not (request.is_searched or budget is not None):
            yield maker.point(maker.calibrator.planned(), base)
            return
        try:
            if budget is not None and budget.cost == "nanoseconds":
                yield from self._of_time(budget, base)
            elif request.fastest:
                yield from self._of_savings(base)
            elif budget is None:
                yield from self._of_quality(base)
            elif budget.cost == "bytes":
                yield from self._of_size(budget, base)
            else:  # MACs and parameters are counted on float models
                planner = self._planners.planner(base)
                plain = replace(planner, candidates=replace(planner.candidates, write=maker.calibrator.write))
                yield maker.point(planner.fit(plain.within(budget)), base)
        except (ModelError, GateError) as error:
            self.maker.notes.append(f"{base.name}: {error}")

    def needs_float_products(self, points: Sequence[Point]) -> bool:
        """Return whether none of these models of int8 products answers the request, so that float32 is tried too."""
        low = [point for point in points if is_int8(point.scheme) and not point.is_rival and not point.error]
        request, budget = self._request, self._request.budget
        if budget is not None and budget.cost == "nanoseconds":
            return not any(point.loss <= CLOSE_LOSS and self._is_fast(budget, point) for point in low)
        return not (request.fastest and any(point.keeps(request.quality) for point in low))

    @property
    def _dense_may_keep(self) -> bool:
        """Whether a model without splits may keep the limit; MACs and ranks need splits, a drop a search."""
        request, budget = self._request, self._request.budget
        if request.max_drop is not None or not request.is_searched:
            return False
        return budget is None or budget.cost in ("bytes", "nanoseconds")

    def _may_mix(self, base: Base) -> bool:
        """Return whether some sites of a base may be computed in float32."""
        return is_int8(base.scheme) and self.maker.precision == "auto"

    def _of_size(self, budget: Budget, base: Base) -> Iterator[Point]:
        """Yield the model within a size, and the same one with some sites in float32.

        Its bytes are counted, and counted again where the file is larger.
        """
        planner, allowed, over = self._planners.planner(base), budget.total(self.maker.dense.size.bytes), 0
        if has_bits(base.scheme):
            self.smallest.append(planner.fixed_bytes + smallest_cost(planner.options, cost="bytes"))
        for _ in range(TRIES):
            made = planner.fit(planner.in_bytes(allowed - over))
            point = self.maker.point(made, base)
            if point.bytes <= allowed:
                break
            over += point.bytes - allowed
            if over >= allowed:
                return
        else:
            self.maker.notes.append(
                f"{base.name}: no plan of {TRIES} keeps {budget}; the nearest has {point.bytes:,} bytes"
            )
            return
        yield point
        if self._may_mix(base):
            most = ROUNDING_SHARE * foreseen_loss(decisions_in(made), planner.options)
            if (mixed := self._float_sites.leaving(base, most)) is not None:
                yield self.maker.point(made, mixed)

    def _of_quality(self, base: Base) -> Iterator[Point]:
        """Yield the smallest model that keeps a limit; of int8, with as few sites in float32 as eight bits need."""
        quality = self._request.quality
        if self._may_mix(base) and quality is not None:
            mixed = self._float_sites.fewest(base, lambda point: point.keeps(quality))
            if mixed is None:
                self.maker.notes.append(f"{base.name}: rounded activations do not keep {quality}")
                return
            if mixed.in_float:
                yield mixed
            base = replace(base, in_float=mixed.in_float)
        made, self.searches[base.scheme] = searched_model(self._request, self._planners.planner(base))
        if any(d.rank is not None or d.bits < 32 for d in decisions_in(made).values()):
            yield self.maker.point(made, base)

    def _of_time(self, budget: Budget, base: Base) -> Iterator[Point]:
        """Yield models whose splits save the time that is missing, by the times of sites and of the models before.

        Where the dense model is fast enough in a base of int8, it has time for some sites in float32 instead.
        """
        dense = self.bases.dense_in(base.scheme)
        over = math.inf if dense is None else self.maker.time_over(budget, dense)
        if over <= SPARE and self._may_mix(base):
            yield from self._float_sites.halved(base, lambda point: self._is_fast(budget, point))
        if over <= SPARE or not math.isfinite(over):
            return
        planner, timing = self._planners.timed(base)
        tried: list[Splits] = []
        share, allowed = math.inf, SPARE / over
        while len(tried) < TIMED and not NEAR_TIME * allowed <= share <= allowed:
            point = self._point_in_time(planner, base, allowed, tried)
            if point is None:
                return
            yield point
            share = self.maker.time_over(budget, point) / over
            timing.correct(tried[-1], share)

    def _of_savings(self, base: Base) -> Iterator[Point]:
        """Yield models whose splits save shares of the time that splits can save at most."""
        planner, _ = self._planners.timed(base)
        most = 1 - planner.smallest(fastest=True)
        tried: list[Splits] = []
        for part in SAVINGS:
            point = self._point_in_time(planner, base, 1 - part * most, tried)
            if point is not None:
                yield point

    def _point_in_time(self, planner: CalibratedPlanner, base: Base, share: float, tried: list[Splits]) -> Point | None:
        """Return the model for a share of the time of the base; None without splits, or if it was tried."""
        decisions = planner.in_time(share)
        splits = planned_splits(decisions, planner.streams)
        if not splits or splits in tried:
            return None
        tried.append(splits)
        sites = f"{len(splits)} of {len(self.maker.dense.sites)} sites split"
        return self.maker.point(planner.fit(decisions), base, sites)

    def _is_fast(self, budget: Budget, point: Point) -> bool:
        """Return whether a point keeps a time, with something to spare for the last measurement."""
        return self.maker.time_over(budget, point) <= SPARE
