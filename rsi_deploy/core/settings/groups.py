"""Groups of settings that verbs share. Each group is a panel of `--help`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from rsi_deploy.core.settings.base import (
    DataSource,
    FileName,
    Latency,
    Numbers,
    OutputError,
    Perplexity,
    Pixels,
    Seconds,
    Settings,
    Shapes,
    Share,
    Size,
    Text,
    Texts,
    setting,
)

FIRST: dict[str, Any] = {"first": True}
DATA_KEYWORD = "str | Path | Dataset | None"
ARRAYS = "Mapping[str, npt.NDArray[Any]]"
DATA_HELP = (
    "An .npz, .parquet or .arrow file, a folder of class folders or of a saved Hugging Face data set, text (.txt, "
    ".jsonl, .parquet) for a MODEL with a tokenizer, or package.module:function (its code runs)."
)
PERCENT_POINTS: dict[str, Any] = {"ge": 0, "le": 100}


class SourceConfig(Settings, panel="Model"):
    """Settings of loading MODEL."""

    checkpoint: FileName | None = setting(None, "State dict for a factory: .safetensors or torch.save.", option=FIRST)
    weights: str = setting(
        "DEFAULT", "torchvision: DEFAULT (download), none (random) or a file.", option={"metavar": "DEFAULT|none|FILE"}
    )
    input_shape: Shapes = setting(
        (),
        "Shape of the input where the model does not fix it; batch first. NAME=1x128 for an ONNX file, repeatable.",
        option=FIRST | {"metavar": "[NAME=]1x3x32x32"},
    )


class OnnxSourceConfig(Settings, panel="Model"):
    """Settings of reading an ONNX file."""

    assume_constant: bool = setting(False, "ONNX: weights that are also graph inputs are constants.")


class RequantizeConfig(Settings, panel="Model"):
    """The setting for an ONNX file that is quantized already."""

    requantize: bool = setting(
        False,
        "ONNX: the file is quantized already. Turn its weights back into float first, and decide about them as about "
        "any; it is compared with the file as it is.",
    )


class RankConfig(Settings, panel="Size"):
    """The setting that decides the ranks: one of those in `exclusive`, or `max_output_error`.

    With calibration data and none of them, the quality of the outputs decides.
    """

    exclusive = (
        "rank",
        "max_error",
        "keep_params",
        "keep_macs",
        "max_size",
        "keep_latency",
        "max_latency",
        "max_drop",
        "max_perplexity",
        "min_agreement",
        "min_cosine",
        "plan",
    )

    rank: Text | None = setting(
        None,
        "A rank (64), or a ratio of full rank (40%: ceil(0.4 * min(out, in))).",
        option=FIRST | {"metavar": "64|40%", "keyword": "str | int | RankSpec | None"},
    )
    keep_macs: Share | None = setting(None, "Budget: share of the whole model's MACs.", option=FIRST)
    keep_params: Share | None = setting(None, "Budget: share of the whole model's parameters.", option=FIRST)
    max_size: Size | None = setting(None, "Budget: bytes of model.onnx.", option=FIRST | {"metavar": "20MB"})
    keep_latency: Share | None = setting(
        None, "Budget: share of the dense model's time for a call.", option=FIRST | {"metavar": "0.6|60%"}
    )
    max_latency: Latency | None = setting(None, "Budget: time of a call, measured.", option=FIRST)
    max_perplexity: Perplexity | None = setting(
        None,
        "Decoders: the smallest model whose perplexity rises by at most this share, or is at most this, for sure.",
        option=FIRST,
    )
    min_agreement: Share | None = setting(
        None,
        "The smallest model that gives this share of the dense model's answers, for sure; class scores, or next tokens "
        "of decoders; no labels.",
        option=FIRST | {"metavar": "98%"},
    )
    min_cosine: Share | None = setting(
        None,
        "The smallest model whose embeddings have this mean cosine to the dense model's, for sure; no labels.",
        option=FIRST | {"metavar": "0.98"},
    )
    max_output_error: OutputError | None = setting(
        None,
        "Largest error of the outputs: the smallest model that keeps it; with another size, a gate (exit 4). With "
        "--calib: squared error over variance, on the check part. Without: relative L2 error on probe inputs.",
        option=FIRST | {"metavar": "3%"},
        ge=0,
    )
    fastest: bool = setting(
        False, "Under a limit on the quality or accuracy: the fastest model, not the smallest.", option=FIRST
    )
    max_drop: float | None = setting(
        None,
        "The smallest model that loses at most this many points of top-1 on --data.",
        option=FIRST | {"metavar": "POINTS"},
        **PERCENT_POINTS,
    )
    max_error: Text | None = setting(
        None,
        "Smallest rank of each weight with at most this error: of its norm, or times the best error of that rank.",
        option={"metavar": "5%|1.1x", "keyword": "str | MaxError | None"},
    )
    plan: FileName | None = setting(None, "A plan.json of a bundle, perhaps edited: form and rank of each site.")
    min_rank: int = setting(1, "Under a budget: smallest rank.", ge=1)
    rank_multiple: int = setting(1, "Under a budget: ranks are multiples of this number.", ge=1)


class PrecisionConfig(Settings, panel="Size"):
    """The setting for numbers of fewer bits."""

    precision: Literal["float32", "float16", "int8", "int4", "auto"] | None = setting(
        None,
        "Bits of weights and products. auto: rank and precision in one plan, compared with onnxruntime's own int8 and "
        "int4. (default: auto where a quality, a size in bytes or a time is planned on --calib; else float32)",
        option=FIRST,
    )


class TargetConfig(Settings, panel="Size"):
    """The setting for the provider that will run the model."""

    target: Literal["cpu", "cuda", "tensorrt", "openvino", "qnn"] | None = setting(
        None,
        "onnxruntime provider that will run the model: plan what it runs, and refuse operators that it does not run. "
        "(default: any)",
    )


class SamplesConfig(Settings, panel="Calibration"):
    """The unlabelled data that factors are fitted to and checked on."""

    calib: DataSource = setting(
        None,
        f"Unlabelled calibration data. {DATA_HELP}",
        option=FIRST | {"keyword": f"str | Path | Dataset | {ARRAYS} | None"},
    )
    calib_size: int = setting(1024, "Most samples that factors are fitted to.", ge=1)
    check_size: int | None = setting(
        None,
        "Samples that fit nothing and on which the outputs are compared. (default: a fifth, at least 64)",
        ge=1,
    )
    calib_check: DataSource = setting(
        None,
        "Other unlabelled data to compare the outputs on; all of --calib is then fitted to.",
        option={"keyword": f"str | Path | Dataset | {ARRAYS} | None"},
    )


class TextConfig(Settings, panel="Text"):
    """Settings of data that are text."""

    column: str | None = setting(
        None, "Field or column with the text, of .jsonl and .parquet. (default: text)", option={"metavar": "NAME"}
    )
    sequence_length: int | None = setting(
        None,
        "Most tokens of a text, or tokens of a window of a decoder. (default: the model's own; at most 128 for "
        "encoders, 1024 for decoders)",
        ge=2,
    )


class TextSamplesConfig(TextConfig, panel="Text"):
    """Settings of calibration data that are text."""

    calib_tokens: int = setting(131_072, "Text: most tokens that factors are fitted to.", ge=1)


class CalibrationConfig(SamplesConfig, panel="Calibration"):
    """Settings of the use of calibration data."""

    factors: Literal["response", "weights"] = setting(
        "response", "With --calib: fit the factors to the data, or use the paper's plain method."
    )
    allow_shared_data: bool = setting(False, "Let calibration and evaluation data share samples.")


class DataConfig(Settings, panel="Evaluation"):
    """Labelled data, which choose nothing, and inputs to run the model on."""

    data: DataSource = setting(
        None, "Labelled evaluation data; takes what --calib takes.", option=FIRST | {"keyword": DATA_KEYWORD}
    )
    feeds: DataSource = setting(
        None,
        "An .npz with one array per input, to verify and measure with in place of random inputs.",
        option={"metavar": "FILE.npz", "keyword": f"str | Path | {ARRAYS} | None"},
    )


class PictureConfig(Settings, panel="Pictures"):
    """Steps from 8-bit pictures to inputs. What is not set comes from the model."""

    mean: Numbers | None = setting(None, "Value per channel, subtracted from pixels in 0..1.")
    std: Numbers | None = setting(None, "Divisor per channel, after the mean.", option={"metavar": "S,S,S"})
    resize: Pixels = setting(None, "Shorter side, or height x width, in pixels; none turns off the model's own resize.")
    crop: Pixels = setting(
        None, "Centre crop in pixels; none turns off the model's own crop.", option={"metavar": "HxW|none"}
    )
    layout: Literal["NCHW", "NHWC"] | None = setting(None, "Axes of the input.")
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = setting(None, "Filter of the resize.")
    scale: float | None = setting(None, "Factor on 8-bit values. (default: 1/255)")
    input_dtype: Literal["float32", "float16", "float64"] | None = setting(None, "Type of the inputs.")


class SiteConfig(Settings, panel="Sites"):
    """Filters of the sites that may be split."""

    include: Texts = setting((), "Only these sites; repeatable.", option={"metavar": "GLOB"})
    exclude: Texts = setting((), "Sites that stay dense; repeatable.", option={"metavar": "GLOB"})


class JointConfig(Settings, panel="Sites"):
    """The setting for sites that share factors."""

    joint: bool = setting(
        True,
        "Let weights of the same input (q, k, v) share one right factor.",
        option={"off": "Let no weights of the same input (q, k, v) share a right factor."},
    )


class SplitConfig(JointConfig, panel="Sites"):
    """Settings of the split."""

    always_split: bool = setting(False, "Split also where nothing is saved, and never jointly (teaching, tests).")


class SeedConfig(Settings, panel="Kernel"):
    """The random seed, which makes a run repeatable."""

    seed: int = setting(0, "Random seed for sketches, probe inputs and random weights.", ge=0)


class SolverConfig(SeedConfig, panel="Kernel"):
    """Settings of the solver: how the factors of a weight are computed, and where."""

    method: Literal["rsi", "rsvd", "svd"] = setting("rsi", "The paper's RSI, or a baseline.")
    power_iterations: Annotated[int, Field(ge=1)] | Literal["auto"] = setting(
        4, "The paper's q; auto: until another pass would gain less than 1 %.", option={"short": "-q"}
    )
    oversampling: int = setting(0, "Extra sketch columns.", ge=0)
    route: Literal["auto", "direct", "chebyshev", "gram", "krylov", "exact"] = setting(
        "auto", "Route of the kernel; auto: the cheapest by a model measured on this machine."
    )
    mixed_precision: bool = setting(
        True,
        "Iterate in bfloat16 where that is faster and does no harm.",
        option={"off": "Never iterate in bfloat16."},
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where factors are computed.")
    ray: str | None = setting(
        None,
        "Factorize on the CPUs of a Ray cluster's workers, with the same bytes. [extra: ray]",
        option={"metavar": "ADDRESS|local"},
    )


class SpeedConfig(Settings, panel="Latency"):
    """Settings of the rule that splits must be measured faster."""

    cost_budget: Seconds = setting(240.0, "Time for a cost table that is measured.")
    allow_slower: bool = setting(
        False, "Split also where that is not measured faster; deliver the model however fast it is."
    )


class CostConfig(SpeedConfig, panel="Latency"):
    """Measured times that the planner uses."""

    cost: FileName | None = setting(
        None, "Plan with this cost table (rsi-deploy profile). Without it, one is measured where a budget needs it."
    )
    allow_cost_mismatch: bool = setting(
        False, "Accept a --cost of another machine: plan for that machine and measure nothing."
    )


class RuntimeConfig(Settings, panel="Measuring"):
    """Settings of onnxruntime."""

    provider: str = setting(
        "cpu",
        "onnxruntime provider with options: cpu:threads=2,spinning=off, cuda:use_tf32=0, ...",
        option={"metavar": "NAME[:key=value,...]"},
    )
    threads: int | None = setting(None, "onnxruntime threads. (default: onnxruntime's choice)", ge=1)


class MeasureConfig(RuntimeConfig, panel="Measuring"):
    """Settings of the latency measurement."""

    measure: bool = setting(
        True, "Measure latency.", option=FIRST | {"flag": "--bench", "off": "Do not measure latency."}
    )
    bench_batch: int = setting(1, "Samples of a call.", ge=1)
    bench_seconds: float = setting(10.0, "Time for the measurement, in seconds.", gt=0)


class GrowthConfig(Settings, panel="Bundle"):
    """The setting for a model that is larger than the dense one."""

    allow_larger: bool = setting(False, "Deliver the model even where it is larger than the dense one.")


class BundleConfig(GrowthConfig, panel="Bundle"):
    """Settings of the bundle: its content, and when it is refused."""

    opset: int | None = setting(
        None, "Opset of the ONNX model. (default: an ONNX file's own; 23 with attention, else 20)"
    )
    allow_broken: bool = setting(
        False, "Deliver the model even where it no longer answers as the dense one does under a budget."
    )
    keep_dense: bool = setting(False, "Keep dense.onnx in the bundle.")
