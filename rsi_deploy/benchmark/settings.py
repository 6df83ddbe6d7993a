"""The settings of `bench`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.base import (
    Counts,
    DataSource,
    FileName,
    Milliseconds,
    Percent,
    Seconds,
    Settings,
    Size,
    Texts,
    setting,
)
from rsi_deploy.core.settings.groups import DATA_HELP, PictureConfig, TextConfig

FIRST: dict[str, Any] = {"first": True}
Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]
PROMPT, GENERATE = 128, 64
"""Default numbers of tokens of a prompt, and after it."""
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)


class MatrixConfig(Settings, panel="Configurations"):
    """The matrix of configurations: batches x shapes x threads x types."""

    batch: Counts = setting((1,), "Samples of a call.", option=FIRST)
    threads: Counts | None = setting(
        None, "onnxruntime threads. (default: onnxruntime's choice)", option=FIRST | {"metavar": "1,2"}
    )
    input_shape: Texts = setting(
        (),
        "Shapes of one input (N for the batch); repeatable.",
        option={"metavar": "NAME=1x128[,1x256]"},
    )
    dtype: str = setting(
        "stored", "The files as they are, and converted to float16.", option={"metavar": "stored,float16"}
    )
    provider: str = setting(
        "cpu",
        "onnxruntime provider with options: cpu:spinning=off, cuda:use_tf32=0, ...",
        option=FIRST | {"metavar": "NAME[:key=value,...]"},
    )
    allow_fallback: bool = setting(False, "Measure also where another provider than --provider runs the model.")
    pin: str | None = setting(None, "Run on these cores only, workers too.", option={"metavar": "0,1"})
    feeds: FileName | None = setting(
        None, "An .npz with one array per input, in place of random inputs.", option={"metavar": "FILE.npz"}
    )
    seed: int = setting(0, "Random seed for inputs and the order of turns.", ge=0)


class TimeConfig(Settings, panel="Time"):
    """Settings of the duration of a measurement."""

    seconds: float = setting(
        10.0, "Most seconds for each configuration and each further measurement.", option=FIRST, gt=0
    )
    budget: Seconds | None = setting(None, "Time in all, spent where the intervals are widest.", option=FIRST)
    precision: Percent = setting(2.0, "Half width at which an interval is narrow enough.")


class GenerationConfig(Settings, panel="Generation"):
    """Settings of models that generate text."""

    prompt: int | None = setting(
        None,
        "Time folders of onnxruntime-genai that generate text: tokens of the prompt, random ones or those of --data "
        f"text. First token, prefill, decode, memory. [extra: genai] (default with --generate: {PROMPT})",
        option=FIRST,
        ge=1,
    )
    generate: int | None = setting(
        None, f"Tokens to generate after the prompt. (default with --prompt: {GENERATE})", option=FIRST, ge=2
    )


class AccuracyConfig(Settings, panel="Accuracy"):
    """Evaluation data."""

    data: DataSource = setting(
        None, f"Evaluation data: adds accuracy, and gives the timed inputs. {DATA_HELP}", option=FIRST
    )


class RivalsConfig(Settings, panel="Rivals"):
    """Settings of onnxruntime's own quantization."""

    rivals: bool = setting(
        False,
        "Also measure the first model in onnxruntime's own int8 and int4, on CUDA float16 too.",
        option=FIRST,
    )
    calib: DataSource = setting(None, f"--rivals: unlabelled data for the ranges of static int8. {DATA_HELP}")


class FurtherConfig(Settings, panel="Further measurements"):
    """Measurements beside the latency of a call, each in the first configuration."""

    cold_start: bool = setting(False, "Process start, import, load, first inference.")
    memory: bool = setting(False, "Resident memory, in a process of its own.")
    memory_limit: Size | None = setting(None, "Ceiling on resident memory: does each model fit?")
    bursts: Seconds | None = setting(None, "Bursts of calls after idle gaps of this length.")
    streams: Counts | None = setting(
        None, "Threads that share one session: throughput and latency.", option={"metavar": "1,2,4"}
    )
    throughput: bool = setting(False, "Samples a second at growing batches.")
    profile: bool = setting(False, "Time per op type and per split site.", option=FIRST)


def _scenarios(typed: str | Sequence[str]) -> tuple[Scenario, ...]:
    """Return LoadGen's own spelling of its scenarios."""
    names = [typed] if isinstance(typed, str) else typed
    known: dict[str, Scenario] = {name.lower(): name for name in SCENARIOS}
    if unknown := [name for name in names if name.lower() not in known]:
        raise UsageError(f"--loadgen takes {', '.join(SCENARIOS)}, but got {unknown[0]!r}")
    return tuple(known[name.lower()] for name in names)


class LoadgenConfig(Settings, panel="MLPerf LoadGen"):
    """LoadGen's tests beside the tool's own loop."""

    loadgen: Annotated[tuple[Scenario, ...], BeforeValidator(_scenarios)] = setting(
        (),
        "Also test every model with MLPerf LoadGen; repeatable. [extra: loadgen]",
        option={"metavar": "SingleStream|MultiStream|Server|Offline"},
    )
    target_qps: float | None = setting(
        None, "Server: queries a second. (default: half of what back-to-back calls reach)", gt=0
    )
    target_latency: Milliseconds | None = setting(
        None, "Server: 99 % of the queries within it. (default: ten calls' time, 10 ms or more)", gt=0
    )


class GateConfig(Settings, panel="Gates"):
    """Settings of the comparison with an earlier measurement; a gate that fails ends with exit 4."""

    baseline: FileName | None = setting(
        None, "A stored --json result for the gates. (default: the first model)", option=FIRST
    )
    max_slowdown: Percent | None = setting(None, "Gate: a slowdown that is shown to be larger.", option=FIRST)
    max_drop: float | None = setting(None, "Gate: top-1 lost on --data.", option=FIRST | {"metavar": "POINTS"}, ge=0)


class BenchConfig(
    MatrixConfig,
    TimeConfig,
    GenerationConfig,
    AccuracyConfig,
    TextConfig,
    PictureConfig,
    RivalsConfig,
    FurtherConfig,
    LoadgenConfig,
    GateConfig,
):
    """The settings of `bench`."""
