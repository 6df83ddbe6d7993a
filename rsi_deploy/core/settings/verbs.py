"""The settings of each verb, put together from groups."""

from rsi_deploy.core.settings.groups import (
    BundleConfig,
    CalibrationConfig,
    CostConfig,
    DataConfig,
    MeasureConfig,
    OnnxSourceConfig,
    PictureConfig,
    RankConfig,
    SiteConfig,
    SolverConfig,
    SourceConfig,
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
