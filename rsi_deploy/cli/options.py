"""Options that verbs share, and what their texts mean."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from rsi_deploy.core.errors import UsageError

if TYPE_CHECKING:
    from rsi_deploy.data.preprocess import Preprocessing

    _CountOrWord = click.ParamType[int | str]
else:
    _CountOrWord = click.ParamType  # generic since click 8.4

F = TypeVar("F", bound=Callable[..., Any])

DATA_HELP = (
    "An .npz, .parquet or .arrow file, a folder of class folders or of a saved Hugging Face data set, or "
    "package.module:function (its code runs)."
)


EARLY_BYTES = 64 << 20
"""An ONNX file up to this size is looked at before anything large is imported: it is parsed twice for that."""


def _looked_at(context: click.Context, parameter: click.Parameter, model: str | None) -> str | None:
    """The model's name; a small ONNX file that claims what cannot be is refused before torch takes time and memory."""
    path = Path(model or "")
    if path.suffix == ".onnx" and path.is_file() and path.stat().st_size <= EARLY_BYTES:
        from rsi_deploy.io.onnx_reader import check_file

        check_file(path)
    return model


def model_argument(*, required: bool = True) -> Callable[[F], F]:
    """Declare the argument MODEL."""
    return click.argument("model", metavar="MODEL" if required else "[MODEL]", required=required, callback=_looked_at)


def source_options(function: F) -> F:
    """MODEL and the options that say how to load it."""
    for decorator in (
        click.option(
            "--input-shape",
            multiple=True,
            metavar="[NAME=]1x3x32x32",
            help="Where the model does not tell; batch first. By NAME for an ONNX file, repeatable.",
        ),
        click.option("--checkpoint", metavar="FILE", help="State dict for a factory: .safetensors or torch.save."),
        click.option(
            "--weights",
            default="DEFAULT",
            show_default=True,
            help="torchvision: DEFAULT (download), none (random) or a file.",
        ),
        click.argument("model", metavar="MODEL", callback=_looked_at),
    ):
        function = decorator(function)
    return function


def filter_options(function: F) -> F:
    """Which sites, and the seed."""
    for decorator in (
        click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of all that is random."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Sites that stay dense; repeatable."),
        click.option("--include", multiple=True, metavar="GLOB", help="Only these sites; repeatable."),
    ):
        function = decorator(function)
    return function


def ranks_options(function: F) -> F:
    """What decides the ranks, and the data that factors are fitted to."""
    for decorator in (
        click.option("--allow-shared-data", is_flag=True, help="Calibration samples may be evaluation samples too."),
        click.option(
            "--rank-multiple", default=1, type=click.IntRange(min=1), help="Under a budget: ranks are its multiples."
        ),
        click.option("--min-rank", default=1, type=click.IntRange(min=1), help="Under a budget: no rank below it."),
        click.option(
            "--factors",
            type=click.Choice(["response", "weights"]),
            default="response",
            show_default=True,
            help="With --calib: fitted to the data, or the paper's plain method.",
        ),
        click.option(
            "--calib-size",
            default=1024,
            show_default=True,
            type=click.IntRange(min=1),
            help="At most so many calibration samples.",
        ),
        click.option(
            "--calib",
            metavar="DATA",
            help="Unlabelled data the factors are fitted to; takes what --data takes.",
        ),
        click.option("--plan", type=click.Path(), help="A plan.json (of a bundle, perhaps edited): forms and ranks."),
        click.option(
            "--max-drop", type=float, metavar="POINTS", help="Smallest model losing at most so many points on --data."
        ),
        click.option(
            "--cost-budget", default="240s", show_default=True, metavar="TIME", help="Time for a table measured here."
        ),
        click.option(
            "--allow-slower",
            is_flag=True,
            help="Split also where it is not measured faster; deliver the model however fast it is.",
        ),
        click.option(
            "--allow-cost-mismatch",
            is_flag=True,
            help="Take a --cost of another machine: plan for there, measure nothing.",
        ),
        click.option(
            "--cost",
            type=click.Path(),
            metavar="FILE",
            help="Plan with this cost table (rsi-deploy profile); without it one is measured where a budget needs it.",
        ),
        click.option("--max-latency", metavar="25ms", help="Budget: time of a call, measured."),
        click.option("--keep-latency", metavar="0.6|60%", help="Budget: share of the dense model's time for a call."),
        click.option("--max-size", metavar="20MB", help="Budget: bytes of model.onnx."),
        click.option("--keep-macs", metavar="0.5|50%", help="Budget: share of the whole model's MACs."),
        click.option("--keep-params", metavar="0.5|50%", help="Budget: share of the whole model's parameters."),
        click.option(
            "--max-error",
            metavar="5%|1.1x",
            help="Smallest rank of each weight with at most this error: of its norm, or times the best of that rank.",
        ),
        click.option(
            "--rank",
            help="A rank (64), or a ratio of full rank (40%: ceil(0.4 * min(out, in))). "
            "Instead of it: a budget, --max-drop or --plan.",
        ),
    ):
        function = decorator(function)
    return function


class PowerIterationsType(_CountOrWord):
    """A count of power iterations, or "auto"."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The count, at least 1, or "auto"."""
        if value == "auto" or isinstance(value, int):
            return value
        if not str(value).isdigit() or int(value) < 1:
            self.fail(f"expected a count of at least 1, or auto, but got {value!r}", param, ctx)
        return int(value)


def kernel_options(function: F) -> F:
    """How the factors of a weight are computed."""
    for decorator in (
        click.option(
            "--no-mixed-precision", is_flag=True, help="No bfloat16 in the iterations, even where it is fast."
        ),
        click.option(
            "--route",
            type=click.Choice(["auto", "direct", "chebyshev", "gram", "krylov", "exact"]),
            default="auto",
            show_default=True,
            help="Of the kernel; auto: the cheapest by a model measured on this machine. The report names it.",
        ),
        click.option(
            "--oversampling", default=0, show_default=True, type=click.IntRange(min=0), help="Extra sketch columns."
        ),
        click.option(
            "--power-iterations",
            "-q",
            default=4,
            show_default=True,
            type=PowerIterationsType(),
            help="The paper's q; auto: until another pass would gain less than 1 %.",
        ),
    ):
        function = decorator(function)
    return function


def preprocessing_options(function: F) -> F:
    """From pictures to inputs: the verb gets `preprocessing`, which has the fields that were typed, or None."""

    @functools.wraps(function)
    def verb(
        *args: Any,
        mean: str | None,
        std: str | None,
        resize: str | None,
        crop: str | None,
        layout: str | None,
        **options: Any,
    ) -> Any:
        return function(*args, preprocessing=_preprocessing(mean, std, resize, crop, layout), **options)

    for decorator in (
        click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Axes of the input."),
        click.option("--crop", metavar="HxW|none", help="Centre crop in pixels; none: not the model's own either."),
        click.option(
            "--resize",
            metavar="N|HxW|none",
            help="Shorter side, or height x width, in pixels; none: not the model's own either.",
        ),
        click.option("--std", metavar="S,S,S", help="Divisor per channel, after the mean."),
        click.option("--mean", metavar="M,M,M", help="Subtracted per channel from pixels in 0..1."),
    ):
        verb = decorator(verb)
    return cast(F, verb)


def runtime_options(function: F) -> F:
    """Where to run, and how to answer."""
    for decorator in (
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
        click.option("--threads", type=click.IntRange(min=1), help="onnxruntime threads; default: its own choice."),
        click.option(
            "--provider",
            default="cpu",
            show_default=True,
            metavar="NAME[:key=value,...]",
            help="onnxruntime provider with options: cpu:threads=2,spinning=off, cuda:use_tf32=0, ...",
        ),
    ):
        function = decorator(function)
    return function


def loadgen_options(function: F) -> F:
    """MLPerf LoadGen beside the tool's own loop, and whether a fallback is measured."""
    for decorator in (
        click.option(
            "--allow-fallback", is_flag=True, help="Measure also what another provider runs than the one asked for."
        ),
        click.option(
            "--target-latency",
            type=click.FloatRange(min=0, min_open=True),
            metavar="MS",
            help="LoadGen Server: 99 % of the queries within it; default: ten calls' time, 10 ms or more.",
        ),
        click.option(
            "--target-qps",
            type=click.FloatRange(min=0, min_open=True),
            help="LoadGen Server: queries a second; default: half of what back-to-back calls reach.",
        ),
        click.option(
            "--loadgen",
            type=click.Choice(["SingleStream", "MultiStream", "Server", "Offline"], case_sensitive=False),
            multiple=True,
            help="Also test every model with MLPerf LoadGen (extra: loadgen); repeatable.",
        ),
    ):
        function = decorator(function)
    return function


def _preprocessing(
    mean: str | None, std: str | None, resize: str | None, crop: str | None, layout: str | None
) -> "Preprocessing | None":
    """Only the fields that were typed; None without any."""
    if all(text is None for text in (mean, std, resize, crop, layout)):
        return None
    from rsi_deploy.data.preprocess import Preprocessing

    given: dict[str, Any] = {"layout": layout} if layout else {}
    for option, text in (("mean", mean), ("std", std)):
        if text is not None:
            given[option] = _numbers(f"--{option}", text)
    for option, text in (("resize", resize), ("crop", crop)):
        if text is not None:
            size = () if text.lower() == "none" else _size(f"--{option}", text)
            given[option] = None if not size else size[0] if len(size) == 1 and option == "resize" else (size * 2)[:2]
    return Preprocessing(**given)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} takes numbers joined by commas, such as 0.485,0.456,0.406, but got {text!r}"
        ) from None


def _size(option: str, text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise UsageError(f"{option} takes pixels such as 224 or 224x224, or none, but got {text!r}")
    return tuple(int(p) for p in parts)


def onnx_path(text: str) -> Path:
    """An ONNX file, or the one in a bundle."""
    path = Path(text)
    if path.is_dir() and (path / "model.onnx").is_file():
        return path / "model.onnx"
    if not path.is_file():
        raise UsageError(f"no such model: {text}; expected an .onnx file or a bundle's folder")
    return path
