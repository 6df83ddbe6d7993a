"""`rsi-deploy inspect`: the sites of a model, and what export would do with them."""

import click

from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.cli.options import model_argument
from rsi_deploy.cli.terminal import console, progress_bar
from rsi_deploy.core.settings.verbs import InspectConfig


@click.command(cls=Verb)
@model_argument()
@settings_options(InspectConfig)
@option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def inspect(model: str, settings: InspectConfig, *, as_json: bool) -> None:
    """Sites of MODEL, shapes, spectra, break-even ranks, and what export would do."""
    from rsi_deploy.onnx_models.inspection import inspect as run_inspect
    from rsi_deploy.report.tables.report import print_inspection

    with progress_bar(is_short=True):
        result = run_inspect(model, **settings.keywords())
    click.echo(result.model_dump_json(indent=2)) if as_json else print_inspection(console(), result)
