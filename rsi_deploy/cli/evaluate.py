"""`rsi-deploy eval`: accuracy alone."""

from typing import TYPE_CHECKING, Literal

import click

from rsi_deploy.cli.options import DATA_HELP, onnx_path, preprocessing_options
from rsi_deploy.cli.terminal import console, progress_bar

if TYPE_CHECKING:
    from rsi_deploy.data.preprocess import Preprocessing


@click.command("eval")
@click.argument("model", metavar="MODEL.onnx")
@click.option("--data", required=True, metavar="DATA", help=DATA_HELP)
@click.option("--reference", type=click.Path(), help="Another ONNX model: how far the answers are from its answers.")
@click.option(
    "--outputs",
    type=click.Choice(["auto", "classes", "values"]),
    default="auto",
    show_default=True,
    help="Class scores, or values (embeddings, regressions) compared with the reference.",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many samples, evenly spaced.")
@preprocessing_options
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Samples a run.")
@click.option("--provider", default="cpu", show_default=True, help="onnxruntime provider: cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def evaluate_verb(
    model: str,
    data: str,
    reference: str | None,
    outputs: Literal["auto", "classes", "values"],
    limit: int | None,
    batch: int,
    provider: str,
    as_json: bool,
    preprocessing: "Preprocessing | None",
) -> None:
    """Accuracy of an ONNX model; the preprocessing stored in it is used unless options say otherwise.

    With labels: top-1 and top-5. With a --reference: agreement and KL of class scores, cosine and distance of other
    outputs, and whether as many answers are right (McNemar's exact test).
    """
    from rsi_deploy.evaluation.accuracy import evaluate_all
    from rsi_deploy.report.tables.accuracy import print_accuracies

    models = [model] if reference is None else [reference, model]
    paths = [onnx_path(name) for name in models]
    with progress_bar("samples", is_short=True) as progress:
        results = evaluate_all(
            paths,
            data,
            preprocessing=preprocessing,
            provider=provider,
            batch_size=batch,
            outputs=outputs,
            limit=limit,
            progress=lambda done, total: progress("", done - 1, total),
        )
    result = results[-1]
    if as_json:
        click.echo(result.model_dump_json(indent=2))
    else:
        print_accuracies(console(), list(zip(models, results, strict=True)), reference=reference or "")
    if result.partial:
        raise KeyboardInterrupt
