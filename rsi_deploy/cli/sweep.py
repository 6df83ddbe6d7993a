"""`rsi-deploy sweep`: accuracy against time, bytes and MACs, from one calibration."""

from pathlib import Path

import click

from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.cli.options import model_argument
from rsi_deploy.cli.terminal import console, progress_bar
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.verbs import SweepConfig


@click.command(cls=Verb)
@model_argument(required=False)
@settings_options(SweepConfig, recipe=True)
@option("-o", "--output", unless="dry_run", type=click.Path(path_type=Path), help="Folder of the sweep.")
@option("--force", is_flag=True, help="Replace a sweep or bundle that is there.")
@option("--dry-run", is_flag=True, help="Print the request as a recipe, and the shares; make nothing.")
@option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def sweep(
    context: click.Context,
    /,
    model: str | None,
    output: Path | None,
    settings: SweepConfig,
    *,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make MODEL at many sizes: a table, sweep.json, and report.html with the fronts; every point is a bundle.

    The same command resumes a sweep that was interrupted. `export --from-sweep DIR --point N` delivers a point.
    """
    from rich.table import Table

    from rsi_deploy.report.pages.sweep import COLUMNS, quality_name, sweep_rows, times_name
    from rsi_deploy.sweeping.api import request_text
    from rsi_deploy.sweeping.api import sweep as run_sweep

    if model is None:
        raise UsageError("Missing argument 'MODEL': type a model, or --recipe FILE.toml with one")
    if dry_run:
        click.echo(request_text(model, settings), nl=False)
        return
    assert output is not None, "click requires it"
    command = context.find_root().obj
    with progress_bar("points") as progress:
        document = run_sweep(model, output, settings, force=force, progress=progress, command=command)
    if as_json:
        click.echo(document.model_dump_json(indent=1))
        return
    terminal = console()
    table = Table(*[column.removeprefix("#") for column in COLUMNS])
    for row in sweep_rows(document):
        table.add_row(*row)
    terminal.print(table)
    terminal.print(f"quality: {quality_name(document)}", markup=False)
    if times := times_name(document):
        terminal.print(f"times: {times}", markup=False)
    for note in document.notes:
        terminal.print(f"note: {note}", style="yellow", markup=False)
    terminal.print(f"sweep: {output}", markup=False)
