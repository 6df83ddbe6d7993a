"""The precision step of an export: rank and precision in one plan, beside what onnxruntime offers for the dense model.

dense model --> onnxruntime's schemes (the rivals) --> bases: int8 products, float32 products of few bits
--> plan of ranks and bits in each base --> fit, split, lower --> points
points      --> sites whose inputs cost most when they are rounded go back to float32 --> more points
points      --> outputs on the check part, one interleaved measurement --> rule --> the delivered model
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from graph_passes import Site
from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.core.progress import step
from rsi_deploy.core.sites import site_name
from rsi_deploy.costing.zero_filled import Splits
from rsi_deploy.exporting.calibrated.candidates import loss_shown
from rsi_deploy.exporting.calibrated.plan_check import foreseen_loss
from rsi_deploy.exporting.calibrated.planner import CalibratedPlanner
from rsi_deploy.exporting.calibrated.size_search import searched_model
from rsi_deploy.exporting.lowered.activation_losses import activation_losses, activation_steps
from rsi_deploy.exporting.lowered.bits import bits_of, in_bits, table_options
from rsi_deploy.exporting.lowered.maker import Base, PointMaker, decisions_in
from rsi_deploy.exporting.lowered.points import CLOSE_LOSS, CLOSE_RATIO, NEAR_BYTES, Point, Rule, refuse_broken
from rsi_deploy.exporting.timing.timed_export import TimedExport
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Decisions, planned_splits
from rsi_deploy.planning.knapsack import SiteOptions, smallest_cost
from rsi_deploy.planning.record import PlanRecord
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.precision.record import PrecisionRecord
from rsi_deploy.precision.rivals import rival_schemes
from rsi_deploy.precision.schemes import (
    DYNAMIC,
    FEW_BITS,
    FLOAT16,
    FLOAT32,
    PRODUCTS,
    Scheme,
    has_bits,
    is_int8,
    timed_scheme,
)
from rsi_deploy.runtime.placement import node_placement
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.providers import short_name

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
MOST_BYTES = 1.3
"""Bytes of an int8 model over those of the smallest one; a larger one leaves much of the net in float."""
ROUNDING_SHARE = 0.5
"""Loss of rounded inputs over that of the weights, which sites in float32 bring down to this."""
TABLE_SAMPLES = 64
"""Samples on which the loss of a rounded embedding table is measured."""
HALVINGS = 4
"""Most models that are written to find how many sites need float32."""


@dataclass(kw_only=True)
class PrecisionStep:
    """Makes models of several precisions, and chooses one.

    Attributes:
        precision: value of `--precision`.
        maker: makes the models.
        times: returns the measured times of sites in a scheme.
        allow_slower: whether a model that was measured slower than the dense one may be delivered.
        allow_larger: whether a model that is larger than the user's may be delivered.
        notes: notes for the report.
    """

    precision: str
    maker: PointMaker
    times: Callable[[Scheme], TimedExport]
    allow_slower: bool
    allow_larger: bool
    notes: list[str] = field(default_factory=list)
    _dense: dict[Scheme, Point] = field(default_factory=dict, init=False)
    _searches: dict[Scheme, PlanRecord] = field(default_factory=dict, init=False)
    _smallest: list[int] = field(default_factory=list, init=False)

    def run(self) -> tuple[Point, PrecisionRecord, BenchResult | None]:
        """Return the chosen point, the record of the choice, and the measurement of the dense model beside it.

        The point's file is the dense model's target.

        Raises:
            UsageError: a precision that needs data, or that the provider does not run.
            ModelError: no model keeps the budget.
            GateError: no model keeps the limit.
        """
        request, dense = self.request, self.maker.dense
        if request.calib is None:
            raise UsageError(f"--precision {self.precision} needs unlabelled data to choose and to check; add --calib")
        provider = short_name(parse_provider(self.maker.provider).name)
        rivals = rival_schemes(self._operators, provider, self.maker.target)
        points = [self.maker.rival(scheme) for scheme in (FLOAT32, *rivals)]
        bases = self._bases()
        if not bases:
            raise UsageError(
                f"--precision {self.precision}: {provider} runs no such precision of this model; type --precision "
                f"float32 or auto"
            )
        for base in bases:
            if len(bases) > 1 and base.scheme is FEW_BITS and self._needs_no_float(points):
                continue
            points += self._planned_points(base)
        small = [point for point in points if NEAR_BYTES * point.bytes < dense.size.bytes]
        if self.precision == "auto" and request.quality is not None and not any(map(self._keeps, small)):
            points += self._planned_points(Base(scheme=FLOAT32))  # ranks alone
        points, latency = self.maker.measured(points)
        rule = Rule(
            request=request,
            dense_bytes=dense.size.bytes,
            dense_ms=None if latency is None else latency.arms[0].median_ms,
            allow_slower=self.allow_slower,
            allow_larger=self.allow_larger,
        )
        chosen = rule.chosen([point for point in points if self._is_allowed(point)])
        if chosen is None and request.quality is not None:
            made = self.maker.point(self.maker.all_dense(32), Base(scheme=FLOAT32))
            chosen = replace(made, name="dense", is_rival=True)
            points.append(chosen)
        if chosen is None:
            raise self._refusal(points, rule)
        if request.budget is not None and not request.allow_broken:
            refuse_broken(chosen, request.budget, points)
        self.maker.deliver(chosen)
        search = self._searches.get(chosen.scheme) or next(iter(self._searches.values()), None)
        if search is not None:
            search = search.model_copy(update={"delivers_dense": chosen.name == "dense"})
        self.maker.calibrator.record = search
        if latency is not None and chosen.timing is not None:
            timing = chosen.timing.model_copy(update={"label": "compressed"})
            latency = latency.model_copy(update={"arms": (latency.arms[0], timing)})
        return chosen, self._record(chosen, points, rule), latency

    def unsplit(self) -> SplitModel:
        """Return the record of the dense model, whose sites are not split."""
        return self.maker.unsplit()

    @property
    def request(self) -> RankRequest:
        """What decides the ranks."""
        return self.maker.calibrator.request

    @cached_property
    def _operators(self) -> frozenset[str]:
        return frozenset(site.op_type for site in self._sites)

    @property
    def _sites(self) -> Sequence[Site]:
        return self.maker.dense.sites

    def _record(self, chosen: Point, points: Sequence[Point], rule: Rule) -> PrecisionRecord:
        stored = {} if chosen.made is None else self.maker.stored_bits(chosen.made, chosen.scheme)
        decisions = {} if chosen.made is None else decisions_in(chosen.made)
        repairs = {name: d.repair for name, d in decisions.items() if d.repair and chosen.scheme is FEW_BITS}
        tables, dense = {table.name for table in self.maker.tables}, self.maker.dense
        return PrecisionRecord(
            request=self.precision,
            target=self.maker.target.name,
            scheme=chosen.scheme.name,
            rule=rule.text,
            points=tuple(point.record(chosen, rule) for point in points),
            bits={name: bits for name, bits in stored.items() if name not in tables},
            tables={name: bits for name, bits in stored.items() if name in tables},
            in_float=tuple(sorted(chosen.in_float)),
            repairs=repairs,
            operators=node_placement(dense.target, self.maker.provider, dense.feeds).op_counts,
        )

    # -- bases ------------------------------------------------------------------------------------------------------

    def _bases(self) -> list[Base]:
        """The schemes that ranks and bits are planned in."""
        if self.precision == "float16":
            return [Base(scheme=FLOAT16)]
        if (plan := self.request.plan) is not None and plan.scheme is not None:
            in_float = frozenset(name for name, site in plan.sites.items() if site.products is not None)
            return [Base(scheme=self._scheme_named(plan.scheme), in_float=in_float)]
        best = self._best_int8()
        schemes = [] if best is None else [best]
        if self.precision in ("auto", "int4"):
            self._lower_dense(FEW_BITS)
            schemes.append(FEW_BITS)
        return [Base(scheme=scheme) for scheme in schemes]

    def _scheme_named(self, name: str) -> Scheme:
        """Return the scheme of a plan."""
        target = self.maker.target
        known = [target.static("minmax"), target.static("percentile"), DYNAMIC, FEW_BITS, FLOAT16]
        for scheme in known:
            if scheme.name == name:
                return scheme
        raise UsageError(
            f'{self.request.plan_name}: "scheme" is {name!r}; write {", ".join(repr(s.name) for s in known)}, or '
            f"remove it"
        )

    def _best_int8(self) -> Scheme | None:
        """The int8 scheme whose outputs are best, or a faster one whose outputs are about as good."""
        target = self.maker.target
        tried = [target.static("minmax")]
        if "Conv" in self._operators:
            tried.append(target.static("percentile"))
        if self._multiplies_mostly and DYNAMIC.kind in target.kinds:
            tried.append(DYNAMIC)
        found = [point for point in map(self._lower_dense, tried) if point is not None]
        if not found:
            return None
        smallest = min(point.bytes for point in found)
        found = [point for point in found if point.bytes <= MOST_BYTES * smallest]
        least = min(point.loss for point in found)
        near = [point for point in found if point.loss <= CLOSE_RATIO * least + CLOSE_LOSS]
        if len(near) > 1 and len({point.scheme.kind for point in near}) > 1 and self.maker.measure is not None:
            near = [point for point in self.maker.measured(near)[0] if point.loss <= CLOSE_RATIO * least + CLOSE_LOSS]
            fastest = max(point.speedup for point in near)
            near = [point for point in near if point.speedup >= 0.9 * fastest]
        return min(near, key=lambda point: point.loss).scheme

    @property
    def _multiplies_mostly(self) -> bool:
        """Return whether most MACs are those of products: dynamic int8 leaves convolutions in float32."""
        macs = {site.node: (site.op_type in PRODUCTS, self.maker.dense.macs.get(site.node, 0)) for site in self._sites}
        return 2 * sum(count for is_product, count in macs.values() if is_product) > sum(c for _, c in macs.values())

    def _lower_dense(self, scheme: Scheme) -> Point | None:
        """The dense model in a scheme, with weights in eight bits; None where it cannot be made."""
        with step(f"try {scheme.name}"):
            try:
                self._dense[scheme] = self.maker.eight_bits(Base(scheme=scheme))
            except ModelError as error:
                self.notes.append(str(error))
        return self._dense.get(scheme)

    # -- points -----------------------------------------------------------------------------------------------------

    def _planned_points(self, base: Base) -> Iterator[Point]:
        """Yield models with ranks and bits, planned for the request in a base."""
        request, budget, maker = self.request, self.request.budget, self.maker
        if base.scheme in self._dense and self._dense_may_keep:
            yield maker.point(maker.all_dense(4), base) if self.precision == "int4" else self._dense[base.scheme]
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
            else:
                planner = self._planner(base)
                yield maker.point(planner.fit(self._of_macs(budget, planner)), base)
        except (ModelError, GateError) as error:
            self.notes.append(f"{base.name}: {error}")

    @property
    def _dense_may_keep(self) -> bool:
        """Return whether a model without splits may keep the limit; MACs and ranks need splits, a drop a search."""
        request, budget = self.request, self.request.budget
        if request.max_drop is not None or not request.is_searched:
            return False
        return budget is None or budget.cost in ("bytes", "nanoseconds")

    def _of_size(self, budget: Budget, base: Base) -> Iterator[Point]:
        """Yield the model within a size, and the same one with some or all sites in float32.

        Its bytes are counted, and counted again where the file is larger.
        """
        planner, allowed, over = self._planner(base), budget.total(self.maker.dense.size.bytes), 0
        if has_bits(base.scheme):
            self._smallest.append(planner.fixed_bytes + smallest_cost(planner.options, cost="bytes"))
        for _ in range(TRIES):
            point = self.maker.point(planner.fit(planner.in_bytes(allowed - over)), base)
            if point.bytes <= allowed:
                break
            over += point.bytes - allowed
            if over >= allowed:
                return
        else:
            self.notes.append(f"{base.name}: no plan of {TRIES} keeps {budget}; the nearest has {point.bytes:,} bytes")
            return
        yield point
        if is_int8(base.scheme) and self.precision == "auto" and point.made is not None:
            most = ROUNDING_SHARE * foreseen_loss(decisions_in(point.made), planner.options)
            count = self._floats_above(most)
            if 0 < count < len(self._sensitive):
                yield self.maker.point(point.made, self._with_floats(base, count))

    def _of_quality(self, base: Base) -> Iterator[Point]:
        """Yield the smallest model that keeps a limit; of int8, with as few sites in float32 as eight bits need."""
        if is_int8(base.scheme) and self.precision == "auto" and self.request.quality is not None:
            mixed = self._fewest_floats(base)
            if mixed is None:
                self.notes.append(f"{base.name}: rounded activations do not keep {self.request.quality}")
                return
            if mixed.in_float:
                yield self.maker.eight_bits(mixed)
            base = mixed
        made, self._searches[base.scheme] = searched_model(self.request, self._planner(base))
        if any(d.rank is not None or d.bits < 32 for d in decisions_in(made).values()):
            yield self.maker.point(made, base)

    def _of_time(self, budget: Budget, base: Base) -> Iterator[Point]:
        """Yield models whose splits save the time that is missing, by the times of sites and of the models before.

        Where the dense model is fast enough in a base of int8, it has time for some sites in float32 instead.
        """
        dense = self._dense.get(base.scheme) or self._lower_dense(base.scheme)
        over = math.inf if dense is None else self._over(budget, dense)
        if over <= SPARE:
            if is_int8(base.scheme) and self.precision == "auto":
                yield from self._floats_in_time(budget, base)
            return
        if not math.isfinite(over):
            return
        planner, timing = self._timed_planner(base)
        tried: list[Splits] = []
        share, allowed = math.inf, SPARE / over
        while len(tried) < TIMED and not NEAR_TIME * allowed <= share <= allowed:
            point = self._point_in_time(planner, base, allowed, tried)
            if point is None:
                return
            yield point
            share = self._over(budget, point) / over
            timing.correct(tried[-1], share)

    def _of_savings(self, base: Base) -> Iterator[Point]:
        """Yield models whose splits save shares of the time that splits can save at most."""
        planner, _ = self._timed_planner(base)
        most = 1 - planner.smallest(fastest=True)
        tried: list[Splits] = []
        for part in SAVINGS:
            point = self._point_in_time(planner, base, 1 - part * most, tried)
            if point is not None:
                yield point

    def _point_in_time(self, planner: CalibratedPlanner, base: Base, share: float, tried: list[Splits]) -> Point | None:
        """The model for a share of the time of the base without splits; None without splits or if it was tried."""
        decisions = planner.in_time(share)
        splits = planned_splits(decisions, planner.streams)
        if not splits or splits in tried:
            return None
        tried.append(splits)
        return self.maker.point(planner.fit(decisions), base, f"{len(splits)} of {len(self._sites)} sites split")

    def _timed_planner(self, base: Base) -> tuple[CalibratedPlanner, TimedExport]:
        """The planner of a base with the splits that are faster in it, and their times."""
        timing, planner = self.times(timed_scheme(base.scheme)), self._planner(base)
        options = timing.narrowed(planner.options)
        if not any(len(site.options) > 1 for site in options):
            raise ModelError(f"no split of any of {len(options)} sites is measured faster")
        return replace(planner, options=options, timing=timing), timing

    def _is_fast(self, budget: Budget, point: Point) -> bool:
        """Return whether a point keeps a time, with something to spare for the last measurement."""
        return self._over(budget, point) <= SPARE

    def _over(self, budget: Budget, point: Point) -> float:
        """Return the time of a point over the allowed time; infinity where nothing is measured."""
        (timed,), latency = self.maker.measured([point])
        if latency is None or timed.timing is None:
            return math.inf
        return 1e6 * timed.timing.median_ms / budget.total(round(1e6 * latency.arms[0].median_ms))

    # -- sites in float32 -------------------------------------------------------------------------------------------

    @cached_property
    def _sensitive(self) -> list[tuple[str, float]]:
        """Name of each site and the loss of its rounded inputs, the largest first."""
        ranged = next((point for scheme, point in self._dense.items() if scheme.kind == "static int8"), None)
        if ranged is None or ranged.path is None:
            return []
        names = {site.node: site_name(site.weight) for site in self.maker.dense.sites}
        steps = {names[node]: size for node, size in activation_steps(ranged.path).items() if node in names}
        losses = activation_losses(self._whole_planner.options, steps)
        return sorted(losses.items(), key=lambda item: (-item[1], item[0]))

    def _with_floats(self, base: Base, count: int) -> Base:
        return replace(base, in_float=frozenset(name for name, _ in self._sensitive[:count]))

    def _floats_above(self, most: float) -> int:
        """Return the fewest sites in float32 that leave a loss of at most `most` to the others."""
        rest, count = sum(loss for _, loss in self._sensitive), 0
        while count < len(self._sensitive) and rest > most:
            rest -= self._sensitive[count][1]
            count += 1
        return count

    def _fewest_floats(self, base: Base) -> Base | None:
        """The base with the fewest sites in float32 that keeps the quality in eight bits; None where none does."""
        if self._keeps(self._dense[base.scheme]):
            return base
        low, high, found = 0, len(self._sensitive), None
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            if middle == low:
                break
            mixed = self._with_floats(base, middle)
            if self._keeps(self.maker.eight_bits(mixed)):
                high, found = middle, mixed
            else:
                low = middle
        return found

    def _floats_in_time(self, budget: Budget, base: Base) -> Iterator[Point]:
        """Yield int8 models of the dense net with as many sites in float32 as the time allows."""
        low, high = 0, len(self._sensitive)
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            if middle == low:
                break
            point = self.maker.eight_bits(self._with_floats(base, middle))
            yield point
            low, high = (middle, high) if self._is_fast(budget, point) else (low, middle)

    # -- planners ---------------------------------------------------------------------------------------------------

    def _of_macs(self, budget: Budget, planner: CalibratedPlanner) -> Decisions:
        """Decide by MACs or parameters, which are counted on float models."""
        plain = replace(planner, candidates=replace(planner.candidates, write=self.maker.write))
        return plain.within(budget)

    def _planner(self, base: Base) -> CalibratedPlanner:
        """The planner of a base: its bits, and models that are written in it."""
        whole, allowed = self._whole_planner, self._planned_bits if has_bits(base.scheme) else (32,)
        if base.scheme is FEW_BITS and self.precision == "auto" and allowed != (32,):
            allowed = (32, *allowed)
        if base.scheme.uint8_products:
            allowed = tuple(bits for bits in allowed if bits >= 8)
        sites = [*whole.options, *(self._table_options if allowed != (32,) else ())]
        options = [in_bits(site, allowed, with_repairs=base.scheme is FEW_BITS) for site in sites]
        planner = replace(
            whole,
            options=options,
            candidates=replace(whole.candidates, write=lambda made, path: self.maker.lowered(made, path, base)),
        )
        if base.scheme not in self._dense:
            size = self.maker.dense.size.bytes
            return replace(planner, fixed_bytes=size - sum(site.options[0].bytes for site in options))
        counted = sum(
            next((o.bytes for o in site.options if o.form == "dense" and o.bits == 8), site.options[0].bytes)
            for site in [*whole.options, *self._table_options]
        )
        return replace(planner, unit="bytes", fixed_bytes=self._dense[base.scheme].bytes - counted)

    @property
    def _planned_bits(self) -> tuple[int, ...]:
        """The bits that the plan chooses among; MACs and times choose ranks, and all weights have the usual bits."""
        budget = self.request.budget
        if self.request.fastest or (budget is not None and budget.cost != "bytes"):
            return (32,)
        return {"int8": (8,), "int4": (4,)}.get(self.precision, (8, 5, 4, 3))

    @cached_property
    def _whole_planner(self) -> CalibratedPlanner:
        """The planner with every site's options in all bits; surveyed once."""
        bits = {32} if self.precision == "float16" else {32, 8, *self._planned_bits}
        return self.maker.calibrator.planner_for(
            lambda site: tuple(b for b in bits_of(site) if b in bits), with_repairs=FEW_BITS in self._dense
        )

    @cached_property
    def _table_options(self) -> list[SiteOptions]:
        """The embedding tables as sites."""
        path = self.maker.path("table")
        loss_of = lambda: loss_shown(self.maker.quality(path, "in-sample", TABLE_SAMPLES))  # noqa: E731
        return [table_options(table, self.maker.dense, path, loss_of) for table in self.maker.tables]

    # -- choice -----------------------------------------------------------------------------------------------------

    def _needs_no_float(self, points: Sequence[Point]) -> bool:
        """Return whether models of int8 products answer the request, so that float32 products need not be planned."""
        low = [point for point in points if is_int8(point.scheme) and not point.is_rival and not point.error]
        budget = self.request.budget
        if budget is not None and budget.cost == "nanoseconds":
            return any(point.loss <= CLOSE_LOSS and self._is_fast(budget, point) for point in low)
        if self.request.fastest:
            return any(self._keeps(point) for point in low)
        return False

    def _keeps(self, point: Point) -> bool:
        """Return whether the outputs of a point keep the quality of the request."""
        quality = self.request.quality
        return quality is not None and point.quality is not None and quality.holds(quality.limit_of(point.quality))

    def _is_allowed(self, point: Point) -> bool:
        """Return whether `--precision` lets a point be delivered."""
        few = FEW_BITS.kind
        kinds = {
            "auto": {"float32", "float16", "static int8", "dynamic int8", "int4 weights", few},
            "float16": {"float16"},
            "int8": {"static int8", "dynamic int8"},
            "int4": {"static int8", "dynamic int8", "int4 weights", few},
        }
        if self.precision == "int4" and point.is_rival and is_int8(point.scheme):
            return False
        return point.scheme.kind in kinds[self.precision] and point.path != self.maker.dense.reference

    def _refusal(self, points: Sequence[Point], rule: Rule) -> ModelError | GateError:
        """Return the error that says which of the models comes nearest to the limit."""
        request, dense = self.request, self.maker.dense
        made = [point for point in points if point.path is not None and point.path != dense.reference]
        if made and request.budget is not None and request.budget.cost == "bytes":
            smallest = min([*self._smallest, *(point.bytes for point in made)])
            return request.budget.unreachable(dense.size.bytes, smallest)
        times = [point.timing.median_ms for point in made if point.timing is not None]
        if times and request.budget is not None and request.budget.cost == "nanoseconds" and rule.dense_ms is not None:
            fastest = min(times)
            return request.budget.unreachable(round(1e6 * rule.dense_ms), round(1e6 * fastest))
        limit = str(request.quality or request.budget or f"--precision {self.precision}")
        return GateError(
            f"{limit}: no model of {len(made)} that were tried in --precision {self.precision} keeps it; allow more, "
            f"or type --precision auto"
        )
