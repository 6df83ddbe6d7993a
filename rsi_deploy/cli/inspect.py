"""`rsi-deploy inspect`: the sites of a model, and what export would do with them."""

import json
from typing import TYPE_CHECKING

import click

from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.cli.options import model_argument
from rsi_deploy.cli.terminal import console, progress_bar
from rsi_deploy.core.settings.groups import PictureConfig, SamplesConfig, TextSamplesConfig
from rsi_deploy.core.settings.verbs import ExportConfig, InspectConfig

if TYPE_CHECKING:
    from rsi_deploy.report.outlook import Outlook


@click.command(cls=Verb)
@model_argument()
@settings_options(InspectConfig)
@option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def inspect(model: str, settings: InspectConfig, *, as_json: bool) -> None:
    """Sites of MODEL, shapes, spectra, break-even ranks, and what export would do.

    With --calib, some models are fitted: what unseen data keep of each site, and of the whole model at several sizes.
    """
    from rsi_deploy.onnx_models.inspection import inspect as run_inspect
    from rsi_deploy.report.tables.report import print_inspection, print_outlook

    data = (*SamplesConfig.model_fields, *TextSamplesConfig.model_fields, *PictureConfig.model_fields)
    with progress_bar(is_short=settings.calib is None):
        result = run_inspect(model, **{name: v for name, v in settings.keywords().items() if name not in data})
        outlook = None if settings.calib is None else _outlook(model, settings)
    if as_json:
        more = {} if outlook is None else {"data": outlook.model_dump(mode="json") | {"verdict": outlook.verdict}}
        click.echo(json.dumps(result.model_dump(mode="json") | more, indent=2))
        return
    print_inspection(console(), result)
    if outlook is not None:
        print_outlook(console(), outlook)


def _outlook(model: str, settings: InspectConfig) -> "Outlook":
    """What unseen data keep of the model."""
    from rsi_deploy.exporting.api import export_run

    shared = {name: v for name, v in settings.spelled().items() if name in ExportConfig.model_fields and name != "rank"}
    return export_run(model, ExportConfig.of(shared, keep_params=0.5)).outlook()
