"""Plans that are measured as whole models, to correct the sum of a cost table for fusions and caches.

    a plan --> a model with zero-filled factors --> interleaved with the dense model --> share of its time
    scale = (1 - measured share) * dense time / sum of the sites' savings

The two trial plans of a new table split every site that has a faster split, at the rank whose time is nearest to a half
or a quarter of the dense time.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from graph_passes.forms import FOLDED
from rsi_deploy.benchmark.latency import bench
from rsi_deploy.benchmark.result import BenchResult, VariantResult
from rsi_deploy.core.types import Feeds
from rsi_deploy.costing.cost_table import CostTable, ModelTime, PlanCheck, SiteCost
from rsi_deploy.costing.zero_filled import Splits, write_zero_filled

LowerFile = Callable[[Path, Path], object]

SHARES = (0.5, 0.25)
PRECISION = 0.02


def trial_plans(costs: Mapping[str, SiteCost]) -> list[dict[str, tuple[str, int]]]:
    """Return the trial plans, without duplicates and without the dense model.

    They have no folded forms: those would change the sites before them too.
    """
    plans: list[dict[str, tuple[str, int]]] = []
    for share in SHARES:
        plan = {}
        for name, cost in costs.items():
            faster = [s for s in cost.splits if s.form not in FOLDED and cost.is_faster(s.form, s.rank)]
            if faster:
                best = min(faster, key=lambda split: abs(split.nanoseconds - share * cost.dense_nanoseconds))
                plan[name] = (best.form, best.rank)
        if plan and plan not in plans:
            plans.append(plan)
    return plans


def with_model_time(
    table: CostTable, dense: Path, feeds: Feeds, plans: Sequence[Splits], seconds: float, lower: LowerFile | None = None
) -> CostTable:
    """Measure the dense model and these plans, and return the table with its time and scale."""
    conditions = table.conditions
    result = measured_plans(dense, feeds, plans, conditions.provider, conditions.threads, seconds, lower)
    nanoseconds = round(1e6 * result.arms[0].median_ms)
    model = table.model.model_copy(update={"dense_nanoseconds": nanoseconds, "scale": 1.0})
    savings = [table.saving(plan) / nanoseconds for plan in plans]
    shares = [share_of(variant) for variant in result.arms[1:]]
    scale = fitted_scale(savings, [share for share, _ in shares])
    checks = tuple(
        PlanCheck(scale=1.0, predicted=1 - saving, measured=share, measured_interval=ends)
        for saving, (share, ends) in zip(savings, shares, strict=True)
    )
    model = model.model_copy(update={"scale": scale, "checks": checks})
    return table.model_copy(update={"model": ModelTime.model_validate(model.model_dump())})


def fitted_scale(savings: Sequence[float], shares: Sequence[float]) -> float:
    """Fit the scale in `1 - share = scale * saving` by least squares over plans; 1 without plans, at least 0.

    >>> round(fitted_scale([0.5, 0.25], [0.6, 0.8]), 6)
    0.8
    """
    squares = float(np.dot(savings, savings))
    if not squares:
        return 1.0
    return max(0.0, float(np.dot(savings, 1 - np.asarray(shares))) / squares)


def measured_plans(
    dense: Path,
    feeds: Feeds,
    plans: Sequence[Splits],
    provider: str,
    threads: int | None,
    seconds: float,
    lower: LowerFile | None = None,
) -> BenchResult:
    """Measure the dense model and zero-filled models of these plans, interleaved.

    Args:
        dense: the dense model's file.
        feeds: inputs to measure with.
        plans: splits of each model.
        provider: execution provider.
        threads: threads inside one operator.
        seconds: most time of the measurement.
        lower: function that writes the model at a path in low precision to another path; None measures in float32.
    """
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=dense.parent) as folder:
        models = [Path(folder) / f"trial{number}.onnx" for number in range(len(plans))]
        for path, plan in zip(models, plans, strict=True):
            write_zero_filled(dense, path, plan)
        labels = ["dense", *(path.stem for path in models)]
        models = [dense, *models]
        if lower is not None:
            sources, models = models, [Path(folder) / f"low{number}.onnx" for number in range(len(models))]
            for source, target in zip(sources, models, strict=True):
                lower(source, target)
        return bench(
            models,
            feeds=feeds,
            provider=provider,
            threads=threads,
            seconds=seconds,
            labels=labels,
            precision=PRECISION,
        )


def share_of(variant: VariantResult) -> tuple[float, tuple[float, float]]:
    """Return the time of a variant as a share of the first variant's time, with its interval."""
    assert variant.speedup is not None
    assert variant.speedup_interval is not None
    low, high = variant.speedup_interval
    return 1 / variant.speedup, (1 / high, 1 / low)
