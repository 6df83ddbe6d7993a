"""The last word on an export is the finished model's: shown faster than dense, or its splits are undone.

measured faster?  -- yes --> delivered
      | no
undo the splits that save nothing alone; then, each time, the half that saves least; measure again
      | none left
the dense model is delivered, and the report says so
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, direction
from rsi_deploy.benchmark.variants import Runtime
from rsi_deploy.core.types import Feeds
from rsi_deploy.costing.cost_table import CostTable
from rsi_deploy.costing.site_timing import Wanted, time_sites
from rsi_deploy.exporting.profile import Costing
from rsi_deploy.exporting.steps import Compressed
from rsi_deploy.planning.decide import Planned
from rsi_deploy.planning.planner import Decision, SitePlanner
from rsi_deploy.report.schema import Undone

UNDONE = "undone: the finished model was not measured faster with it"
SURE = 0.05
"""Relative half width of the speedup's interval above which the report speaks of noise."""
SECONDS = 10.0
"""For the times of the splits alone, where no table has them."""

Splits = dict[str, tuple[str, int]]


@dataclass(frozen=True, kw_only=True)
class Without:
    """A planner whose splits of some sites are undone.

    Attributes:
        planner: whose decisions hold for the others.
        undone: names of sites that stay dense.
    """

    planner: SitePlanner
    undone: frozenset[str]

    @property
    def always_split(self) -> bool:
        """As the planner says."""
        return self.planner.always_split

    def decide(self, name: str, out_features: int, in_features: int) -> Decision:
        """What the planner says, or dense."""
        decision = self.planner.decide(name, out_features, in_features)
        if name in self.undone and decision.rank is not None:
            return Decision(rank=None, reason=UNDONE)
        return decision

    def check(self, sites: Iterable[tuple[str, int, int]]) -> None:
        """As the planner does."""
        self.planner.check(sites)


@dataclass(kw_only=True)
class LastWord:
    """Measures the finished model, and undoes splits until it is faster or dense.

    Attributes:
        compress: writes the model of some plan.
        measure: dense and compressed side by side.
        refit: fits the factors of a plan again, after some of its splits were undone.
        dense: the dense model.
        feeds: that splits alone are timed with.
        costing: how.
        table: with their times, where there is one.
        undone: what was undone.
        words: what came of it.
    """

    compress: Callable[[Planned], Compressed]
    measure: Callable[[], BenchResult]
    refit: Callable[[SitePlanner], Planned] | None
    dense: Path
    feeds: Feeds
    costing: Costing
    table: CostTable | None
    undone: list[Undone] = field(default_factory=list)
    words: str = ""

    def spoken(self, made: Planned, result: Compressed) -> tuple[Planned, Compressed, BenchResult]:
        """The plan, the model and the measurement that are delivered."""
        latency, splits, savings = self.measure(), splits_of(result), None
        asked = dict(splits)
        while splits and not is_faster(latency):
            savings = savings if savings is not None else self._savings(splits)
            splits = kept(splits, savings, first=splits == asked)
            made, result, latency = self._again(made, asked, splits)
        if splits and splits != asked and self.refit is not None:
            made = self.refit(Without(planner=made.planner, undone=frozenset(asked.keys() - splits.keys())))
            result, latency = self.compress(made), self.measure()
            if not is_faster(latency):
                splits = {}
                made, result, latency = self._again(made, asked, splits)
        for name in asked.keys() - splits.keys():
            form, rank = asked[name]
            saving = (savings or {}).get(name)
            self.undone.append(Undone(site=name, form=form, rank=rank, saving_ns=saving))
        self.words = _words(len(asked), len(splits), latency)
        return made, result, latency

    def _again(self, made: Planned, asked: Splits, splits: Splits) -> tuple[Planned, Compressed, BenchResult]:
        """The model with these of the splits that were asked for, written and measured."""
        planner = made.planner.planner if isinstance(made.planner, Without) else made.planner
        less = Without(planner=planner, undone=frozenset(asked.keys() - splits.keys()))
        made = Planned(planner=less, fitted=made.fitted)
        return made, self.compress(made), self.measure()

    def _savings(self, splits: Splits) -> dict[str, int]:
        """Nanoseconds that each split saves alone; 0 where it cannot be timed or was not shown faster."""
        costs = {} if self.table is None else self.table.by_site()
        savings = {}
        for name, (form, rank) in splits.items():
            cost = costs.get(name)
            time = None if cost is None else cost.nanoseconds(form, rank)
            if cost is not None and time is not None:
                savings[name] = cost.dense_nanoseconds - time if cost.is_faster(form, rank) else 0
        missing = {name: split for name, split in splits.items() if name not in savings}
        return savings | (self._timed(missing) if missing else {})

    def _timed(self, splits: Splits) -> dict[str, int]:
        found, _ = self.costing.pieces(self.dense, self.feeds)
        shapes: dict[tuple[str, str, int], Wanted] = {}
        for name, (form, rank) in splits.items():
            if name in found:
                piece = found[name]
                own = next(known for known in piece.site.forms if known == form)
                shapes[(piece.signature, form, rank)] = Wanted(piece=piece, splits=((own, rank),))
        runtime = Runtime(provider=self.costing.provider, threads=self.costing.threads)
        costs = time_sites(list(shapes.values()), runtime, seconds=SECONDS, precision=self.costing.precision)
        savings = {}
        for key, cost in zip(shapes, costs, strict=True):
            (split,) = cost.splits
            shown = cost.blocks >= MIN_BLOCKS and split.is_faster
            savings[key] = cost.dense_nanoseconds - split.nanoseconds if shown else 0
        return {
            name: savings[found[name].signature, form, rank] if name in found else 0
            for name, (form, rank) in splits.items()
        }


def is_faster(latency: BenchResult) -> bool:
    """Whether the second arm was shown to be faster than the first."""
    ends = latency.arms[1].speedup_interval
    return ends is not None and latency.arms[1].blocks >= MIN_BLOCKS and direction(ends) > 0


def splits_of(result: Compressed) -> Splits:
    """Site name -> (form, rank) of what a written model has split."""
    return {site.name: (site.form or "first", site.rank) for site in result.split.sites if site.rank is not None}


def kept(splits: Splits, savings: Mapping[str, int], *, first: bool) -> Splits:
    """The splits that stay in the next round.

    Args:
        splits: that are there.
        savings: of each alone; 0 where none was shown.
        first: whether none was undone so far: those that save nothing go first.

    Example:
        >>> kept({"a": ("gemm", 1), "b": ("gemm", 2), "c": ("gemm", 3)}, {"a": 5, "b": 0, "c": 9}, first=True)
        {'a': ('gemm', 1), 'c': ('gemm', 3)}
        >>> kept({"a": ("gemm", 1), "c": ("gemm", 3)}, {"a": 5, "c": 9}, first=False)
        {'c': ('gemm', 3)}
    """
    useful = [name for name in splits if savings.get(name, 0) > 0]
    if not first or len(useful) == len(splits):
        useful = sorted(splits, key=lambda name: -savings.get(name, 0))[: len(splits) // 2]
    return {name: split for name, split in splits.items() if name in useful}


def _words(asked: int, left: int, latency: BenchResult) -> str:
    """What came of it; a machine too noisy to decide is named, for the tie went to dense."""
    told, width = latency.arms[1].verdict, latency.reached_precision
    if left < asked and (width is None or width > SURE):
        noise = "too few blocks" if width is None else f"+-{100 * width:.0f} %"
        told += f"; the machine is too noisy to tell small gains ({noise}; more --bench-seconds help)"
    if not asked:
        return "nothing is split: the dense model is delivered"
    if left == asked:
        return f"the finished model is measured faster than the dense one: {told}"
    if left:
        return (
            f"{asked - left} of {asked} splits were undone, for the model was not measured faster with them; what is "
            f"left is {told}"
        )
    noise = told.partition("; ")[2]
    return (
        f"the DENSE model is delivered: with none of its {asked} splits was it measured faster here"
        f"{f' ({noise})' if noise else ''}. Where smaller is enough, add --allow-slower"
    )
