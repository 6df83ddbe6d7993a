"""The keywords of `export`, made from the fields of `ExportConfig` by `python -m tests.release.keywords`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy.typing as npt

from rsi_deploy.data.sources import Dataset
from rsi_deploy.planning.planner import MaxError, RankSpec


class ExportKeywords(TypedDict, total=False):
    """See `rsi_deploy.core.settings.verbs.ExportConfig`."""

    checkpoint: str | Path | None
    weights: str
    input_shape: str | Sequence[str] | Sequence[int]
    assume_constant: bool
    requantize: bool
    rank: str | int | RankSpec | None
    keep_macs: str | float | None
    keep_params: str | float | None
    max_size: str | int | None
    keep_latency: str | float | None
    max_latency: str | None
    max_perplexity: str | float | None
    min_agreement: str | float | None
    min_cosine: str | float | None
    max_output_error: str | float | None
    fastest: bool
    max_drop: float | None
    max_error: str | MaxError | None
    plan: str | Path | None
    min_rank: int
    rank_multiple: int
    precision: Literal["float32", "float16", "int8", "int4", "auto"] | None
    target: Literal["cpu", "cuda", "tensorrt", "openvino", "qnn"] | None
    calib: str | Path | Dataset | Mapping[str, npt.NDArray[Any]] | None
    calib_size: int
    check_size: int | None
    calib_check: str | Path | Dataset | Mapping[str, npt.NDArray[Any]] | None
    factors: Literal["response", "weights"]
    allow_shared_data: bool
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
    joint: bool
    always_split: bool
    seed: int
    method: Literal["rsi", "rsvd", "svd"]
    power_iterations: int | Literal["auto"]
    oversampling: int
    route: Literal["auto", "direct", "chebyshev", "gram", "krylov", "exact"]
    mixed_precision: bool
    device: Literal["auto", "cpu", "cuda"]
    ray: str | None
    cost_budget: str | float
    allow_slower: bool
    cost: str | Path | None
    allow_cost_mismatch: bool
    provider: str
    threads: int | None
    measure: bool
    bench_batch: int
    bench_seconds: float
    allow_larger: bool
    opset: int | None
    allow_broken: bool
    keep_dense: bool
