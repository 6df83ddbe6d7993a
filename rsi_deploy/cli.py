"""The command line: verbs, options, streams and exit codes. All work is done by the functions of the same names.

Results go to stdout (one JSON document with --json), progress and logs to stderr. Exit codes: 0 done, 2 usage,
3 the model cannot be handled, 4 a gate failed, 130 interrupted, 1 what nobody foresaw.
"""

import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rsi_deploy import __version__
from rsi_deploy.errors import GateError, ModelError, RsiDeployError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from rsi_deploy.measure.preprocess import Preprocessing

F = TypeVar("F", bound=Callable[..., Any])

MODEL_HELP = "torchvision:NAME, package.module:factory, FILE.pt2 or FILE.onnx"
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}


def yield_idle_threads() -> None:
    """Have torch's idle OpenMP threads sleep instead of spin, unless the user chose; must come before torch loads.

    Where another process wants the cores, spinning threads make small matrix work ten times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: list[str] | None = None) -> None:
    """Entry point: run a verb and end the process with its exit code."""
    sys.exit(run(argv))


def run(argv: list[str] | None = None) -> int:
    """Run a verb and return its exit code; every foreseen error is one message on stderr."""
    yield_idle_threads()
    try:
        return cli.main(args=argv, prog_name="rsi-deploy", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted; nothing was left under the final name", 130)
    except RsiDeployError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno in FULL_DISK:
            return _fail(f"no space left on the disk ({error.filename or 'while writing'}); nothing was left behind", 3)
        if error.errno in NO_ACCESS:
            return _fail(f"no permission: {error.filename or error}", 3)
        raise


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rsi-deploy")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr.")
def cli(verbose: bool) -> None:
    """Compress a trained network into a smaller, measurably faster ONNX model, and tell the truth about it."""
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr, format="%(message)s")


def _source_options(function: F) -> F:
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
        click.argument("model", metavar="MODEL"),
    ):
        function = decorator(function)
    return function


def _filter_options(function: F) -> F:
    """Which sites, and the seed."""
    for decorator in (
        click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of all that is random."),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Sites that stay dense; repeatable."),
        click.option("--include", multiple=True, metavar="GLOB", help="Only these sites; repeatable."),
    ):
        function = decorator(function)
    return function


def _ranks_options(function: F) -> F:
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
            type=click.Path(),
            help="Unlabelled data the factors are fitted to: as --data, or an .npz with one array per input.",
        ),
        click.option("--plan", type=click.Path(), help="A plan.json (of a bundle, perhaps edited): forms and ranks."),
        click.option(
            "--max-drop", type=float, metavar="POINTS", help="Smallest model losing at most so many points on --data."
        ),
        click.option("--max-size", metavar="20MB", help="Budget: bytes of model.onnx."),
        click.option("--keep-macs", metavar="0.5|50%", help="Budget: share of the whole model's MACs."),
        click.option("--keep-params", metavar="0.5|50%", help="Budget: share of the whole model's parameters."),
        click.option(
            "--rank",
            help="A rank (64), or a ratio of full rank (40%: ceil(0.4 * min(out, in))). "
            "Instead of it: a budget, --max-drop or --plan.",
        ),
    ):
        function = decorator(function)
    return function


def _preprocessing_options(function: F) -> F:
    """From 8-bit pictures to inputs; what is not given comes from the model."""
    for decorator in (
        click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Axes of the input."),
        click.option("--crop", metavar="HxW", help="Centre crop in pixels."),
        click.option("--resize", metavar="N|HxW", help="Shorter side, or height x width, in pixels."),
        click.option("--std", metavar="S,S,S", help="Divisor per channel, after the mean."),
        click.option("--mean", metavar="M,M,M", help="Subtracted per channel from pixels in 0..1."),
    ):
        function = decorator(function)
    return function


def _runtime_options(function: F) -> F:
    for decorator in (
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
        click.option("--threads", type=click.IntRange(min=1), help="onnxruntime threads; default: its own choice."),
        click.option("--provider", default="cpu", show_default=True, help="onnxruntime provider: cpu, cuda, ..."),
    ):
        function = decorator(function)
    return function


@cli.command()
@_source_options
@_ranks_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--data", type=click.Path(), help="Labelled evaluation data: .npz or a tree of class folders.")
@click.option("--feeds", type=click.Path(), help=".npz, one array per input: verify and measure with these.")
@_preprocessing_options
@click.option("--method", type=click.Choice(["rsi", "rsvd", "svd"]), default="rsi", show_default=True)
@click.option(
    "--power-iterations", "-q", default=4, show_default=True, type=click.IntRange(min=1), help="The paper's q."
)
@click.option("--oversampling", default=0, show_default=True, type=click.IntRange(min=0), help="Extra sketch columns.")
@_filter_options
@click.option(
    "--always-split", is_flag=True, help="Split also where nothing is saved, and nothing jointly (teaching, tests)."
)
@click.option("--no-joint", is_flag=True, help="No right factor shared by weights of the same input (q, k, v).")
@click.option("--assume-constant", is_flag=True, help="ONNX: weights that are graph inputs too are constants.")
@click.option("--opset", type=int, help="Of the ONNX model. [default: an ONNX file's own; 23 with attention, else 20]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--no-bench", is_flag=True, help="Do not measure latency.")
@click.option("--bench-batch", default=1, show_default=True, type=click.IntRange(min=1), help="Samples a run.")
@click.option("--bench-seconds", default=10.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--max-output-error", type=click.FloatRange(min=0), help="Gate: relative error of the outputs (exit 4).")
@click.option("--keep-dense", is_flag=True, help="Keep dense.onnx in the bundle.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@_runtime_options
def export(
    model: str,
    output: Path,
    no_bench: bool,
    no_joint: bool,
    as_json: bool,
    mean: str | None,
    std: str | None,
    resize: str | None,
    crop: str | None,
    layout: str | None,
    **options: Any,
) -> None:
    """Compress MODEL and write a bundle: model.onnx, report.json, plan.json, README.md.

    How small: --rank, the same everywhere; or, with unlabelled data (--calib), a budget for the whole model
    (--keep-params, --keep-macs, --max-size), or the smallest that keeps the accuracy (--max-drop); or a --plan.

    MODEL is torchvision:NAME, package.module:factory (its code runs: name only code you trust), FILE.pt2 or FILE.onnx.
    The paper's own rounding of a ratio is not known to us; here it is ceil(ratio * min(out, in)).
    """
    from rsi_deploy.pipeline import export as run_export
    from rsi_deploy.report.table import print_report

    with _progress_bar() as progress:
        report = run_export(
            model,
            output,
            preprocessing=_preprocessing(mean, std, resize, crop, layout),
            measure=not no_bench,
            joint=not no_joint,
            progress=progress,
            command=shlex.join(["rsi-deploy", *sys.argv[1:]]),
            **options,
        )
    if as_json:
        click.echo(report.model_dump_json(indent=2))
        return
    console = _console()
    print_report(console, report)
    console.print(f"bundle: {output}", markup=False)


@cli.command()
@_source_options
@click.option("--rank", default="25%", show_default=True, help="What export would be asked for.")
@_filter_options
@click.option("--no-joint", is_flag=True, help="As for export; without it, ONNX: says what might be split jointly.")
@click.option("--assume-constant", is_flag=True, help="ONNX: weights that are graph inputs too are constants.")
@click.option("--no-spectra", is_flag=True, help="Shapes and decisions only.")
@click.option(
    "--spectrum-limit", default=2048, show_default=True, help="Largest min(out, in) to compute a spectrum of."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def inspect(model: str, as_json: bool, no_spectra: bool, no_joint: bool, **options: Any) -> None:
    """Sites of MODEL, shapes, spectra, break-even ranks, and what export would do."""
    from rsi_deploy.inspection import inspect as run_inspect
    from rsi_deploy.report.table import print_inspection

    result = run_inspect(model, spectra=not no_spectra, joint=not no_joint, **options)
    click.echo(result.model_dump_json(indent=2)) if as_json else print_inspection(_console(), result)


@cli.command()
@click.argument("models", nargs=-1, required=True, metavar="A.onnx [B.onnx ...]")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Samples a run.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--input-shape", "shapes", multiple=True, metavar="NAME=1x128", help="Shape of one input; repeatable.")
@click.option("--data", type=click.Path(), help="Labelled evaluation data: adds the accuracy of every model.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@_runtime_options
def bench(
    models: tuple[str, ...],
    batch: int,
    seconds: float,
    shapes: tuple[str, ...],
    data: str | None,
    seed: int,
    provider: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Latency of ONNX models side by side, interleaved in one process; with --data also accuracy."""
    from rsi_deploy.measure.accuracy import evaluate
    from rsi_deploy.measure.data import open_data
    from rsi_deploy.measure.latency import bench as run_bench
    from rsi_deploy.probe import named_shapes
    from rsi_deploy.report.table import print_accuracy, print_bench

    paths = [_onnx_path(m) for m in models]
    dataset = None if data is None else open_data(data)  # what is wrong with it must not wait for the measurement
    result = run_bench(
        paths,
        batch=batch,
        provider=provider,
        threads=threads,
        seconds=seconds,
        seed=seed,
        input_shape=named_shapes(shapes) or None,
        labels=list(models) if len(set(models)) == len(models) else None,
    )
    scores = {}
    if dataset is not None:
        scores = {
            m: evaluate(p, dataset, provider=provider, reference=paths[0] if p != paths[0] else None)
            for m, p in zip(models, paths, strict=True)
        }
    if as_json:
        import json

        document = {"latency": result.model_dump(), "accuracy": {m: s.model_dump() for m, s in scores.items()}}
        click.echo(json.dumps(document, indent=2))
        return
    print_bench(_console(), result)
    for name, score in scores.items():
        print_accuracy(_console(), name, score)


@cli.command("eval")
@click.argument("model", metavar="MODEL.onnx")
@click.option("--data", required=True, type=click.Path(), help="Labelled data: .npz or a tree of class folders.")
@click.option("--reference", type=click.Path(), help="Another ONNX model: adds the agreement with it.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many samples, evenly spaced.")
@_preprocessing_options
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Samples a run.")
@click.option("--provider", default="cpu", show_default=True, help="onnxruntime provider: cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def evaluate_verb(
    model: str,
    data: str,
    reference: str | None,
    limit: int | None,
    batch: int,
    provider: str,
    as_json: bool,
    mean: str | None,
    std: str | None,
    resize: str | None,
    crop: str | None,
    layout: str | None,
) -> None:
    """Accuracy of an ONNX classifier; the preprocessing stored in it is used unless options say otherwise."""
    from rsi_deploy.measure.accuracy import evaluate
    from rsi_deploy.report.table import print_accuracy

    with _progress_bar("samples") as progress:
        result = evaluate(
            _onnx_path(model),
            data,
            preprocessing=_preprocessing(mean, std, resize, crop, layout),
            provider=provider,
            batch_size=batch,
            reference=_onnx_path(reference) if reference else None,
            limit=limit,
            progress=(lambda done, total: progress("", done - 1, total)) if progress else None,
        )
    click.echo(result.model_dump_json(indent=2)) if as_json else print_accuracy(_console(), model, result)


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(), help="The evaluation data of the report: recomputes the accuracy.")
@click.option("--calib", type=click.Path(), help="The calibration data of the report: recomputes what it says of them.")
@click.option("--provider", default="cpu", show_default=True, help="onnxruntime provider: cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def verify(folder: Path, data: str | None, calib: str | None, provider: str, as_json: bool) -> None:
    """Compute again what the report of the bundle DIR claims; exit 4 if a claim is broken."""
    from rsi_deploy.report.table import print_verification
    from rsi_deploy.verification import verify as run_verify

    result = run_verify(folder, data=data, calib=calib, provider=provider)
    click.echo(result.model_dump_json(indent=2)) if as_json else print_verification(_console(), result)
    if broken := [c for c in result.claims if c.status == "broken"]:
        raise GateError(f"{folder}: {', '.join(c.name for c in broken)} not as reported; export again")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def doctor(as_json: bool) -> None:
    """Versions, providers, CPU features: what will work here; exit 3 if something will not."""
    from rsi_deploy.diagnosis import doctor as run_doctor
    from rsi_deploy.report.table import print_diagnosis

    result = run_doctor()
    click.echo(result.model_dump_json(indent=2)) if as_json else print_diagnosis(_console(), result)
    if not result.ok:
        raise ModelError("this installation has problems; see above for what to type")


@cli.command()
def schema() -> None:
    """The JSON schema of report.json."""
    import json

    from rsi_deploy.report.schema import Report

    click.echo(json.dumps(Report.model_json_schema(), indent=2))


def _preprocessing(
    mean: str | None, std: str | None, resize: str | None, crop: str | None, layout: str | None
) -> "Preprocessing | None":
    """Only the fields that were given; the rest comes from the model."""
    if not any((mean, std, resize, crop, layout)):
        return None
    from rsi_deploy.measure.preprocess import Preprocessing

    given: dict[str, Any] = {"layout": layout} if layout else {}
    for option, text in (("mean", mean), ("std", std)):
        if text is not None:
            given[option] = _numbers(f"--{option}", text)
    for option, text in (("resize", resize), ("crop", crop)):
        if text is not None:
            size = _size(f"--{option}", text)
            given[option] = size[0] if len(size) == 1 and option == "resize" else (size * 2)[:2]
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
        raise UsageError(f"{option} takes pixels such as 224 or 224x224, but got {text!r}")
    return tuple(int(p) for p in parts)


def _onnx_path(text: str) -> Path:
    """An ONNX file, or the one in a bundle."""
    path = Path(text)
    if path.is_dir() and (path / "model.onnx").is_file():
        return path / "model.onnx"
    if not path.is_file():
        raise UsageError(f"no such model: {text}; expected an .onnx file or a bundle's folder")
    return path


def _console() -> "Console":
    from rich.console import Console

    # A pipe has no width: tables must not be cut for whoever reads it.
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=not sys.stdout.isatty())


@contextmanager
def _progress_bar(unit: str = "sites") -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr with the site at work; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading and exporting", total=None)
        yield lambda name, index, total: bar.update(task, description=name, completed=index + 1, total=total)


def _fail(message: str, code: int) -> int:
    click.echo(f"rsi-deploy: {message}", err=True)
    return code
