"""Find the smallest or fastest model that keeps a limit, by a search over its share of the dense model.

    1.00  the dense model keeps every limit
    0.74  keeps it: the answer
    0.73  does not keep it
    0.31  the smallest that any plan comes to

Every point is planned, fitted and judged as it would be delivered. The losses that the planner foresees give the first
point, and the next one by the ratio of the loss that was shown. They are no measure of the answer: they add up what
sites do alone. Between a point that keeps the limit and one that does not, the logarithm of the loss is interpolated.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.core.progress import at_samples
from rsi_deploy.evaluation.accuracy import evaluate
from rsi_deploy.exporting.calibrated.candidates import Candidates, loss_shown
from rsi_deploy.exporting.calibrated.plan_check import foreseen_loss
from rsi_deploy.exporting.calibrated.planner import CalibratedPlanner
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.planning.decide import Decisions, Planned
from rsi_deploy.planning.planner import FixedPlanner
from rsi_deploy.planning.quality import QualityBudget
from rsi_deploy.planning.record import PlanRecord, PlanTrial
from rsi_deploy.planning.request import RankRequest

STEPS = 8
"""Most models that are fitted."""
CLOSE = 0.006
"""Difference of the shares of the answer and of the next smaller point at which the search ends."""
SLOW = 0.5
"""Largest part that a useful point leaves of the difference."""
DROP_AIM = 0.05
"""Foreseen loss of the first model that is tried for a drop of the accuracy."""


@dataclass(kw_only=True)
class SizeSearch:
    """A search over shares of the dense model.

    Attributes:
        plan: function that plans for a share.
        foreseen: function that returns the foreseen loss of decisions.
        splits: function that returns the changes of decisions, site name -> (form, rank, bits).
        fit: function that fits the factors of decisions.
        judge: function that returns the value of a model, and whether it keeps the limit.
        excess: function that returns the logarithm of the loss over the largest allowed one, from a value.
        smallest: share of the smallest plan.
        aim: foreseen loss of the first point.
        trials: models that were fitted and judged, in order.
    """

    plan: Callable[[float], Decisions]
    foreseen: Callable[[Decisions], float]
    splits: Callable[[Decisions], Mapping[str, Any]]
    fit: Callable[[Decisions], Planned]
    judge: Callable[[Planned], tuple[float | None, bool]]
    excess: Callable[[float | None], float]
    smallest: float
    aim: float
    trials: list[PlanTrial] = field(default_factory=list)

    def run(self) -> Planned | None:
        """Return the model of the smallest share that keeps the limit; None if none does that was tried."""
        low, high, best = self.smallest, 1.0, None
        seen: dict[frozenset[Any], tuple[Planned | None, float | None, bool]] = {}
        excesses: dict[float, float] = {}
        edge = (1 - low) / 4
        share, width = min(max(self._foreseeing(self.aim, low, 1.0), low + edge), 1 - edge), high - low
        while len(self.trials) < STEPS and high - low > CLOSE:
            decisions = self.plan(share)
            key = frozenset(self.splits(decisions).items())
            if not key:  # the plan is the dense model
                made, value, holds = None, None, True
            elif key in seen:
                made, value, holds = seen[key]
            else:
                fitted = self.fit(decisions)
                value, holds = self.judge(fitted)
                self.trials.append(PlanTrial(share=share, value=value, holds=holds))
                made = fitted
                seen = {k: (m if m is best else None, v, h) for k, (m, v, h) in seen.items()}
                seen[key] = (made, value, holds)
            if key:
                excesses[share] = self.excess(value)
            if holds:
                high, best = share, made if made is not None else best
            else:
                low = share
            is_slow, width = high - low > SLOW * width, high - low
            share = self._next(low, high, excesses, is_slow=is_slow)
        return best

    def _next(self, low: float, high: float, excesses: Mapping[float, float], *, is_slow: bool) -> float:
        """Return the share to try next, between `low`, which misses the limit, and `high`, which keeps it.

        The excess is taken as linear in the logarithm of the foreseen loss, through the nearest points.

        Args:
            low: largest share that misses the limit.
            high: smallest share that keeps it.
            excesses: excess at the shares that were tried.
            is_slow: whether the last point hardly narrowed the search, so that the middle is better.
        """
        found, half = (low + high) / 2, CLOSE / 2
        if excesses and not is_slow:
            nearest = sorted(excesses, key=lambda share: abs(excesses[share]))
            first, *others = (low, high) if {low, high} <= excesses.keys() else nearest[:2]
            slope, loss = 1.0, self._foreseen_at(first)
            if others and (run := math.log(loss / self._foreseen_at(others[0]))):
                slope = min(max((excesses[first] - excesses[others[0]]) / run, 0.3), 4.0)
            found = self._foreseeing(loss * math.exp(-excesses[first] / slope), low, high)
            # Beside a point that was tried, a step over the limit closes the search.
            if found - low < CLOSE and low in excesses:
                found += half
            elif high - found < CLOSE and high in excesses:
                found -= half
        near = min(0.9 * CLOSE, (high - low) / 2)
        return min(max(found, low + near), high - near)

    def _foreseen_at(self, share: float) -> float:
        return max(self.foreseen(self.plan(share)), 1e-12)

    def _foreseeing(self, aim: float, low: float, high: float) -> float:
        """Return the smallest share between two others whose plan foresees at most the loss `aim`."""
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if self.foreseen(self.plan(middle)) > aim else (low, middle)
        return high


def changes_of(decisions: Decisions) -> dict[str, Any]:
    """Return site name -> (form, rank, bits, rank of a repair) of every site that decisions change."""
    changed = {name: d for name, d in decisions.items() if d.rank is not None or d.bits < 32}
    return {name: (d.form, d.rank, d.bits, d.repair) for name, d in changed.items()}


def searched_model(request: RankRequest, planner: CalibratedPlanner) -> tuple[Planned, PlanRecord]:
    """Return the smallest or fastest model that keeps the limit of a request, and what was tried.

    Where no model keeps `quality`, the dense one is returned.

    Raises:
        ModelError: no rank of any site saves anything.
        GateError: no model keeps `max_drop`, or the dense model does not keep a largest perplexity.
    """
    quality, candidates = request.quality, planner.candidates
    limit = f"--max-drop {request.max_drop:g}" if quality is None else str(quality)
    if quality is not None and quality.measure == "perplexity":
        _refuse_dense(quality, candidates.dense_outputs.perplexity)
    smallest = planner.smallest(fastest=request.fastest)
    if smallest >= 1:
        raise ModelError(f"{limit.split()[0]}: no rank of any site saves anything; let more sites be split (--include)")
    search = SizeSearch(
        plan=planner.in_time if request.fastest else planner.in_size,
        foreseen=lambda decisions: foreseen_loss(decisions, planner.options),
        splits=changes_of,
        fit=planner.fit,
        judge=partial(_drop if quality is None else _quality, request, candidates),
        excess=partial(_excess_drop, request) if quality is None else quality.excess,
        smallest=max(smallest, 0.0),
        aim=DROP_AIM if quality is None else quality.foreseen,
    )
    best = search.run()
    if best is None and quality is None:
        least = min(trial.value for trial in search.trials if trial.value is not None)
        raise GateError(
            f"{limit}: no compressed model keeps it; the least drop seen is {least:.2f} points; allow more, or "
            f"give more calibration data"
        )
    if best is not None and quality is not None and not request.fastest:
        with candidates.written(best) as (path, _):
            best = None if file_bytes(path) > candidates.dense.size.bytes else best
    record = PlanRecord(
        limit=limit,
        is_default=request.is_default,
        is_fastest=request.fastest,
        unit="time" if request.fastest else "bytes" if planner.unit == "bytes" else "parameters",
        trials=tuple(search.trials),
        delivers_dense=best is None,
    )
    if best is None:
        return planner.dense(f"no split keeps {limit}"), record
    assert isinstance(best.planner, FixedPlanner)
    foreseen = foreseen_loss(dict(best.planner.decisions), planner.options)
    shown = None if quality is None else loss_shown(candidates.quality(best))
    return best, record.model_copy(update={"foreseen": foreseen, "shown": shown})


def _refuse_dense(quality: QualityBudget, perplexity: float) -> None:
    """Refuse a largest perplexity that the dense model does not keep."""
    if perplexity > quality.limit:
        raise GateError(
            f"{quality}: the dense model has a perplexity of {perplexity:.4g} on the check part",
            hint="type a larger one, or a rise over it: --max-perplexity +5%",
        )


def _quality(request: RankRequest, candidates: Candidates, made: Planned) -> tuple[float | None, bool]:
    """Return the one-sided limit of the quality on the check part, and whether it keeps the request's."""
    budget, found = request.quality, candidates.quality(made)
    assert budget is not None
    limit = None if found is None else budget.limit_of(found)
    return limit, budget.holds(limit)


def _drop(request: RankRequest, candidates: Candidates, made: Planned) -> tuple[float | None, bool]:
    """Return the drop of top-1 in points, and whether the request allows it."""
    dense, provider = candidates.dense, candidates.provider
    assert request.max_drop is not None
    assert dense.dataset is not None
    assert dense.accuracy is not None
    assert dense.accuracy.top1 is not None
    steps = dense.preprocessing if dense.dataset.kind == "images" else None
    with candidates.written(made) as (path, _):
        found = evaluate(path, dense.dataset, preprocessing=steps, provider=provider, progress=at_samples)
    drop = dense.accuracy.top1 - (found.top1 or 0.0)
    return drop, drop <= request.max_drop


def _excess_drop(request: RankRequest, drop: float | None) -> float:
    """Return the logarithm of a drop over the largest allowed one."""
    return math.log(max(drop or 0.0, 0.01) / max(request.max_drop or 0.0, 0.01))
