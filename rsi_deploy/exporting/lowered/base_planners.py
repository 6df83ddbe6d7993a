"""Planners of ranks and bits in a base: the options of its sites and tables, and the models that it writes."""

from dataclasses import dataclass, replace
from functools import cached_property

from rsi_deploy.core.errors import ModelError
from rsi_deploy.exporting.calibrated.candidates import loss_shown
from rsi_deploy.exporting.calibrated.planner import CalibratedPlanner
from rsi_deploy.exporting.lowered.bases import Bases
from rsi_deploy.exporting.lowered.bits import bits_of, in_bits, table_options
from rsi_deploy.exporting.lowered.maker import Base, PointMaker
from rsi_deploy.exporting.timing.timed_export import TimedExport
from rsi_deploy.planning.knapsack import SiteOptions
from rsi_deploy.precision.schemes import FEW_BITS, has_bits, timed_scheme

TABLE_SAMPLES = 64
"""Samples on which the loss of a rounded embedding table is measured."""


@dataclass(frozen=True, kw_only=True)
class BasePlanners:
    """Planners of one export, which share one survey of its data.

    Attributes:
        maker: makes the models.
        bases: the dense model in each scheme; the bytes that options do not count follow from it.
    """

    maker: PointMaker
    bases: Bases

    def planner(self, base: Base) -> CalibratedPlanner:
        """Return the planner of a base: its bits, and models that are written in it."""
        whole, allowed = self.whole, self._planned_bits if has_bits(base.scheme) else (32,)
        if base.scheme is FEW_BITS and self.maker.precision == "auto" and allowed != (32,):
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
        dense = self.bases.dense.get(base.scheme)
        if dense is None:
            size = self.maker.dense.size.bytes
            return replace(planner, fixed_bytes=size - sum(site.options[0].bytes for site in options))
        counted = sum(
            next((o.bytes for o in site.options if o.form == "dense" and o.bits == 8), site.options[0].bytes)
            for site in [*whole.options, *self._table_options]
        )
        return replace(planner, unit="bytes", fixed_bytes=dense.bytes - counted)

    def timed(self, base: Base) -> tuple[CalibratedPlanner, TimedExport]:
        """Return the planner of a base with the splits that are faster in it, and their times.

        Raises:
            ModelError: no split is faster.
        """
        timing, planner = self.maker.times.of_sites_in(timed_scheme(base.scheme)), self.planner(base)
        options = timing.narrowed(planner.options)
        if not any(len(site.options) > 1 for site in options):
            hint = "let more sites be split (--include), or add --allow-slower"
            raise ModelError(f"no split of any of {len(options)} sites is measured faster", hint=hint)
        return replace(planner, options=options, timing=timing), timing

    @cached_property
    def whole(self) -> CalibratedPlanner:
        """The planner with every site's options in all bits; surveyed once."""
        bits = {32} if self.maker.precision == "float16" else {32, 8, *self._planned_bits}
        return self.maker.calibrator.planner_for(
            lambda site: tuple(b for b in bits_of(site) if b in bits), with_repairs=FEW_BITS in self.bases.dense
        )

    @property
    def _planned_bits(self) -> tuple[int, ...]:
        """The bits that the plan chooses among; MACs and times choose ranks, and all weights have the usual bits."""
        request = self.maker.request
        if request.fastest or (request.budget is not None and request.budget.cost != "bytes"):
            return (32,)
        return {"int8": (8,), "int4": (4,)}.get(self.maker.precision, (8, 5, 4, 3))

    @cached_property
    def _table_options(self) -> list[SiteOptions]:
        """The embedding tables as sites."""
        path = self.maker.path("table")
        loss_of = lambda: loss_shown(self.maker.quality(path, "in-sample", TABLE_SAMPLES))  # noqa: E731
        return [table_options(table, self.maker.dense, path, loss_of) for table in self.maker.tables]
