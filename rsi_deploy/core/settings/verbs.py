"""The settings of each verb, put together from groups."""

from typing import Literal

from rsi_deploy.core.settings.base import DataSource, Seconds, Settings, Share, setting
from rsi_deploy.core.settings.groups import (
    DATA_HELP,
    FIRST,
    BundleConfig,
    CalibrationConfig,
    CostConfig,
    DataConfig,
    GrowthConfig,
    MeasureConfig,
    OnnxSourceConfig,
    PictureConfig,
    RankConfig,
    SamplesConfig,
    SeedConfig,
    SiteConfig,
    SolverConfig,
    SourceConfig,
    SpeedConfig,
    SplitConfig,
)


class ExportConfig(
    SourceConfig,
    OnnxSourceConfig,
    RankConfig,
    CalibrationConfig,
    DataConfig,
    PictureConfig,
    SiteConfig,
    SplitConfig,
    SolverConfig,
    CostConfig,
    MeasureConfig,
    BundleConfig,
):
    """The settings of `export`."""


class SweepConfig(
    SourceConfig,
    SamplesConfig,
    DataConfig,
    PictureConfig,
    SiteConfig,
    SeedConfig,
    SpeedConfig,
    MeasureConfig,
    GrowthConfig,
    panel="Points",
):
    """The settings of `sweep`."""

    calib: DataSource = setting(
        ..., f"Unlabelled calibration data. {DATA_HELP}", option=FIRST | {"keyword": "str | Path"}
    )
    calib_size: int = setting(512, "Most calibration samples.", ge=1)
    by: Literal["macs", "params", "latency"] = setting("macs", "What the shares are of.", option=FIRST)
    points: int = setting(12, "Number of models.", option=FIRST, ge=2)
    highest: Share = setting(0.95, "Share of the first model.", option=FIRST)
    lowest: Share = setting(0.3, "Share of the last model.", option=FIRST)
    cost_budget: Seconds = setting(120.0, "Time for the cost table.")
    bench_seconds: float = setting(4.0, "Time for the measurement of a point, in seconds.", gt=0)
    ray: str | None = setting(
        None,
        "Make the points on a Ray cluster's workers; measured ones each on a machine of its own. [extra: ray]",
        option={"metavar": "ADDRESS|local"},
    )


CONFIGS: dict[str, type[Settings]] = {
    "export": ExportConfig,
    "sweep": SweepConfig,
}
"""Verb -> its settings."""
