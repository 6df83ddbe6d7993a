"""`rsi-deploy profile`: what every split of every site costs in time here, for exports here or anywhere else."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from rsi_deploy.cli.options import preprocessing_options, runtime_options, source_options
from rsi_deploy.cli.terminal import console, progress_bar


@click.command()
@source_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The JSON file to write.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Samples a call.")
@click.option("--budget", default="240s", show_default=True, metavar="TIME", help="Time for all of it.")
@click.option(
    "--precision",
    default=5.0,
    show_default=True,
    type=click.FloatRange(min=0, max=100, min_open=True, max_open=True),
    help="Half width of the intervals that is narrow enough, %.",
)
@click.option("--feeds", type=click.Path(), help=".npz, one array per input: time with these; they tell the batch.")
@preprocessing_options
@click.option("--assume-constant", is_flag=True, help="ONNX: weights that are graph inputs too are constants.")
@click.option("--fresh", is_flag=True, help="Measure what the cache knows, too.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@runtime_options
def profile(model: str, output: Path, precision: float, as_json: bool, **options: Any) -> None:
    """Time every distinct site shape of MODEL on this machine, dense and split, and write a cost table.

    `export MODEL --cost FILE` then plans for this machine, here or anywhere else. For an ONNX file no torch is needed.
    """
    from rsi_deploy.exporting.profile import profile as run_profile
    from rsi_deploy.report.tables.costs import print_costs

    command = shlex.join(["rsi-deploy", *sys.argv[1:]])
    with progress_bar("shapes") as progress:
        table = run_profile(model, output, precision=precision / 100, progress=progress, command=command, **options)
    if as_json:
        click.echo(table.model_dump_json(indent=1))
        return
    terminal = console()
    print_costs(terminal, table)
    terminal.print(f"cost table: {output}", markup=False)
