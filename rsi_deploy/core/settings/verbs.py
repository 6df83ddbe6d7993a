"""The settings of each verb, put together from groups."""

from typing import Literal

from rsi_deploy.core.settings.base import DataSource, FileName, Seconds, Settings, Share, Text, setting
from rsi_deploy.core.settings.groups import (
    DATA_HELP,
    FIRST,
    BundleConfig,
    CalibrationConfig,
    CostConfig,
    DataConfig,
    GrowthConfig,
    JointConfig,
    MeasureConfig,
    OnnxSourceConfig,
    PictureConfig,
    PrecisionConfig,
    RankConfig,
    RequantizeConfig,
    RuntimeConfig,
    SamplesConfig,
    SeedConfig,
    SiteConfig,
    SolverConfig,
    SourceConfig,
    SpeedConfig,
    SplitConfig,
    TargetConfig,
    TextConfig,
    TextSamplesConfig,
)


class ExportConfig(
    SourceConfig,
    OnnxSourceConfig,
    RequantizeConfig,
    RankConfig,
    PrecisionConfig,
    TargetConfig,
    CalibrationConfig,
    TextSamplesConfig,
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
    PrecisionConfig,
    TargetConfig,
    SamplesConfig,
    TextSamplesConfig,
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
    calib_size: int = setting(512, "Most samples that factors are fitted to.", ge=1)
    calib_check: DataSource = setting(
        None,
        "Other unlabelled data to compare the outputs on; all of --calib is then fitted to.",
        option={"keyword": "str | Path | None"},
    )
    by: Literal["macs", "params", "latency", "size"] = setting(
        "macs", "What the shares are of; size: bytes of the file.", option=FIRST
    )
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


class ProfileConfig(SourceConfig, OnnxSourceConfig, PictureConfig, RuntimeConfig, panel="Measuring"):
    """The settings of `profile`."""

    batch: int = setting(1, "Samples of a call.", option=FIRST, ge=1)
    budget: Seconds = setting(240.0, "Time for the whole table.", option=FIRST)
    precision: float = setting(5.0, "Half width, in percent, at which an interval is narrow enough.", gt=0, lt=100)
    scheme: Literal["float32", "static-int8", "dynamic-int8"] = setting(
        "float32", "Precision of the timed models; onnxruntime's quantizers make int8 from the inputs of the timing."
    )
    feeds: FileName | None = setting(
        None,
        "An .npz with one array per input, to time with in place of random inputs; it sets the batch.",
        option={"metavar": "FILE.npz"},
    )
    fresh: bool = setting(False, "Measure also what the cache knows.")


class InspectConfig(
    SourceConfig,
    OnnxSourceConfig,
    SamplesConfig,
    TextSamplesConfig,
    PictureConfig,
    SiteConfig,
    JointConfig,
    SeedConfig,
    panel="Output",
):
    """The settings of `inspect`."""

    rank: Text = setting("25%", "Rank of the export that is described.", option=FIRST | {"metavar": "64|40%"})
    spectra: bool = setting(
        True, "Compute spectra.", option=FIRST | {"off": "Show shapes and decisions only, without spectra."}
    )
    spectrum_limit: int = setting(2048, "Largest min(out, in) of a weight whose spectrum is computed.", ge=1)


class EvalConfig(TextConfig, PictureConfig, panel="Evaluation"):
    """The settings of `eval`."""

    data: DataSource = setting(..., f"Evaluation data. {DATA_HELP}", option=FIRST)
    reference: FileName | None = setting(None, "Another ONNX model, whose answers are compared with.", option=FIRST)
    outputs: Literal["auto", "classes", "values"] = setting(
        "auto",
        "Class scores, or values (embeddings, regressions), which are compared with the reference.",
        option=FIRST,
    )
    limit: int | None = setting(None, "Most samples, evenly spaced.", option=FIRST, ge=1)
    batch: int = setting(64, "Samples of a call.", option=FIRST, ge=1)
    provider: str = setting("cpu", "onnxruntime provider: cpu, cuda, ...", option=FIRST)


class VerifyConfig(Settings, panel="Claims"):
    """The settings of `verify`."""

    data: DataSource = setting(None, "Evaluation data of the report: recomputes the accuracy.", option=FIRST)
    calib: DataSource = setting(
        None, "Calibration data of the report: recomputes the quality of the outputs on them.", option=FIRST
    )
    calib_check: DataSource = setting(None, "The --calib-check of the export, where it had any.", option=FIRST)
    feeds: FileName | None = setting(
        None, "The --feeds of the export: recomputes outputs, parity and MACs.", option=FIRST | {"metavar": "FILE.npz"}
    )
    provider: str = setting("cpu", "onnxruntime provider: cpu, cuda, ...", option=FIRST)


CONFIGS: dict[str, type[Settings]] = {
    "export": ExportConfig,
    "sweep": SweepConfig,
}
"""Verb -> its settings, for the verbs that have recipes."""
