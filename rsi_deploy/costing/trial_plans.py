"""Plans measured as whole models, to hold the sum of a cost table against: what fusions and caches make of it.

    a plan --> a model with blank factors --> beside the dense one, interleaved --> share of its time
    scale = (1 - measured share) * dense time / sum of the sites' savings

The trial plans of a new table split every site that a split makes faster: once at the rank whose time is nearest to
half the dense one's, once to a quarter.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rsi_deploy.benchmark.latency import bench
from rsi_deploy.benchmark.result import ArmResult, BenchResult
from rsi_deploy.core.types import Feeds
from rsi_deploy.costing.cost_table import CostTable, ModelTime, PlanCheck, SiteCost
from rsi_deploy.costing.zero_filled import Splits, write_zero_filled

SHARES = (0.5, 0.25)
PRECISION = 0.02


def trial_plans(costs: Mapping[str, SiteCost]) -> list[dict[str, tuple[str, int]]]:
    """The trial plans that differ from each other and from the dense model."""
    plans: list[dict[str, tuple[str, int]]] = []
    for share in SHARES:
        plan = {}
        for name, cost in costs.items():
            faster = [split for split in cost.splits if cost.is_faster(split.form, split.rank)]
            if faster:
                best = min(faster, key=lambda split: abs(split.nanoseconds - share * cost.dense_nanoseconds))
                plan[name] = (best.form, best.rank)
        if plan and plan not in plans:
            plans.append(plan)
    return plans


def with_model_time(table: CostTable, dense: Path, feeds: Feeds, plans: Sequence[Splits], seconds: float) -> CostTable:
    """The table with the dense model's time, and its scale from these plans."""
    result = measured_plans(dense, feeds, plans, table.conditions.provider, table.conditions.threads, seconds)
    nanoseconds = round(1e6 * result.arms[0].median_ms)
    model = table.model.model_copy(update={"dense_nanoseconds": nanoseconds, "scale": 1.0})
    savings = [table.saving(plan) / nanoseconds for plan in plans]
    shares = [share_of(arm) for arm in result.arms[1:]]
    scale = fitted_scale(savings, [share for share, _ in shares])
    checks = tuple(
        PlanCheck(scale=1.0, predicted=1 - saving, measured=share, measured_interval=ends)
        for saving, (share, ends) in zip(savings, shares, strict=True)
    )
    model = model.model_copy(update={"scale": scale, "checks": checks})
    return table.model_copy(update={"model": ModelTime.model_validate(model.model_dump())})


def fitted_scale(savings: Sequence[float], shares: Sequence[float]) -> float:
    """The scale, by least squares over plans: `1 - share = scale * saving`; 1 without plans, never below 0.

    >>> round(fitted_scale([0.5, 0.25], [0.6, 0.8]), 6)
    0.8
    """
    squares = float(np.dot(savings, savings))
    if not squares:
        return 1.0
    return max(0.0, float(np.dot(savings, 1 - np.asarray(shares))) / squares)


def measured_plans(
    dense: Path, feeds: Feeds, plans: Sequence[Splits], provider: str, threads: int | None, seconds: float
) -> BenchResult:
    """The dense model and blank models of these plans side by side."""
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=dense.parent) as folder:
        models = [Path(folder) / f"trial{number}.onnx" for number in range(len(plans))]
        for path, plan in zip(models, plans, strict=True):
            write_zero_filled(dense, path, plan)
        labels = ["dense", *(path.stem for path in models)]
        return bench(
            [dense, *models],
            feeds=feeds,
            provider=provider,
            threads=threads,
            seconds=seconds,
            labels=labels,
            precision=PRECISION,
        )


def share_of(arm: ArmResult) -> tuple[float, tuple[float, float]]:
    """An arm's time as a share of the first arm's, with its interval."""
    assert arm.speedup is not None
    assert arm.speedup_interval is not None
    low, high = arm.speedup_interval
    return 1 / arm.speedup, (1 / high, 1 / low)
