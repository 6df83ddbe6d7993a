"""`rsi-deploy profile`: what every split of every site costs in time here, for exports here or anywhere else."""

from pathlib import Path

import click

from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.cli.options import model_argument
from rsi_deploy.cli.terminal import console, progress_bar
from rsi_deploy.core.settings.groups import PictureConfig
from rsi_deploy.core.settings.verbs import ProfileConfig


@click.command(cls=Verb)
@model_argument()
@settings_options(ProfileConfig)
@option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The JSON file to write.")
@option("--force", is_flag=True, help="Replace a file that is there.")
@option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def profile(
    context: click.Context, /, model: str, output: Path, settings: ProfileConfig, *, force: bool, as_json: bool
) -> None:
    """Time every distinct site shape of MODEL on this machine, dense and split, and write a cost table.

    `export MODEL --cost FILE` then plans for this machine, here or anywhere else. For an ONNX file no torch is needed.
    """
    from rsi_deploy.data.picture_settings import preprocessing_of
    from rsi_deploy.exporting.timing.profile import profile as run_profile
    from rsi_deploy.report.tables.costs import print_costs

    given = settings.keywords(without=PictureConfig) | {"precision": settings.precision / 100}
    with progress_bar("shapes") as progress:
        table = run_profile(
            model,
            output,
            preprocessing=preprocessing_of(settings),
            force=force,
            progress=progress,
            command=context.find_root().obj,
            **given,
        )
    if as_json:
        click.echo(table.model_dump_json(indent=1))
        return
    terminal = console()
    print_costs(terminal, table)
    terminal.print(f"cost table: {output}", markup=False)
