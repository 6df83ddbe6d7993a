"""`rsi-deploy bench`: models side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from rsi_deploy.benchmark.settings import BenchConfig
from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.cli.gating import Gates, requested_gates, show_comparison
from rsi_deploy.cli.options import onnx_path
from rsi_deploy.cli.page import check_page, write_page
from rsi_deploy.cli.terminal import console, progress_bar
from rsi_deploy.core.errors import UsageError

if TYPE_CHECKING:
    from rsi_deploy.benchmark.request import BenchRequest
    from rsi_deploy.benchmark.result import BenchDocument
    from rsi_deploy.data.dataset import Dataset
    from rsi_deploy.data.preprocess import Preprocessing
    from rsi_deploy.precision.bench_rivals import BenchRivals

INTERRUPTED = 130


@click.command(cls=Verb)
@click.argument("models", nargs=-1, required=True, metavar="A.onnx [B.onnx ...]")
@settings_options(BenchConfig)
@option("--compare", is_flag=True, help="Lay stored results (a.json b.json) side by side; nothing is run.")
@option("--html", type=click.Path(), metavar="FILE", help="Also write one page to look at, which opens from disk.")
@option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def bench(
    context: click.Context,
    /,
    models: tuple[str, ...],
    settings: BenchConfig,
    *,
    compare: bool,
    html: str | None,
    as_json: bool,
) -> None:
    """Latency of ONNX models side by side, interleaved in one process; with --data also accuracy.

    --prompt and --generate time models of onnxruntime-genai that generate text.

    The first model is what the others are compared with. Ctrl-C ends the run and shows what was measured.
    """
    if compare:
        show_comparison(models, as_json=as_json)
        return
    if settings.prompt is not None or settings.generate is not None:
        document = _generation(context, models, settings, html, as_json=as_json)
    else:
        document = _calls(context, models, settings, html, as_json=as_json)
    if any("interrupted" in note for note in (*document.notes, *(n for c in document.cells for n in c.notes))):
        context.exit(INTERRUPTED)


def _generation(
    context: click.Context, models: Sequence[str], settings: BenchConfig, html: str | None, *, as_json: bool
) -> "BenchDocument":
    """Measure models of onnxruntime-genai that generate text."""
    from rsi_deploy.benchmark.generation.measuring import run_generation
    from rsi_deploy.benchmark.generation.request import generation_request

    request = generation_request(models, settings)
    gates = requested_gates(settings, models=models)
    page = check_page(html)
    with progress_bar("%", is_short=True) as bar:
        document = run_generation(
            request,
            command=context.find_root().obj or "",
            progress=lambda name, share: bar(name, round(100 * share) - 1, 100),
        )
    _deliver(document, gates, page, as_json=as_json)
    return document


def _calls(
    context: click.Context, models: Sequence[str], settings: BenchConfig, html: str | None, *, as_json: bool
) -> "BenchDocument":
    """Measure calls of ONNX models, and what else was requested."""
    from rsi_deploy.benchmark.matrix import run_bench
    from rsi_deploy.data.picture_settings import preprocessing_of
    from rsi_deploy.evaluation.accuracy import check_data
    from rsi_deploy.precision.bench_rivals import bench_rivals, check_rivals

    gates = requested_gates(settings, models=models)
    page = check_page(html)
    paths = [onnx_path(model) for model in models]
    dataset = None if settings.data is None else _dataset(settings, models[0], paths[0])
    steps = preprocessing_of(settings)
    if dataset is None and settings.calib is None and steps is not None:
        raise UsageError("--mean, --std, --resize, --crop and --layout are for the pictures of --data; add --data DATA")
    check_rivals(paths[0], settings)
    if dataset is not None and (dataset.labels is not None or len(paths) > 1):
        # what is wrong must not wait for the measurement
        check_data(paths, dataset, preprocessing=steps, provider=settings.provider)
    with bench_rivals(paths[0], settings, steps) as rivals:
        request = _request(models, paths, dataset, settings, rivals)
        _check_loadgen(request, settings)
        with progress_bar("%", is_short=True) as bar:
            document = run_bench(
                request,
                command=context.find_root().obj or "",
                progress=lambda name, share: bar(name, round(100 * share) - 1, 100),
            )
        document = _with_loadgen(document, request, settings)
        document = rivals.shown_in(_with_accuracy(document, request, dataset, steps))
    _deliver(document, gates, page, as_json=as_json)
    return document


def _deliver(document: "BenchDocument", gates: Gates | None, page: "Path | None", *, as_json: bool) -> None:
    """Write the page, show the document and enforce the gates."""
    write_page(document, page)
    _show(document, as_json=as_json)
    if gates is not None:
        gates.enforce(document, as_json=as_json)


def _dataset(settings: BenchConfig, model: str, path: Path) -> "Dataset":
    """The data for the first model's inputs."""
    from rsi_deploy.data.sources import open_data
    from rsi_deploy.data.text_data import TextOptions, with_text
    from rsi_deploy.runtime.feeds.inputs import model_inputs

    data: Any = with_text(settings.data, TextOptions.of(settings), model)
    if isinstance(data, str):
        return open_data(data, specs=() if path.suffix == ".ort" else model_inputs(path))
    opened: Dataset = data
    return opened


def _request(
    models: Sequence[str],
    paths: Sequence[Path],
    dataset: "Dataset | None",
    settings: BenchConfig,
    rivals: "BenchRivals",
) -> "BenchRequest":
    """Return the request that the settings make; rivals follow the user's models."""
    from rsi_deploy.benchmark.request import BenchRequest, matrix_shapes
    from rsi_deploy.benchmark.variants import short_names
    from rsi_deploy.runtime.pinning import parse_cores

    shapes = matrix_shapes(settings.input_shape)
    same = ("provider", "allow_fallback", "seconds", "budget", "seed", "cold_start", "memory", "memory_limit")
    return BenchRequest(
        models=(*paths, *rivals.paths),
        labels=(*short_names(models), *rivals.labels),
        batches=settings.batch,
        shapes=shapes,
        threads=settings.threads or (None,),
        precisions=_precisions(settings.dtype),
        pinned=() if settings.pin is None else parse_cores(settings.pin),
        precision=settings.precision / 100,
        feeds=_feeds(settings, paths[0], dataset, max(settings.batch), shaped=bool(shapes)),
        burst_gap=settings.bursts,
        streams=settings.streams or (),
        throughput=settings.throughput,
        profile=settings.profile,
        **{name: getattr(settings, name) for name in same},
    )


def _feeds(settings: BenchConfig, model: Path, dataset: "Dataset | None", batch: int, *, shaped: bool) -> Any:
    """Return inputs from a file or from the data, None for random ones."""
    if settings.feeds is not None and shaped:
        raise UsageError(
            "--feeds and --input-shape contradict each other: the arrays have their shapes; give one of them"
        )
    if settings.feeds is not None:
        from rsi_deploy.runtime.feeds.user_feeds import read_feeds

        return read_feeds(settings.feeds)
    if dataset is None or shaped:
        return None
    from rsi_deploy.data.picture_settings import preprocessing_of
    from rsi_deploy.evaluation.sample_feeds import sample_feeds

    return sample_feeds(dataset, model, settings.provider, batch, preprocessing_of(settings))


def _precisions(text: str) -> Any:
    from rsi_deploy.benchmark.result import Precision

    names = [part.strip() for part in text.split(",")]
    known: tuple[Literal["stored", "float16"], ...] = get_args(Precision)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--dtype takes {', '.join(known)}, but got {unknown[0]!r}")
    return tuple(dict.fromkeys(names))


def _check_loadgen(request: "BenchRequest", settings: BenchConfig) -> None:
    """What LoadGen cannot do must not wait for the measurement."""
    if settings.loadgen:
        from rsi_deploy.benchmark.mlperf.loadgen import check_loadgen

        for scenario in settings.loadgen:
            check_loadgen(scenario, request.settings()[0].batch, request.share())


def _with_loadgen(document: "BenchDocument", request: "BenchRequest", settings: BenchConfig) -> "BenchDocument":
    """MLPerf LoadGen's tests of every arm, in the first configuration."""
    if not settings.loadgen or (document.partial and any("interrupted" in note for note in document.notes)):
        return document
    from rsi_deploy.benchmark.mlperf.loadgen import run_loadgen

    configuration = request.settings()[0]
    found = {
        label: tuple(
            run_loadgen(
                model,
                scenario,
                provider=request.provider,
                threads=configuration.threads,
                batch=configuration.batch,
                seconds=request.share(),
                seed=request.seed,
                feeds=request.feeds,
                input_shape=configuration.shapes or None,
                target_qps=settings.target_qps if scenario == "Server" else None,
                target_latency_ms=settings.target_latency if scenario == "Server" else None,
                allow_fallback=request.allow_fallback,
            )
            for scenario in settings.loadgen
        )
        for model, label in zip(request.models, request.labels, strict=True)
    }
    return document.model_copy(update={"loadgen": found})


def _with_accuracy(
    document: "BenchDocument", request: "BenchRequest", dataset: "Dataset | None", steps: "Preprocessing | None"
) -> "BenchDocument":
    if dataset is None or (dataset.labels is None and len(request.models) < 2):  # inputs alone, nothing to compare
        return document
    from rsi_deploy.evaluation.accuracy import evaluate_all

    with progress_bar("samples", is_short=True) as bar:
        results = evaluate_all(
            request.models,
            dataset,
            preprocessing=steps,
            provider=request.provider,
            progress=lambda done, total: bar("accuracy", done - 1, total),
        )
    return document.model_copy(update={"accuracy": dict(zip(request.labels, results, strict=True))})


def _show(document: "BenchDocument", *, as_json: bool) -> None:
    if as_json:
        click.echo(document.model_dump_json(indent=2))
        return
    from rsi_deploy.report.tables.accuracy import print_accuracies
    from rsi_deploy.report.tables.bench import print_document
    from rsi_deploy.report.tables.loadgen import print_loadgen

    print_document(console(), document)
    for label, results in document.loadgen.items():
        for result in results:
            print_loadgen(console(), label, result)
    if document.accuracy:
        named = list(document.accuracy.items())
        print_accuracies(console(), named, reference=named[0][0] if len(named) > 1 else "")
