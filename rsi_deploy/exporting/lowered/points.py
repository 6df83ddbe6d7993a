"""Models that an export in low precision may deliver, and the rule that chooses one.

    a size          the best outputs among models that are so small
    a time          the best outputs among models that are so fast
    a quality       the smallest model that keeps it, or a faster one that is hardly larger (or the fastest)
    MACs, a rank    the fastest model whose outputs are about as good as the best one's

Outputs are compared on the check part by `loss_shown`. Losses that are nearly equal decide nothing: then the faster
model wins, then the smaller one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy.benchmark.result import VariantResult
from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import GateError
from rsi_deploy.exporting.calibrated.candidates import loss_shown
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Planned
from rsi_deploy.planning.quality import QualityBudget
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.precision.record import PrecisionPoint
from rsi_deploy.precision.schemes import Scheme

NEAR_BYTES = 1.1
"""Ratio of two sizes up to which the faster model wins where a quality is kept."""
NEAR_RATIO, NEAR_LOSS = 1.1, 0.005
"""Ratio of two losses up to which they are nearly equal where the outputs decide, and a loss to add."""
SLOWER = 0.98
"""Speed-up below which a model counts as slower; differences of a percent change from run to run."""
CLOSE_RATIO, CLOSE_LOSS = 1.5, 0.005
"""The same where the time decides: a ratio, and a loss to add."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A model that may be delivered.

    Attributes:
        name: name for users.
        scheme: how it is quantized.
        is_rival: whether it is the dense model as onnxruntime's own tools quantize it.
        path: its file; None where it could not be made.
        bytes: bytes of its files.
        quality: its outputs on the check part; None without any, or where they are not finite.
        made: its decisions and factors; None for a rival.
        in_float: names of its sites that are computed in float32 all the same.
        split: record of its splits; None for a rival.
        timing: its measurement beside the dense model; None where nothing was measured.
        error: why it could not be made.
    """

    name: str
    scheme: Scheme
    is_rival: bool
    path: Path | None
    bytes: int = 0
    quality: OutputQuality | None = None
    made: Planned | None = None
    in_float: frozenset[str] = frozenset()
    split: SplitModel | None = None
    timing: VariantResult | None = None
    error: str = ""

    @property
    def loss(self) -> float:
        """Loss of the outputs on the check part; 0 for the dense model."""
        return 0.0 if self.is_dense else loss_shown(self.quality)

    @property
    def is_dense(self) -> bool:
        """Return whether this is the dense model as it is."""
        return self.scheme.kind == "float32" and self.is_rival

    @property
    def speedup(self) -> float:
        """Time of the dense model over its own; 1 where nothing was measured."""
        return 1.0 if self.timing is None or self.timing.speedup is None else self.timing.speedup

    @property
    def is_slower(self) -> bool:
        """Return whether the model was measured slower than the dense one, by more than a measurement is precise."""
        interval = None if self.timing is None else self.timing.speedup_interval
        return interval is not None and interval[1] < SLOWER

    def keeps(self, quality: QualityBudget | None) -> bool:
        """Return whether the outputs keep a quality."""
        return quality is not None and self.quality is not None and quality.holds(quality.limit_of(self.quality))

    def record(self, delivered: "Point", rule: "Rule") -> PrecisionPoint:
        """Return the point as the report has it."""
        return PrecisionPoint(
            name=self.name,
            scheme=self.scheme.name,
            is_rival=self.is_rival,
            is_delivered=self is delivered,
            keeps_limit=rule.keeps(self) if rule.has_limit else not self.error,
            bytes=self.bytes or None,
            quality=self.quality,
            speedup=None if self.timing is None else self.timing.speedup,
            speedup_interval=None if self.timing is None else self.timing.speedup_interval,
            error=self.error,
        )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The rule that chooses a point.

    Attributes:
        request: what decides the ranks.
        dense_bytes: bytes of the user's model.
        dense_ms: time of the dense model, in milliseconds; None where nothing was measured.
        allow_slower: whether a model that was measured slower than the dense one may be delivered.
        allow_larger: whether a model that is larger than the user's may be delivered.
        slack: factor on the time of a budget.
    """

    request: RankRequest
    dense_bytes: int
    dense_ms: float | None
    allow_slower: bool
    allow_larger: bool = False
    slack: float = 1.0

    @property
    def has_limit(self) -> bool:
        """Return whether the request has a limit that the dense model and its quantizations may keep."""
        request = self.request
        return self.decides_by_outputs or request.quality is not None or request.max_drop is not None

    def keeps(self, point: Point) -> bool:
        """Return whether a point keeps the budget or limit of the request."""
        request = self.request
        if point.error or not math.isfinite(point.loss):
            return False
        if point.bytes > self.dense_bytes and not (self.allow_larger or point.is_dense):
            return False
        if request.quality is not None:
            return point.is_dense or point.keeps(request.quality)
        budget = request.budget
        if budget is not None and budget.cost == "bytes":
            return point.bytes <= budget.total(self.dense_bytes)
        if budget is not None and budget.cost == "nanoseconds":
            if self.dense_ms is None or point.timing is None:
                return False
            return point.timing.median_ms * 1e6 <= self.slack * budget.total(round(1e6 * self.dense_ms))
        return not point.is_rival

    def may_keep(self, point: Point) -> bool:
        """Return whether a point keeps a budget of time at the fast end of its speed-up's interval."""
        budget, interval = self.request.budget, None if point.timing is None else point.timing.speedup_interval
        if budget is None or self.dense_ms is None or interval is None:
            return False
        total = round(1e6 * self.dense_ms)
        return total / interval[1] <= budget.total(total)

    def chosen(self, points: Sequence[Point]) -> Point | None:
        """Return the best point that keeps the limit; None where none does."""
        able = [point for point in points if self.keeps(point)]
        if not self.allow_slower:
            able = [point for point in able if not point.is_slower] or able
        if not able:
            return None
        if self.request.quality is not None or self.request.max_drop is not None:
            if self.request.fastest:
                return max(able, key=lambda point: (point.speedup, -point.bytes))
            smallest = min(point.bytes for point in able)
            near = [point for point in able if point.bytes <= NEAR_BYTES * smallest]
            return max(near, key=lambda point: (point.speedup, -point.bytes))
        least = min(point.loss for point in able)
        if self.decides_by_outputs:
            near = [point for point in able if point.loss <= NEAR_RATIO * least + NEAR_LOSS]
        else:
            near = [point for point in able if point.loss <= CLOSE_RATIO * least + CLOSE_LOSS]
        return max(near, key=lambda point: (point.speedup, -point.bytes))

    @property
    def decides_by_outputs(self) -> bool:
        """Return whether the best outputs win among the points that keep the limit."""
        budget = self.request.budget
        return budget is not None and budget.cost in ("bytes", "nanoseconds")

    @property
    def text(self) -> str:
        """The rule in words."""
        if self.request.quality is not None or self.request.max_drop is not None:
            if self.request.fastest:
                return "the fastest that keeps the limit"
            near = f"{100 * NEAR_BYTES - 100:.0f} % of its bytes"
            return f"the smallest that keeps the limit and is not slower than dense, or the fastest within {near}"
        if self.decides_by_outputs:
            return f"the fastest whose outputs are about the best within {self.request.budget}"
        return "the fastest whose outputs are about as good as the best one's"


def refuse_broken(chosen: Point, budget: Budget, points: Sequence[Point]) -> None:
    """Refuse a model whose answers are no longer the dense one's.

    Raises:
        GateError: names the smallest model that was tried and holds up.
    """
    if chosen.is_dense or (chosen.quality is not None and not chosen.quality.is_broken):
        return
    whole = [p for p in points if not p.is_dense and p.quality is not None and not p.quality.is_broken]
    smallest = min(whole, key=lambda point: point.bytes, default=None)
    nearest = "" if smallest is None else f"; {smallest.name} ({smallest.bytes:,} bytes) holds up"
    raise GateError(
        f"{budget}: the best model, {chosen.name}, is broken on the check part{nearest}; allow more, or add "
        f"--allow-broken"
    )
