"""Measure the finished model, and undo splits where it is not faster than the dense one.

measured faster?  -- yes --> delivered
      | no
undo the splits that save nothing alone; in later rounds the half that saves least; measure again
      | none left
the dense model is delivered, and the report says so
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from graph_passes.forms import FOLDED
from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, direction
from rsi_deploy.benchmark.variants import Runtime
from rsi_deploy.core.types import Feeds
from rsi_deploy.costing.cost_table import CostTable
from rsi_deploy.costing.site_models import Piece
from rsi_deploy.costing.site_timing import TimedShape, time_sites
from rsi_deploy.exporting.timing.profile import Costing
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.decide import Planned
from rsi_deploy.planning.planner import Decision, SitePlanner
from rsi_deploy.report.schema import Undone

UNDONE = "undone: the finished model was not measured faster with it"
SURE = 0.05
"""Relative half width of the speedup's interval above which the report mentions noise."""
SECONDS = 10.0
"""Seconds for the times of single splits, where no table has them."""

Splits = dict[str, tuple[str, int]]


@dataclass(frozen=True, kw_only=True)
class Without:
    """A planner whose splits of some sites are undone.

    Attributes:
        planner: decides the other sites.
        undone: names of sites that stay dense.
    """

    planner: SitePlanner
    undone: frozenset[str]

    @property
    def always_split(self) -> bool:
        """Return whether the planner splits where nothing is saved, too."""
        return self.planner.always_split

    def decide(self, name: str, out_features: int, in_features: int) -> Decision:
        """Return the planner's decision, or dense."""
        decision = self.planner.decide(name, out_features, in_features)
        if name in self.undone and decision.rank is not None:
            return Decision(rank=None, reason=UNDONE)
        return decision

    def check(self, sites: Iterable[tuple[str, int, int]]) -> None:
        """Check the sites as the planner does."""
        self.planner.check(sites)


class Outcome(NamedTuple):
    """The model that is delivered after the rollback.

    Attributes:
        split: the model's split.
        latency: its measurement beside the dense model.
        undone: splits that were undone.
        verdict: what the measurement has led to, in words.
    """

    split: SplitModel
    latency: BenchResult
    undone: tuple[Undone, ...]
    verdict: str


@dataclass(frozen=True, kw_only=True)
class SlowdownRollback:
    """Measures the finished model, and undoes splits until it is faster or dense.

    Attributes:
        compress: writes the model of a plan.
        measure: measures the dense and the compressed model side by side.
        refit: fits the factors of a plan again, after some of its splits were undone; None where nothing is fitted.
        dense: the dense model's file.
        feeds: inputs that splits alone are timed with.
        costing: how splits are timed.
        table: cost table, where there is one.
    """

    compress: Callable[[Planned], SplitModel]
    measure: Callable[[], BenchResult]
    refit: Callable[[SitePlanner], Planned] | None
    dense: Path
    feeds: Feeds
    costing: Costing
    table: CostTable | None

    def outcome(self, planned: Planned, split: SplitModel) -> Outcome:
        """Measure the model of a plan, undo splits while it is not faster, and return what is delivered."""
        latency, splits, savings = self.measure(), splits_of(split), None
        first = dict(splits)
        while splits and not is_faster(latency):
            savings = savings if savings is not None else self._savings(splits)
            splits = kept(splits, savings, first=splits == first)
            planned, split, latency = self._again(planned, first, splits)
        if splits and splits != first and self.refit is not None:
            planned = self.refit(Without(planner=planned.planner, undone=frozenset(first.keys() - splits.keys())))
            split, latency = self.compress(planned), self.measure()
            if not is_faster(latency):
                splits = {}
                planned, split, latency = self._again(planned, first, splits)
        undone = tuple(
            Undone(site=name, form=first[name][0], rank=first[name][1], saving_ns=(savings or {}).get(name))
            for name in first.keys() - splits.keys()
        )
        return Outcome(split, latency, undone, _words(len(first), len(splits), latency))

    def _again(self, planned: Planned, first: Splits, splits: Splits) -> tuple[Planned, SplitModel, BenchResult]:
        """The model with these of its first splits, written and measured."""
        planner = planned.planner.planner if isinstance(planned.planner, Without) else planned.planner
        less = Without(planner=planner, undone=frozenset(first.keys() - splits.keys()))
        planned = Planned(planner=less, fitted=planned.fitted)
        return planned, self.compress(planned), self.measure()

    def _savings(self, splits: Splits) -> dict[str, int]:
        """Nanoseconds that each split saves alone; 0 where it cannot be timed or is not shown faster."""
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
        shapes: dict[tuple[str, str, int], TimedShape] = {}
        for name, (form, rank) in splits.items():
            if name in found:
                piece = _piece_for(found[name], form)
                own = next(known for known in piece.site.forms if known == form)
                shapes[(piece.signature, form, rank)] = TimedShape(piece=piece, splits=((own, rank),))
        runtime = Runtime(provider=self.costing.provider, threads=self.costing.threads)
        costs = time_sites(list(shapes.values()), runtime, seconds=SECONDS, precision=self.costing.precision)
        savings = {}
        for key, cost in zip(shapes, costs, strict=True):
            (split,) = cost.splits
            shown = cost.blocks >= MIN_BLOCKS and split.is_faster
            savings[key] = cost.dense_nanoseconds - split.nanoseconds if shown else 0
        return {
            name: savings[_piece_for(found[name], form).signature, form, rank] if name in found else 0
            for name, (form, rank) in splits.items()
        }


def _piece_for(piece: Piece, form: str) -> Piece:
    """Return the piece in which a form is timed."""
    return piece.group if form in FOLDED and piece.group is not None else piece


def is_faster(latency: BenchResult) -> bool:
    """Return whether the second arm is shown to be faster than the first."""
    ends = latency.arms[1].speedup_interval
    return ends is not None and latency.arms[1].blocks >= MIN_BLOCKS and direction(ends) > 0


def splits_of(split: SplitModel) -> Splits:
    """Return site name -> (form, rank) of a model's splits."""
    return {site.name: (site.form or "first", site.rank) for site in split.sites if site.rank is not None}


def kept(splits: Splits, savings: Mapping[str, int], *, first: bool) -> Splits:
    """Return the splits that stay in the next round.

    Args:
        splits: the model's splits.
        savings: nanoseconds that each saves alone; 0 where no saving is shown.
        first: whether no split was undone so far: those that save nothing go first.

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


def _words(first: int, left: int, latency: BenchResult) -> str:
    """The outcome in words; they name the noise of a machine on which a tie went to the dense model."""
    verdict, width = latency.arms[1].verdict, latency.reached_precision
    if left < first and (width is None or width > SURE):
        noise = "too few blocks" if width is None else f"+-{100 * width:.0f} %"
        verdict += f"; the machine is too noisy to show small gains ({noise}; more --bench-seconds help)"
    if not first:
        return "nothing is split: the dense model is delivered"
    if left == first:
        return f"the finished model is measured faster than the dense one: {verdict}"
    if left:
        return (
            f"{first - left} of {first} splits were undone, for the model was not measured faster with them; what is "
            f"left is {verdict}"
        )
    noise = verdict.partition("; ")[2]
    return (
        f"the DENSE model is delivered: with none of its {first} splits was it measured faster here"
        f"{f' ({noise})' if noise else ''}. Where smaller is enough, add --allow-slower"
    )
