"""The keywords of `sweep`, made from the fields of `SweepConfig` by `python -m tests.release.keywords`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy.typing as npt

from rsi_deploy.data.sources import Dataset


class SweepKeywords(TypedDict, total=False):
    """See `rsi_deploy.core.settings.verbs.SweepConfig`."""

    checkpoint: str | Path | None
    weights: str
    input_shape: str | Sequence[str] | Sequence[int]
    precision: Literal["float32", "float16", "int8", "int4", "auto"] | None
    target: Literal["cpu", "cuda", "tensorrt", "openvino", "qnn"] | None
    calib: str | Path
    calib_size: int
    check_size: int | None
    calib_check: str | Path | None
    column: str | None
    sequence_length: int | None
    calib_tokens: int
    data: str | Path | Dataset | None
    feeds: str | Path | Mapping[str, npt.NDArray[Any]] | None
    mean: str | Sequence[float] | None
    std: str | Sequence[float] | None
    resize: str | int | tuple[int, int] | None
    crop: str | int | tuple[int, int] | None
    layout: Literal["NCHW", "NHWC"] | None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None
    scale: float | None
    input_dtype: Literal["float32", "float16", "float64"] | None
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    seed: int
    cost_budget: str | float
    allow_slower: bool
    provider: str
    threads: int | None
    measure: bool
    bench_batch: int
    bench_seconds: float
    allow_larger: bool
    by: Literal["macs", "params", "latency", "size"]
    points: int
    highest: str | float
    lowest: str | float
    ray: str | None
