"""`rsi-deploy sweep`: accuracy against time, bytes and MACs, from one calibration."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from rsi_deploy.cli.options import DATA_HELP, filter_options, preprocessing_options, runtime_options, source_options
from rsi_deploy.cli.terminal import console, progress_bar


@click.command()
@source_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the sweep.")
@click.option("--calib", required=True, metavar="DATA", help=f"Unlabelled calibration data. {DATA_HELP}")
@click.option("--data", metavar="DATA", help="Labelled evaluation data; without them answers on --calib are compared.")
@click.option("--feeds", type=click.Path(), help=".npz, one array per input: verify and measure with these.")
@click.option("--by", type=click.Choice(["macs", "params", "latency"]), default="macs", show_default=True)
@click.option("--points", default=12, show_default=True, type=click.IntRange(min=2), help="How many models.")
@click.option("--highest", default=0.95, show_default=True, help="Share of the first one.")
@click.option("--lowest", default=0.3, show_default=True, help="Share of the last one.")
@click.option(
    "--calib-size", default=512, show_default=True, type=click.IntRange(min=1), help="At most so many samples."
)
@preprocessing_options
@filter_options
@click.option("--allow-slower", is_flag=True, help="Split also where it is not measured faster.")
@click.option("--allow-larger", is_flag=True, help="Keep points that are larger than the dense model, too.")
@click.option("--cost-budget", default="120s", show_default=True, metavar="TIME", help="Time for the cost table.")
@click.option("--no-bench", is_flag=True, help="Do not measure latency.")
@click.option("--bench-batch", default=1, show_default=True, type=click.IntRange(min=1), help="Samples a call.")
@click.option("--bench-seconds", default=4.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option(
    "--ray",
    metavar="ADDRESS|local",
    help="Have a Ray cluster's workers make the points; measured ones each on a machine of their own. [extra: ray]",
)
@click.option("--force", is_flag=True, help="Start anew in a folder that is not empty.")
@runtime_options
def sweep(model: str, output: Path, no_bench: bool, as_json: bool, **options: Any) -> None:
    """Make MODEL at many sizes: a table, sweep.json, and report.html with the fronts; every point is a bundle.

    The same command goes on with a sweep that was interrupted. `export --from-sweep DIR --point N` delivers a point.
    """
    from rich.table import Table

    from rsi_deploy.report.pages.sweep import COLUMNS, quality_name, sweep_rows, times_name
    from rsi_deploy.sweeping.api import sweep as run_sweep

    command = shlex.join(["rsi-deploy", *sys.argv[1:]])
    with progress_bar("points") as progress:
        document = run_sweep(model, output, measure=not no_bench, progress=progress, command=command, **options)
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
