"""`rsi-deploy bench`: models side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from rsi_deploy.cli.bench_options import matrix_options, measurement_options
from rsi_deploy.cli.gating import gate_options, show_comparison, wanted_gates
from rsi_deploy.cli.options import loadgen_options, onnx_path, preprocessing_options
from rsi_deploy.cli.page import check_page, page_option, write_page
from rsi_deploy.cli.terminal import console, progress_bar
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.units import parse_percent, parse_seconds, parse_size

if TYPE_CHECKING:
    from rsi_deploy.benchmark.request import BenchRequest
    from rsi_deploy.benchmark.result import BenchDocument
    from rsi_deploy.data.dataset import Dataset

INTERRUPTED = 130


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="A.onnx [B.onnx ...]")
@click.option("--data", metavar="DATA", help="Evaluation data: adds accuracy, and gives the inputs that are timed.")
@preprocessing_options
@matrix_options
@measurement_options
@loadgen_options
@gate_options
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    metavar="NAME[:key=value,...]",
    help="onnxruntime provider with options: cpu:spinning=off, cuda:use_tf32=0, ...",
)
@page_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def bench(
    context: click.Context,
    /,
    models: tuple[str, ...],
    data: str | None,
    baseline: str | None,
    max_slowdown: str | None,
    max_drop: float | None,
    compare: bool,
    html: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Latency of ONNX models side by side, interleaved in one process; with --data also accuracy.

    The first model is what the others are compared with. Ctrl-C ends the run and shows what was measured.
    """
    if compare:
        show_comparison(models, as_json=as_json)
        return
    from rsi_deploy.benchmark.matrix import run_bench
    from rsi_deploy.evaluation.accuracy import check_data

    gates = wanted_gates(baseline, max_slowdown, max_drop, models=models, data=data)
    page = check_page(html)
    paths = [onnx_path(model) for model in models]
    dataset = None if data is None else _dataset(data, paths[0])
    if dataset is None and asked["preprocessing"] is not None:
        raise UsageError("--mean, --std, --resize, --crop and --layout are for the pictures of --data; add --data DATA")
    if dataset is not None and (dataset.labels is not None or len(paths) > 1):
        # what is wrong must not wait for the measurement
        check_data(paths, dataset, preprocessing=asked["preprocessing"], provider=asked["provider"])
    request = _request(models, paths, dataset, asked)
    _check_loadgen(request, asked)
    with progress_bar("%", is_short=True) as bar:
        document = run_bench(
            request,
            command=context.find_root().obj or "",
            progress=lambda name, share: bar(name, round(100 * share) - 1, 100),
        )
    document = _with_loadgen(document, request, asked)
    document = _with_accuracy(document, request, dataset, asked)
    write_page(document, page)
    _show(document, as_json=as_json)
    if gates is not None:
        gates.enforce(document, as_json=as_json)
    if any("interrupted" in note for note in (*document.notes, *(n for c in document.cells for n in c.notes))):
        context.exit(INTERRUPTED)


def _dataset(data: str, model: Path) -> "Dataset":
    """The data for the first model's inputs."""
    from rsi_deploy.data.sources import open_data
    from rsi_deploy.runtime.feeds.inputs import model_inputs

    return open_data(data, specs=() if model.suffix == ".ort" else model_inputs(model))


def _request(
    models: Sequence[str], paths: Sequence[Path], dataset: "Dataset | None", asked: dict[str, Any]
) -> "BenchRequest":
    """The options as typed, read."""
    from rsi_deploy.benchmark.request import BenchRequest, matrix_shapes, parse_numbers
    from rsi_deploy.benchmark.variants import short_names
    from rsi_deploy.runtime.pinning import parse_cores

    def read(option: str, parse: Any) -> Any:
        """The option's value, None where it was not given."""
        text = asked[option.removeprefix("--").replace("-", "_")]
        return None if text is None else parse(text, option)

    batches = parse_numbers(asked["batch"], "--batch")
    shapes = matrix_shapes(asked["shapes"])
    return BenchRequest(
        models=tuple(paths),
        labels=short_names(models),
        batches=batches,
        shapes=shapes,
        threads=read("--threads", parse_numbers) or (None,),
        precisions=_precisions(asked["precisions"]),
        pinned=() if asked["pin"] is None else parse_cores(asked["pin"]),
        provider=asked["provider"],
        allow_fallback=asked["allow_fallback"],
        seconds=asked["seconds"],
        budget=read("--budget", parse_seconds),
        precision=parse_percent(asked["precision"], "--precision") / 100,
        seed=asked["seed"],
        feeds=_feeds(asked, paths[0], dataset, max(batches), shaped=bool(shapes)),
        cold_start=asked["cold_start"],
        memory=asked["memory"],
        memory_limit=read("--memory-limit", parse_size),
        burst_gap=read("--bursts", parse_seconds),
        streams=read("--streams", parse_numbers) or (),
        throughput=asked["throughput"],
        profile=asked["profile"],
    )


def _feeds(asked: dict[str, Any], model: Path, dataset: "Dataset | None", batch: int, *, shaped: bool) -> Any:
    """Inputs from a file or from the data, None for random ones."""
    given = asked["feeds"]
    if given is not None and shaped:
        raise UsageError(
            "--feeds and --input-shape contradict each other: the arrays have their shapes; give one of them"
        )
    if given is not None:
        from rsi_deploy.runtime.feeds.user_feeds import read_feeds

        return read_feeds(given)
    if dataset is None or shaped:
        return None
    from rsi_deploy.evaluation.sample_feeds import sample_feeds

    return sample_feeds(dataset, model, asked["provider"], batch, asked["preprocessing"])


def _precisions(text: str) -> Any:
    from rsi_deploy.benchmark.result import Precision

    names = [part.strip() for part in text.split(",")]
    known: tuple[Literal["stored", "float16"], ...] = get_args(Precision)
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--dtype takes {', '.join(known)}, but got {unknown[0]!r}")
    return tuple(dict.fromkeys(names))


def _check_loadgen(request: "BenchRequest", asked: dict[str, Any]) -> None:
    """What LoadGen cannot do must not wait for the measurement."""
    if asked["loadgen"]:
        from rsi_deploy.benchmark.loadgen import check_loadgen

        for scenario in asked["loadgen"]:
            check_loadgen(scenario, request.settings()[0].batch, request.share())


def _with_loadgen(document: "BenchDocument", request: "BenchRequest", asked: dict[str, Any]) -> "BenchDocument":
    """MLPerf LoadGen's tests of every arm, in the first configuration."""
    if not asked["loadgen"] or (document.partial and any("interrupted" in note for note in document.notes)):
        return document
    from rsi_deploy.benchmark.loadgen import run_loadgen

    setting = request.settings()[0]
    found = {
        label: tuple(
            run_loadgen(
                model,
                scenario,
                provider=request.provider,
                threads=setting.threads,
                batch=setting.batch,
                seconds=request.share(),
                seed=request.seed,
                feeds=request.feeds,
                input_shape=setting.shapes or None,
                target_qps=asked["target_qps"] if scenario == "Server" else None,
                target_latency_ms=asked["target_latency"] if scenario == "Server" else None,
                allow_fallback=request.allow_fallback,
            )
            for scenario in asked["loadgen"]
        )
        for model, label in zip(request.models, request.labels, strict=True)
    }
    return document.model_copy(update={"loadgen": found})


def _with_accuracy(
    document: "BenchDocument", request: "BenchRequest", dataset: "Dataset | None", asked: dict[str, Any]
) -> "BenchDocument":
    if dataset is None or (dataset.labels is None and len(request.models) < 2):  # inputs alone, nothing to compare
        return document
    from rsi_deploy.evaluation.accuracy import evaluate_all

    with progress_bar("samples", is_short=True) as bar:
        results = evaluate_all(
            request.models,
            dataset,
            preprocessing=asked["preprocessing"],
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
