"""Write models in low precision, compare their outputs with the dense model's, and measure them."""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.calibration.output_agreement import dense_outputs, output_quality
from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.core.progress import step
from rsi_deploy.core.sites import site_name
from rsi_deploy.exporting.calibration_step import Calibrator
from rsi_deploy.exporting.lowered.points import Point
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.exporting.timing.model_times import ModelTimes
from rsi_deploy.io.onnx_file import copy_model, file_bytes, move_model
from rsi_deploy.io.onnx_reader import read_graph
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Decisions, Planned
from rsi_deploy.planning.planner import Decision, FixedPlanner
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.precision.embedding_tables import EmbeddingTable, tables
from rsi_deploy.precision.lowering import CalibrationFeeds, Lowering, lower
from rsi_deploy.precision.quantizers import quantize
from rsi_deploy.precision.rivals import rival_name
from rsi_deploy.precision.schemes import FEW_BITS, FLOAT32, Scheme, has_bits
from rsi_deploy.precision.targets import ProviderTarget


@dataclass(frozen=True, kw_only=True)
class Base:
    """A scheme that ranks and bits are planned in.

    Attributes:
        scheme: the scheme.
        in_float: names of sites that are computed in float32 all the same.
    """

    scheme: Scheme
    in_float: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The base in words."""
        count = len(self.in_float)
        sites = f", {count} {'site' if count == 1 else 'sites'} in float32" if count else ""
        return f"{self.scheme.name}{sites}"


@dataclass(kw_only=True)
class PointMaker:
    """Makes points.

    Attributes:
        calibrator: the calibration of the export, which writes float models of decisions and factors.
        times: measures models and sites.
        precision: value of `--precision`.
        target: provider that will run the model.
        notes: notes for the report on models that cannot be made.
    """

    calibrator: Calibrator
    times: ModelTimes
    precision: str
    target: ProviderTarget
    notes: list[str] = field(default_factory=list)

    @property
    def dense(self) -> DenseModel:
        """The dense model."""
        return self.calibrator.dense

    @property
    def request(self) -> RankRequest:
        """What decides the ranks."""
        return self.calibrator.request

    def rival(self, scheme: Scheme) -> Point:
        """Return the dense model as onnxruntime's own tools quantize it."""
        if scheme is FLOAT32:
            path = self.dense.reference
            return Point(name="dense", scheme=scheme, is_rival=True, path=path, bytes=file_bytes(path))
        return self._once(f"rival, {scheme.name}", lambda: self._rival(scheme))

    def eight_bits(self, base: Base) -> Point:
        """Return the dense model in a base, with weights in eight bits.

        Raises:
            ModelError: as `point`.
        """
        key = f"{base.scheme.name}, {sorted(base.in_float)}"
        return self._once(key, lambda: self.point(self.all_dense(8), base))

    def _once(self, key: str, make: Callable[[], Point]) -> Point:
        if self.calibrator.kept is None:
            return make()
        made: Point = self.calibrator.kept.point(key, make)
        return made

    def _rival(self, scheme: Scheme) -> Point:
        name, path = rival_name(scheme), self.path(f"rival-{scheme.kind.replace(' ', '-')}")
        with step(f"make {name}"):
            try:
                quantize(self.dense.path, path, scheme, self.calibrator.data.feeds)
                self.target.check_model(read_graph(path))
                quality = self.quality(path)
            except (ModelError, UsageError) as error:
                return Point(name=name, scheme=scheme, is_rival=True, path=None, error=str(error))
        return Point(name=name, scheme=scheme, is_rival=True, path=path, bytes=file_bytes(path), quality=quality)

    def point(self, made: Planned, base: Base, name: str = "") -> Point:
        """Write and judge the model of decisions and factors.

        Raises:
            ModelError: onnxruntime cannot quantize the model, or the target does not run it.
        """
        path = self.path("point")
        with step(f"write in {base.name}"):
            split = self.lowered(made, path, base)
            self.target.check_model(read_graph(path))
            quality = self.quality(path)
        ranks = any(site.rank for site in split.sites)
        return Point(
            name=f"{name or ('low rank' if ranks else 'dense')}, {base.name}{self._bits_text(made, base.scheme)}",
            scheme=base.scheme,
            is_rival=False,
            path=path,
            bytes=file_bytes(path),
            quality=quality,
            made=made,
            in_float=base.in_float,
            split=split,
        )

    def _bits_text(self, made: Planned, scheme: Scheme) -> str:
        stored = list(self.stored_bits(made, scheme).values())
        counts = {bits: stored.count(bits) for bits in (5, 4, 3) if bits in stored}
        return "".join(f", {n} {'weight' if n == 1 else 'weights'} in {bits} bits" for bits, n in counts.items())

    def deliver(self, point: Point) -> None:
        """Put the point's file in the place of the export's model."""
        assert point.path is not None
        kept = self.calibrator.kept
        if kept is None or point.path.parent != kept.folder:
            move_model(point.path, self.dense.target)
        elif point.made is None:
            copy_model(point.path, self.dense.target)
        else:  # written again, with the settings of this export in its metadata
            self.lowered(point.made, self.dense.target, Base(scheme=point.scheme, in_float=point.in_float))

    def all_dense(self, bits: int) -> Planned:
        """Return all sites dense, in so many bits."""
        decisions = {name: Decision(rank=None, reason=f"{bits} bits", bits=bits) for name in self._names}
        return Planned(planner=FixedPlanner(decisions=decisions, filters=self.calibrator.filters), fitted={})

    def unsplit(self) -> SplitModel:
        """Return the record of the dense model, whose sites are not split."""
        path = self.path("record")
        try:
            return self.calibrator.write(self.all_dense(8), path)
        finally:
            _delete(path)

    def lowered(self, made: Planned, path: Path, base: Base) -> SplitModel:
        """Write a model; decisions that name no bits follow the precision."""
        if base.scheme is FLOAT32:
            return self.calibrator.write(made, path)
        work = path.with_name(f"{path.stem}-float.onnx")
        try:
            split = self.calibrator.write(made, work)
            lowering = self._lowering(made, base)
            inputs = self.calibrator.input_moments() if lowering.is_packed else {}
            lower(work, path, lowering, replace(self._feeds, inputs=inputs))
            return split
        finally:
            _delete(work)

    def _lowering(self, made: Planned, base: Base) -> Lowering:
        if not has_bits(base.scheme):
            return Lowering(scheme=base.scheme, table_bits=self._table_bits)
        stored = self.stored_bits(made, base.scheme)
        sites = {site.node: site_name(site.weight) for site in self.dense.sites}
        return Lowering(
            scheme=base.scheme,
            bits={node: stored[name] for node, name in sites.items()},
            tables={table.name: stored[table.name] for table in self.tables},
            table_bits=self._table_bits,
            in_float=frozenset(node for node, name in sites.items() if name in base.in_float),
            repairs=self._repairs(made, base.scheme),
        )

    def _repairs(self, made: Planned, scheme: Scheme) -> dict[str, int]:
        """Return name of a site's node -> rank of its repair, which is free where onnxruntime folds it."""
        decisions = decisions_in(made) if scheme is FEW_BITS else {}
        named = {site.node: decisions.get(site_name(site.weight)) for site in self.dense.sites}
        return {node: decision.repair for node, decision in named.items() if decision is not None and decision.repair}

    def stored_bits(self, made: Planned, scheme: Scheme) -> dict[str, int]:
        """Return name of each site and table -> bits that it is stored in; empty where the scheme has none."""
        if not has_bits(scheme):
            return {}
        decisions = decisions_in(made)
        if all(decision.bits == 32 for decision in decisions.values()):
            decisions = {}  # those of ranks, MACs and plans say nothing of bits
        usual = 4 if self.precision == "int4" else 8
        return {name: decisions[name].bits if name in decisions else usual for name in self._names}

    def quality(self, path: Path, part: str = "check", most: int | None = None) -> OutputQuality | None:
        """Return the quality of a model's outputs; None where they are not finite.

        Args:
            path: file of the model.
            part: "check" or "in-sample".
            most: number of samples that are enough; None for all of the part.
        """
        data, outputs = self.calibrator.data, self.calibrator.outputs
        samples = data.check if part == "check" and data.check is not None else data.in_sample
        if part not in outputs:
            outputs[part] = dense_outputs(self.dense.reference, samples, self.calibrator.provider, self.dense.proto)
        known = outputs[part]
        if most is not None:
            counts = list(itertools.accumulate(len(batch) for batch in known.batches))
            known = replace(known, batches=known.batches[: 1 + bisect.bisect_left(counts, most)])
        try:
            return output_quality(known, path, samples, self.calibrator.provider)
        except GateError:
            return None

    def measured(self, points: Sequence[Point], *, runs: int = 1) -> tuple[list[Point], BenchResult | None]:
        """Return the points with their times, of one interleaved run that may take as long as so many runs."""
        able = [point for point in points if point.path is not None and point.path != self.dense.reference]
        if not able or not self.times.is_measured:
            return list(points), None
        paths = [self.dense.reference, *(point.path for point in able if point.path is not None)]
        with step(f"measure {len(paths)} models side by side"):
            result = self.times.latency(paths, least=len(paths), runs=runs)
        timings = {id(point): arm for point, arm in zip(able, result.arms[1:], strict=True)}
        return [replace(point, timing=timings.get(id(point))) for point in points], result

    def time_over(self, budget: Budget, point: Point) -> float:
        """Return the time of a point over the allowed time; infinity where nothing is measured."""
        (timed,), latency = self.measured([point])
        if latency is None or timed.timing is None:
            return math.inf
        return 1e6 * timed.timing.median_ms / budget.total(round(1e6 * latency.arms[0].median_ms))

    @cached_property
    def tables(self) -> list[EmbeddingTable]:
        """The embedding tables of the dense model, where the target runs what unpacks them."""
        return tables(self.dense.proto) if self._table_bits == 8 else []

    @property
    def _table_bits(self) -> int:
        return 8 if self.target.runs("GatherBlockQuantized") else 32

    @cached_property
    def _names(self) -> list[str]:
        return [*(site_name(site.weight) for site in self.dense.sites), *(table.name for table in self.tables)]

    @cached_property
    def _feeds(self) -> CalibrationFeeds:
        data, seed = self.calibrator.data, self.calibrator.solver.seed
        return CalibrationFeeds(feeds=data.feeds, samples=data.samples, provider=self.calibrator.provider, seed=seed)

    @cached_property
    def _counter(self) -> Iterator[int]:
        return iter(range(10_000))

    def path(self, stem: str) -> Path:
        """Return a new path beside the dense model, whose folder is deleted with the other work."""
        return self.dense.path.parent / f"{stem}-{next(self._counter)}.onnx".replace("(", "").replace(")", "")


def decisions_in(made: Planned) -> Decisions:
    """Return the decisions of a plan; empty where one rank decides."""
    return dict(made.planner.decisions) if isinstance(made.planner, FixedPlanner) else {}


def _delete(path: Path) -> None:
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)
