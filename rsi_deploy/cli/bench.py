"""`rsi-deploy bench`: models side by side."""

import click

from rsi_deploy.cli.options import onnx_path, runtime_options
from rsi_deploy.cli.terminal import console


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="A.onnx [B.onnx ...]")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Samples a run.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--input-shape", "shapes", multiple=True, metavar="NAME=1x128", help="Shape of one input; repeatable.")
@click.option("--data", type=click.Path(), help="Labelled evaluation data: adds the accuracy of every model.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@runtime_options
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

    paths = [onnx_path(m) for m in models]
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
    print_bench(console(), result)
    for name, score in scores.items():
        print_accuracy(console(), name, score)
