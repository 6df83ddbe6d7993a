"""Find the smallest or fastest model that keeps a limit, by bisection on its share of the dense model.

    1.00  the dense model keeps every limit
    0.74  keeps it: the answer
    0.73  does not keep it
    0.31  the smallest that any plan comes to

Every point is planned, fitted and judged as it would be delivered. The losses that the planner foresees give the first
point. They are no measure of the answer: they add up what sites do alone.
"""

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
from rsi_deploy.planning.record import PlanRecord, PlanTrial
from rsi_deploy.planning.request import RankRequest

STEPS = 8
"""Most models that are fitted."""
CLOSE = 0.006
"""Difference of the shares of the answer and of the next smaller point at which the search ends."""
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
        smallest: share of the smallest plan.
        aim: foreseen loss of the first point.
        trials: models that were fitted and judged, in order.
    """

    plan: Callable[[float], Decisions]
    foreseen: Callable[[Decisions], float]
    splits: Callable[[Decisions], Mapping[str, Any]]
    fit: Callable[[Decisions], Planned]
    judge: Callable[[Planned], tuple[float | None, bool]]
    smallest: float
    aim: float
    trials: list[PlanTrial] = field(default_factory=list)

    def run(self) -> Planned | None:
        """Return the model of the smallest share that keeps the limit; None if none does that was tried."""
        low, high, best = self.smallest, 1.0, None
        seen: dict[frozenset[Any], tuple[Planned | None, bool]] = {}
        share = self._first(low)
        while len(self.trials) < STEPS and high - low > CLOSE:
            decisions = self.plan(share)
            key = frozenset(self.splits(decisions).items())
            if not key:  # the plan is the dense model
                made, holds = None, True
            elif key in seen:
                made, holds = seen[key]
            else:
                fitted = self.fit(decisions)
                value, holds = self.judge(fitted)
                self.trials.append(PlanTrial(share=share, value=value, holds=holds))
                made = fitted
                seen = {k: (m if m is best else None, h) for k, (m, h) in seen.items()} | {key: (made, holds)}
            if holds:
                high, best = share, made if made is not None else best
            else:
                low = share
            share = (low + high) / 2
        return best

    def _first(self, low: float) -> float:
        """Return the smallest share whose plan foresees the loss `aim`, within the middle of what is possible."""
        least, most = low, 1.0
        for _ in range(6):
            middle = (least + most) / 2
            least, most = (middle, most) if self.foreseen(self.plan(middle)) > self.aim else (least, middle)
        edge = (1 - low) / 4
        return min(max(most, low + edge), 1 - edge)


def changes_of(decisions: Decisions) -> dict[str, Any]:
    """Return site name -> (form, rank, bits, rank of a repair) of every site that decisions change."""
    changed = {name: d for name, d in decisions.items() if d.rank is not None or d.bits < 32}
    return {name: (d.form, d.rank, d.bits, d.repair) for name, d in changed.items()}


def searched_model(request: RankRequest, planner: CalibratedPlanner) -> tuple[Planned, PlanRecord]:
    """Return the smallest or fastest model that keeps the limit of a request, and what was tried.

    Where no model keeps `quality`, the dense one is returned.

    Raises:
        ModelError: no rank of any site saves anything.
        GateError: no model keeps `max_drop`.
    """
    quality, candidates = request.quality, planner.candidates
    limit = f"--max-drop {request.max_drop:g}" if quality is None else str(quality)
    smallest = planner.smallest(fastest=request.fastest)
    if smallest >= 1:
        raise ModelError(f"{limit.split()[0]}: no rank of any site saves anything; let more sites be split (--include)")
    search = SizeSearch(
        plan=planner.in_time if request.fastest else planner.in_size,
        foreseen=lambda decisions: foreseen_loss(decisions, planner.options),
        splits=changes_of,
        fit=planner.fit,
        judge=partial(_drop if quality is None else _quality, request, candidates),
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
