"""`rsi-deploy export`: the main job."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from rsi_deploy.cli.options import (
    DATA_HELP,
    filter_options,
    kernel_options,
    preprocessing_options,
    ranks_options,
    runtime_options,
    source_options,
)
from rsi_deploy.cli.terminal import console, progress_bar


@click.command()
@source_options
@ranks_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--data", metavar="DATA", help=f"Labelled evaluation data. {DATA_HELP}")
@click.option("--feeds", type=click.Path(), help=".npz, one array per input: verify and measure with these.")
@preprocessing_options
@click.option("--method", type=click.Choice(["rsi", "rsvd", "svd"]), default="rsi", show_default=True)
@kernel_options
@filter_options
@click.option(
    "--always-split", is_flag=True, help="Split also where nothing is saved, and nothing jointly (teaching, tests)."
)
@click.option("--no-joint", is_flag=True, help="No right factor shared by weights of the same input (q, k, v).")
@click.option("--assume-constant", is_flag=True, help="ONNX: weights that are graph inputs too are constants.")
@click.option("--opset", type=int, help="Of the ONNX model. [default: an ONNX file's own; 23 with attention, else 20]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--ray",
    metavar="ADDRESS|local",
    help="Have a Ray cluster's workers factorize, on their CPUs: the same bytes. [extra: ray]",
)
@click.option("--no-bench", is_flag=True, help="Do not measure latency.")
@click.option("--bench-batch", default=1, show_default=True, type=click.IntRange(min=1), help="Samples a run.")
@click.option("--bench-seconds", default=10.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--max-output-error", type=click.FloatRange(min=0), help="Gate: relative error of the outputs (exit 4).")
@click.option("--allow-larger", is_flag=True, help="Deliver the model even where it is larger than the dense one.")
@click.option("--keep-dense", is_flag=True, help="Keep dense.onnx in the bundle.")
@click.option("--from-sweep", type=click.Path(), metavar="DIR", help="Deliver a model of this sweep, without MODEL.")
@click.option("--point", type=click.IntRange(min=1), help="Which point of the sweep.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@runtime_options
def export(
    model: str | None,
    output: Path,
    no_bench: bool,
    no_joint: bool,
    no_mixed_precision: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compress MODEL and write a bundle: model.onnx, report.json, plan.json, README.md.

    How small: --rank, the same everywhere; --max-error, as small as each weight allows; or, with unlabelled data
    (--calib), a budget for the whole model (--keep-params, --keep-macs, --max-size), or the smallest that keeps the
    accuracy (--max-drop); or a --plan.

    MODEL is torchvision:NAME, package.module:factory (its code runs: name only code you trust), FILE.pt2 or FILE.onnx.
    The paper's own rounding of a ratio is not known to us; here it is ceil(ratio * min(out, in)).
    """
    from rsi_deploy.exporting.api import export as run_export
    from rsi_deploy.report.tables.report import print_report

    with progress_bar() as progress:
        report = run_export(
            model,
            output,
            measure=not no_bench,
            joint=not no_joint,
            mixed_precision=not no_mixed_precision,
            progress=progress,
            command=shlex.join(["rsi-deploy", *sys.argv[1:]]),
            **options,
        )
    if as_json:
        click.echo(report.model_dump_json(indent=2))
        return
    terminal = console()
    print_report(terminal, report)
    terminal.print(f"bundle: {output}", markup=False)


next(parameter for parameter in export.params if parameter.name == "model").required = False  # not with --from-sweep
