"""`rsi-deploy eval`: accuracy alone."""

import click

from rsi_deploy.cli.options import onnx_path, preprocessing, preprocessing_options
from rsi_deploy.cli.terminal import console, progress_bar


@click.command("eval")
@click.argument("model", metavar="MODEL.onnx")
@click.option("--data", required=True, type=click.Path(), help="Labelled data: .npz or a tree of class folders.")
@click.option("--reference", type=click.Path(), help="Another ONNX model: adds the agreement with it.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many samples, evenly spaced.")
@preprocessing_options
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

    with progress_bar("samples") as progress:
        result = evaluate(
            onnx_path(model),
            data,
            preprocessing=preprocessing(mean, std, resize, crop, layout),
            provider=provider,
            batch_size=batch,
            reference=onnx_path(reference) if reference else None,
            limit=limit,
            progress=(lambda done, total: progress("", done - 1, total)) if progress else None,
        )
    click.echo(result.model_dump_json(indent=2)) if as_json else print_accuracy(console(), model, result)
