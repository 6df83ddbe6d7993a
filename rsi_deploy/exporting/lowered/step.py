"""The precision step of an export: rank and precision in one plan, beside what onnxruntime offers for the dense model.

dense model --> onnxruntime's schemes (the rivals) --> base schemes of this machine
--> plan of ranks and bits in each base scheme --> fit, split, lower --> points
points      --> outputs on the check part, one interleaved measurement --> rule --> the delivered model
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.calibration.output_agreement import dense_outputs, output_quality
from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.core.progress import step
from rsi_deploy.core.sites import site_name
from rsi_deploy.exporting.calibrated.candidates import loss_shown
from rsi_deploy.exporting.calibrated.planner import CalibratedPlanner
from rsi_deploy.exporting.calibrated.size_search import searched_model
from rsi_deploy.exporting.calibration_step import Calibrator
from rsi_deploy.exporting.lowered.bits import bits_of, in_bits, table_options
from rsi_deploy.exporting.lowered.points import CLOSE_LOSS, CLOSE_RATIO, Point, Rule, refuse_broken
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.io import onnx_file
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Decisions, Planned
from rsi_deploy.planning.knapsack import SiteOptions, smallest_cost
from rsi_deploy.planning.planner import Decision, FixedPlanner
from rsi_deploy.planning.record import PlanRecord
from rsi_deploy.precision.four_bit import EmbeddingTable, tables
from rsi_deploy.precision.lowering import CalibrationFeeds, Lowering, lower
from rsi_deploy.precision.quantizers import quantize
from rsi_deploy.precision.record import PrecisionRecord
from rsi_deploy.precision.rivals import rival_name, rival_schemes
from rsi_deploy.precision.schemes import (
    DYNAMIC,
    FLOAT16,
    FLOAT32,
    PRODUCTS,
    Scheme,
    is_int8,
    static,
)
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.providers import short_name

TRIES = 3
"""Most models that are fitted for a size: the counted bytes may be too few."""
SMALL = 0.5
"""Share of the dense model's bytes below which an int8 model that keeps a quality is small enough."""
SHARES = (0.75, 0.5, 0.3)
"""Shares of the MACs that are tried for the fastest model of a quality."""
TIMED = 4
"""Models of a scheme that are fitted and measured for a time."""
SPARE = 0.97
"""Share of a time that a model may take in the search; the last measurement differs a little."""
MOST_BYTES = 1.3
"""Bytes of an int8 model over those of the smallest one; a larger one leaves much of the net in float."""

Write = Callable[[Planned, Path], SplitModel]
Measure = Callable[[Sequence[Path]], BenchResult]


@dataclass(kw_only=True)
class PrecisionStep:
    """Makes models of several precisions, and chooses one.

    Attributes:
        precision: value of `--precision`.
        dense: the dense model.
        calibrator: decides and fits sites.
        write: writes a float model of decisions and factors.
        measure: measures the dense model and others in one interleaved run; None where nothing is measured.
        provider: onnxruntime provider.
        allow_slower: whether a model that was measured slower than the dense one may be delivered.
        allow_larger: whether a model that is larger than the user's may be delivered.
        notes: notes for the report.
    """

    precision: str
    dense: DenseModel
    calibrator: Calibrator
    write: Write
    measure: Measure | None
    provider: str
    allow_slower: bool
    allow_larger: bool
    notes: list[str] = field(default_factory=list)
    _lowered_dense: dict[Scheme, Point] = field(default_factory=dict, init=False)
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
        request = self.calibrator.request
        if request.calib is None:
            raise UsageError(f"--precision {self.precision} needs unlabelled data to choose and to check; add --calib")
        points = [self._rival(FLOAT32), *self._rivals()]
        bases = self._bases()
        if not bases:
            provider = short_name(parse_provider(self.provider).name)
            raise UsageError(
                f"--precision {self.precision}: {provider} runs no such precision of this model; type --precision "
                f"float32 or auto"
            )
        for scheme in bases:
            if scheme is FLOAT32 and self._needs_no_float(points):
                continue
            points += self._planned_points(scheme)
        points, latency = self._measured(points)
        rule = Rule(
            request=request,
            dense_bytes=self.dense.size.bytes,
            dense_ms=None if latency is None else latency.arms[0].median_ms,
            allow_slower=self.allow_slower,
            allow_larger=self.allow_larger,
        )
        chosen = rule.chosen([point for point in points if self._is_allowed(point)])
        if chosen is None and request.quality is not None:
            chosen = replace(self._point(self._all_dense(32), FLOAT32, "dense"), is_rival=True)
            points.append(chosen)
        if chosen is None:
            raise self._refusal(points, rule)
        if request.budget is not None and not request.allow_broken:
            refuse_broken(chosen, request.budget, points)
        assert chosen.path is not None
        onnx_file.move_model(chosen.path, self.dense.target)
        stored = {} if chosen.made is None else self._stored_bits(chosen.made, chosen.scheme)
        names = {table.name for table in self._tables}
        search = self._searches.get(chosen.scheme) or next(iter(self._searches.values()), None)
        if search is not None:
            search = search.model_copy(update={"delivers_dense": chosen.name == "dense"})
        self.calibrator.record = search
        record = PrecisionRecord(
            request=self.precision,
            scheme=chosen.scheme.name,
            rule=rule.text,
            points=tuple(point.record(chosen, rule) for point in points),
            bits={name: bits for name, bits in stored.items() if name not in names},
            tables={name: bits for name, bits in stored.items() if name in names},
        )
        if latency is not None and chosen.timing is not None:
            latency = latency.model_copy(
                update={"arms": (latency.arms[0], chosen.timing.model_copy(update={"label": "compressed"}))}
            )
        return chosen, record, latency

    @cached_property
    def _data(self) -> CalibrationData:
        return self.calibrator.data

    @cached_property
    def _feeds(self) -> CalibrationFeeds:
        data = self._data
        return CalibrationFeeds(
            feeds=data.feeds, samples=data.samples, provider=self.provider, seed=self.calibrator.solver.seed
        )

    @cached_property
    def _folder(self) -> Path:
        """Folder of the points' files, which is deleted with the other work."""
        return self.dense.path.parent

    @cached_property
    def _operators(self) -> frozenset[str]:
        return frozenset(site.op_type for site in self.dense.sites)

    @cached_property
    def _tables(self) -> list[EmbeddingTable]:
        return tables(self.dense.proto)

    # -- what onnxruntime offers ------------------------------------------------------------------------------------

    def _rivals(self) -> Iterator[Point]:
        """Yield the dense model as onnxruntime's own tools quantize it."""
        for scheme in rival_schemes(self._operators, short_name(parse_provider(self.provider).name)):
            yield self._rival(scheme)

    def _rival(self, scheme: Scheme) -> Point:
        name = "dense" if scheme is FLOAT32 else rival_name(scheme)
        if scheme is FLOAT32:
            path = self.dense.reference
            return Point(name=name, scheme=scheme, is_rival=True, path=path, bytes=file_bytes(path))
        path = self._path(f"rival-{scheme.kind.replace(' ', '-')}")
        with step(f"make {name}"):
            try:
                quantize(self.dense.path, path, scheme, self._data.feeds)
                quality = self._quality(path)
            except (ModelError, UsageError) as error:
                return Point(name=name, scheme=scheme, is_rival=True, path=None, error=str(error))
        return Point(name=name, scheme=scheme, is_rival=True, path=path, bytes=file_bytes(path), quality=quality)

    # -- ours -------------------------------------------------------------------------------------------------------

    def _bases(self) -> list[Scheme]:
        """The schemes that ranks are planned in."""
        if self.precision == "float16":
            return [FLOAT16]
        best = self._best_int8()
        found = [] if best is None else [best]
        return [*found, FLOAT32] if self.precision == "auto" else found

    def _best_int8(self) -> Scheme | None:
        """The int8 scheme whose outputs are best, or a faster one whose outputs are about as good."""
        tried = [static("minmax")]
        if "Conv" in self._operators:
            tried.append(static("percentile"))
        if PRODUCTS & self._operators:
            tried.append(DYNAMIC)
        for scheme in tried:
            path = self._path(f"base-{scheme.name.replace(' ', '-')}")
            with step(f"try {scheme.name}"):
                try:
                    lower(self.dense.path, path, Lowering(scheme=scheme), self._feeds)
                    quality = self._quality(path)
                except ModelError as error:
                    self.notes.append(str(error))
                    continue
            self._lowered_dense[scheme] = Point(
                name=f"dense, {scheme.name}",
                scheme=scheme,
                is_rival=False,
                path=path,
                bytes=file_bytes(path),
                quality=quality,
            )
        found = list(self._lowered_dense.values())
        if not found:
            return None
        smallest = min(point.bytes for point in found)
        found = [point for point in found if point.bytes <= MOST_BYTES * smallest]
        least = min(point.loss for point in found)
        near = [point for point in found if point.loss <= CLOSE_RATIO * least + CLOSE_LOSS]
        if len(near) > 1 and len({point.scheme.kind for point in near}) > 1 and self.measure is not None:
            near = [point for point in self._measured(near)[0] if point.loss <= CLOSE_RATIO * least + CLOSE_LOSS]
            fastest = max(point.speedup for point in near)
            near = [point for point in near if point.speedup >= 0.9 * fastest]
        return min(near, key=lambda point: point.loss).scheme

    def _planned_points(self, scheme: Scheme) -> Iterator[Point]:
        """Yield models with ranks and bits, planned for the request in a scheme."""
        request, budget = self.calibrator.request, self.calibrator.request.budget
        if scheme in self._lowered_dense and self._dense_may_keep:
            if self.precision == "int4":
                yield self._point(self._all_dense(4), scheme)
            else:
                yield replace(self._lowered_dense[scheme], made=self._all_dense(8), split=self.unsplit())
        if not (request.is_searched or budget is not None):
            yield self._point(self.calibrator.planned(), scheme)
            return
        planner = self._planner(scheme)
        try:
            if budget is not None and budget.cost == "nanoseconds":
                yield from self._of_time(budget, planner, scheme)
            elif request.fastest:
                for share in SHARES:
                    decisions = self._of_macs(Budget(keep_macs=share), planner)
                    yield self._point(planner.fit(decisions), scheme, f"{100 * share:g} % of the MACs, {scheme.name}")
            elif budget is None:
                made, self._searches[scheme] = searched_model(request, planner)
                if any(d.rank is not None or d.bits < 32 for d in _decisions(made).values()):
                    yield self._point(made, scheme)
            elif budget.cost == "bytes":
                yield from self._of_size(budget, planner, scheme)
            else:
                yield self._point(planner.fit(self._of_macs(budget, planner)), scheme)
        except (ModelError, GateError) as error:
            self.notes.append(f"{scheme.name}: {error}")

    @property
    def _dense_may_keep(self) -> bool:
        """Return whether a model without splits may keep the limit; MACs and ranks need splits, a drop a search."""
        request, budget = self.calibrator.request, self.calibrator.request.budget
        if request.max_drop is not None or not request.is_searched:
            return False
        return budget is None or budget.cost in ("bytes", "nanoseconds")

    def _of_size(self, budget: Budget, planner: CalibratedPlanner, scheme: Scheme) -> Iterator[Point]:
        """Yield the model within a size; its bytes are counted, and counted again where the file is larger."""
        allowed, over = budget.total(self.dense.size.bytes), 0
        if is_int8(scheme):
            self._smallest.append(planner.fixed_bytes + smallest_cost(planner.options, cost="bytes"))
        for _ in range(TRIES):
            point = self._point(planner.fit(planner.in_bytes(allowed - over)), scheme)
            if point.bytes <= allowed:
                yield point
                return
            over += point.bytes - allowed
            if over >= allowed:
                return

    def _of_time(self, budget: Budget, planner: CalibratedPlanner, scheme: Scheme) -> Iterator[Point]:
        """Yield models of several shares of the MACs, by bisection for the largest that is fast enough."""
        if scheme in self._lowered_dense and self._is_fast(budget, self._lowered_dense[scheme]):
            return
        low, high = 0.0, 1.0
        for _ in range(TIMED):
            share = round((low + high) / 2, 3)
            try:
                decisions = self._of_macs(Budget(keep_macs=share), planner)
            except ModelError:  # no plan has so few MACs
                low = share
                continue
            point = self._point(planner.fit(decisions), scheme, f"{100 * share:g} % of the MACs, {scheme.name}")
            yield point
            low, high = (share, high) if self._is_fast(budget, point) else (low, share)

    def _is_fast(self, budget: Budget, point: Point) -> bool:
        """Return whether a point keeps a time, with something to spare for the last measurement."""
        (timed,), latency = self._measured([point])
        if latency is None or timed.timing is None:
            return False
        allowed = budget.total(round(1e6 * latency.arms[0].median_ms))
        return 1e6 * timed.timing.median_ms <= SPARE * allowed

    def _of_macs(self, budget: Budget, planner: CalibratedPlanner) -> Decisions:
        """Decide by MACs or parameters, which are counted on float models."""
        plain = replace(planner, candidates=replace(planner.candidates, write=self.write))
        return plain.within(budget)

    def _planner(self, scheme: Scheme) -> CalibratedPlanner:
        """The planner of a scheme: its bits, and models that are written in it."""
        budget = self.calibrator.request.budget
        whole = self._whole_planner
        allowed: tuple[int, ...] = (32,)
        if is_int8(scheme):
            allowed = (4,) if self.precision == "int4" else (8, 4) if self.precision == "auto" else (8,)
            if self.calibrator.request.fastest or (budget is not None and budget.cost != "bytes"):
                allowed = (32,)  # MACs and times choose ranks; all weights have the usual bits
            elif budget is None and self.precision == "auto":
                allowed = (32, 8, 4)  # a quality may need a few weights in float
        options = [in_bits(site, allowed) for site in whole.options]
        if scheme.kind == "dynamic int8":
            convolutions = {site.name for site in whole.streams.sites if site.kernel}
            options = [
                in_bits(site, (32,)) if site.name in convolutions else new
                for site, new in zip(whole.options, options, strict=True)
            ]
        if is_int8(scheme) and allowed != (32,):
            options += [in_bits(site, allowed) for site in self._table_options]
        planner = replace(
            whole,
            options=options,
            candidates=replace(whole.candidates, write=lambda made, path: self._lowered(made, path, scheme)),
        )
        if not is_int8(scheme):
            size = self.dense.size.bytes
            return replace(planner, fixed_bytes=size - sum(site.options[0].bytes for site in options))
        base = self._lowered_dense[scheme]
        counted = sum(
            next((o.bytes for o in site.options if o.form == "dense" and o.bits == 8), site.options[0].bytes)
            for site in [*(s for s in whole.options), *self._table_options]
        )
        return replace(planner, unit="bytes", fixed_bytes=base.bytes - counted)

    @cached_property
    def _whole_planner(self) -> CalibratedPlanner:
        """The planner with every site's options in all bits; surveyed once."""
        return self.calibrator.planner_for(bits_of if self.precision != "float16" else lambda site: (32,))

    @cached_property
    def _table_options(self) -> list[SiteOptions]:
        """The embedding tables as sites."""
        path = self._path("table")
        loss_of = lambda: loss_shown(self._quality(path, "in-sample"))  # noqa: E731
        return [table_options(table, self.dense, path, loss_of) for table in self._tables]

    def _all_dense(self, bits: int) -> Planned:
        """All sites dense, in so many bits."""
        names = [site_name(site.weight) for site in self.dense.sites] + [table.name for table in self._tables]
        decisions = {name: Decision(rank=None, reason=f"{bits} bits", bits=bits) for name in names}
        return Planned(planner=FixedPlanner(decisions=decisions, filters=self.calibrator.filters), fitted={})

    # -- writing, judging, measuring --------------------------------------------------------------------------------

    def _point(self, made: Planned, scheme: Scheme, name: str = "") -> Point:
        path = self._path("point")
        with step(f"write in {scheme.name}"):
            split = self._lowered(made, path, scheme)
            quality = self._quality(path)
        ranks = any(site.rank for site in split.sites)
        return Point(
            name=name or f"{'low rank' if ranks else 'dense'}, {scheme.name}{self._bits_text(made, scheme)}",
            scheme=scheme,
            is_rival=False,
            path=path,
            bytes=file_bytes(path),
            quality=quality,
            made=made,
            split=split,
        )

    def _bits_text(self, made: Planned, scheme: Scheme) -> str:
        stored = list(self._stored_bits(made, scheme).values())
        return f", {stored.count(4)} weights in 4 bits" if 4 in stored else ""

    def unsplit(self) -> SplitModel:
        """Return the record of the dense model, whose sites are not split."""
        path = self._path("record")
        try:
            return self.write(self._all_dense(8), path)
        finally:
            _delete(path)

    def _lowered(self, made: Planned, path: Path, scheme: Scheme) -> SplitModel:
        """Write a model in a scheme; decisions that name no bits follow the precision."""
        if scheme is FLOAT32:
            return self.write(made, path)
        work = path.with_name(f"{path.stem}-float.onnx")
        try:
            split = self.write(made, work)
            lower(work, path, self._lowering(made, scheme), self._feeds)
            return split
        finally:
            _delete(work)

    def _lowering(self, made: Planned, scheme: Scheme) -> Lowering:
        if not is_int8(scheme):
            return Lowering(scheme=scheme)
        stored = self._stored_bits(made, scheme)
        bits = {site.node: stored[site_name(site.weight)] for site in self.dense.sites}
        return Lowering(scheme=scheme, bits=bits, tables={table.name: stored[table.name] for table in self._tables})

    def _stored_bits(self, made: Planned, scheme: Scheme) -> dict[str, int]:
        """Return name of each site and table -> bits that it is stored in; empty where the scheme is not int8."""
        if not is_int8(scheme):
            return {}
        decisions, usual = _decisions(made), 4 if self.precision == "int4" else 8
        if all(decision.bits == 32 for decision in decisions.values()):
            decisions = {}  # those of ranks, MACs and plans say nothing of bits
        names = [*(site_name(site.weight) for site in self.dense.sites), *(table.name for table in self._tables)]
        stored = {name: decisions[name].bits if name in decisions else usual for name in names}
        if scheme.kind == "dynamic int8":  # of products alone
            stored |= {site_name(s.weight): 32 for s in self.dense.sites if s.op_type not in PRODUCTS}
        return stored

    def _quality(self, path: Path, part: str = "check") -> OutputQuality | None:
        """The quality of a model's outputs; None where they are not finite."""
        data, outputs = self._data, self.calibrator.outputs
        samples = data.check if part == "check" and data.check is not None else data.in_sample
        if part not in outputs:
            outputs[part] = dense_outputs(self.dense.reference, samples, self.provider, self.dense.proto)
        try:
            return output_quality(outputs[part], path, samples, self.provider)
        except GateError:
            return None

    def _measured(self, points: list[Point]) -> tuple[list[Point], BenchResult | None]:
        """The points with their times, of one interleaved run."""
        able = [point for point in points if point.path is not None and point.path != self.dense.reference]
        if self.measure is None or not able:
            return points, None
        with step(f"measure {len(able) + 1} models side by side"):
            result = self.measure([self.dense.reference, *(point.path for point in able if point.path is not None)])
        timings = {id(point): arm for point, arm in zip(able, result.arms[1:], strict=True)}
        return [replace(point, timing=timings.get(id(point))) for point in points], result

    def _needs_no_float(self, points: Sequence[Point]) -> bool:
        """Return whether an int8 model keeps a quality, or a time with outputs that hardly change."""
        request = self.calibrator.request
        low = [point for point in points if is_int8(point.scheme)]
        if request.quality is not None:
            small = SMALL * self.dense.size.bytes
            return any(point.bytes <= small and self._keeps(point) for point in low)
        budget = request.budget
        if budget is None or budget.cost != "nanoseconds":
            return False
        return any(point.loss <= CLOSE_LOSS and self._is_fast(budget, point) for point in low if not point.is_rival)

    def _keeps(self, point: Point) -> bool:
        """Return whether the outputs of a point keep the quality of the request."""
        quality = self.calibrator.request.quality
        return quality is not None and point.quality is not None and quality.holds(quality.limit_of(point.quality))

    def _is_allowed(self, point: Point) -> bool:
        """Return whether `--precision` lets a point be delivered."""
        kinds = {
            "auto": {"float32", "float16", "static int8", "dynamic int8", "int4 weights"},
            "float16": {"float16"},
            "int8": {"static int8", "dynamic int8"},
            "int4": {"static int8", "dynamic int8", "int4 weights"},
        }
        if self.precision == "int4" and point.is_rival and is_int8(point.scheme):
            return False
        return point.scheme.kind in kinds[self.precision] and point.path != self.dense.reference

    def _refusal(self, points: Sequence[Point], rule: Rule) -> ModelError | GateError:
        """Return the error that says which of the models comes nearest to the limit."""
        request = self.calibrator.request
        made = [point for point in points if point.path is not None and point.path != self.dense.reference]
        if request.budget is not None and request.budget.cost == "bytes":
            smallest = min([*self._smallest, *(point.bytes for point in made)])
            return request.budget.unreachable(self.dense.size.bytes, smallest)
        if request.budget is not None and request.budget.cost == "nanoseconds" and rule.dense_ms is not None:
            fastest = min(point.timing.median_ms for point in made if point.timing is not None)
            return request.budget.unreachable(round(1e6 * rule.dense_ms), round(1e6 * fastest))
        limit = str(request.quality or request.budget or f"--precision {self.precision}")
        return GateError(
            f"{limit}: no model of {len(made)} that were tried in --precision {self.precision} keeps it; allow more, "
            f"or type --precision auto"
        )

    @cached_property
    def _counter(self) -> Iterator[int]:
        return iter(range(10_000))

    def _path(self, stem: str) -> Path:
        return self._folder / f"{stem}-{next(self._counter)}.onnx".replace("(", "").replace(")", "")


def _decisions(made: Planned) -> Decisions:
    return dict(made.planner.decisions) if isinstance(made.planner, FixedPlanner) else {}


def _delete(path: Path) -> None:
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)
