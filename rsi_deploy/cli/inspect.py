"""`rsi-deploy inspect`: what there is, and what export would do."""

from typing import Any

import click

from rsi_deploy.cli.options import filter_options, source_options
from rsi_deploy.cli.terminal import console, progress_bar


@click.command()
@source_options
@click.option("--rank", default="25%", show_default=True, help="What export would be asked for.")
@filter_options
@click.option("--no-joint", is_flag=True, help="As for export; without it, ONNX: says what might be split jointly.")
@click.option("--assume-constant", is_flag=True, help="ONNX: weights that are graph inputs too are constants.")
@click.option("--no-spectra", is_flag=True, help="Shapes and decisions only.")
@click.option(
    "--spectrum-limit", default=2048, show_default=True, help="Largest min(out, in) to compute a spectrum of."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def inspect(model: str, as_json: bool, no_spectra: bool, no_joint: bool, **options: Any) -> None:
    """Sites of MODEL, shapes, spectra, break-even ranks, and what export would do."""
    from rsi_deploy.onnx_models.inspection import inspect as run_inspect
    from rsi_deploy.report.tables.report import print_inspection

    with progress_bar(is_short=True):
        result = run_inspect(model, spectra=not no_spectra, joint=not no_joint, **options)
    click.echo(result.model_dump_json(indent=2)) if as_json else print_inspection(console(), result)
