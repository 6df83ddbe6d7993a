"""The times that one export measures: of whole models side by side, and of sites, by cost tables."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rsi_deploy.benchmark.latency import BenchResult, bench
from rsi_deploy.benchmark.variants import make_feeds
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.progress import step
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.core.types import Array, Feeds
from rsi_deploy.costing.cost_table import read_cost_table
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.exporting.step_settings import StepSettings
from rsi_deploy.exporting.timing.profile import SCHEMES, Costing
from rsi_deploy.exporting.timing.timed_export import TimedExport, read_fitting_table, timed_export
from rsi_deploy.precision.schemes import FLOAT32, Scheme
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes

LOWERED_SECONDS = 30.0
"""Most time for the cost table of a scheme, of which an export in low precision may need two."""


@dataclass(frozen=True, kw_only=True)
class ModelTimes:
    """Times the models and sites of one export.

    Attributes:
        dense: the dense model.
        job: settings that the steps share.
        config: settings of the export.
        costing: how cost tables are made; whole models are timed with its threads.
        command: command line for a cost table that is measured.
    """

    dense: DenseModel
    job: StepSettings
    config: ExportConfig
    costing: Costing
    command: str

    @cached_property
    def feeds(self) -> dict[str, Array] | None:
        """Inputs to time with: the user's own, or random samples; None where the model cannot be run."""
        if self.dense.outputs is None:
            return None
        fixed, seed = self._fixed_feeds, self.job.settings.seed
        batch = 0 if fixed else self.config.bench_batch
        feeds, _ = make_feeds(self.dense.inputs, batch=batch, seed=seed, given=fixed, shapes=self._shapes)
        return feeds

    @property
    def is_measured(self) -> bool:
        """Whether models are measured on this machine."""
        return self.config.measure and self.dense.outputs is not None

    def latency(self, paths: Sequence[Path], least: float = 0.0, runs: int = 1) -> BenchResult:
        """Measure models side by side, the dense one first; the second of two is the compressed one.

        Args:
            paths: files of the models.
            least: fewest seconds for the measurement.
            runs: factor on its seconds.
        """
        result = bench(
            [self.dense.reference if path == self.dense.path else path for path in paths],
            batch=self.config.bench_batch,
            feeds=self._fixed_feeds,
            input_shape=self._shapes,
            provider=self.job.provider,
            threads=self.costing.threads,
            seconds=runs * max(self.config.bench_seconds, least),
            seed=self.job.settings.seed,
            labels=["dense", "compressed"] if len(paths) == 2 else ["dense", *(path.stem for path in paths[1:])],
        )
        arms = tuple(arm.model_copy(update={"model": Path(arm.model).name}) for arm in result.arms)
        return result.model_copy(update={"arms": arms})

    def check_cost(self) -> None:
        """Refuse a `--cost` table of another model or machine, also where the plan needs no times of its scheme.

        Raises:
            UsageError: names the differences.
        """
        cost, feeds = self.config.cost, self.feeds
        if cost is None or feeds is None:
            return
        name = read_cost_table(cost).conditions.scheme
        scheme = next((known for known in SCHEMES.values() if known.name == name), FLOAT32)
        costing = replace(self.costing, scheme=scheme)
        read_fitting_table(cost, costing, self.dense.path, feeds, foreign=self.config.allow_cost_mismatch)

    def of_sites(self) -> TimedExport:
        """Return the times of sites in float32, of `--cost` if it is set.

        Raises:
            ModelError: the model cannot be run on this machine.
        """
        return self._of_sites(self.costing, self.config.cost)

    def of_sites_in(self, scheme: Scheme) -> TimedExport:
        """Return the times of sites in a scheme, of `--cost` if it has them.

        Raises:
            ModelError: the model cannot be run on this machine.
        """
        costing = replace(self.costing, scheme=scheme, seconds=min(self.costing.seconds, LOWERED_SECONDS))
        cost = self.config.cost
        if cost is not None and read_cost_table(cost).conditions.scheme != scheme.name:
            cost = None
        with step(f"cost table of {scheme.name}"):
            return self._of_sites(costing, cost)

    def _of_sites(self, costing: Costing, cost: str | Path | None) -> TimedExport:
        if self.feeds is None:
            hint = "type a budget that needs no times, such as --max-size 50%"
            raise ModelError("the model cannot be run on this machine, so that nothing is timed", hint=hint)
        return timed_export(
            self.dense.path,
            self.feeds,
            costing,
            cost=cost,
            foreign=self.config.allow_cost_mismatch,
            must_be_faster=not self.config.allow_slower,
            name=self.dense.source.name,
            command=self.command,
        )

    @property
    def _fixed_feeds(self) -> Feeds | None:
        """The probe inputs, where the user chose their shapes or arrays; else any batch will do."""
        return self.dense.feeds if self.job.own_feeds is not None or self.job.shapes else None

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]] | None:
        """The shapes of the data with a whole batch; None where inputs are fixed or the model leaves no shape open."""
        if self._fixed_feeds or not self.dense.examples:
            return None
        axes = BatchAxes.of({spec.name: spec.shape for spec in self.dense.inputs})
        return axes.with_batch(self.dense.examples, axes.fixed or self.config.bench_batch)
