"""`rsi-deploy export`: the main job."""

from pathlib import Path

import click

from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.cli.options import model_argument
from rsi_deploy.cli.terminal import console, progress_bar
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.verbs import ExportConfig


@click.command(cls=Verb)
@model_argument(required=False)
@settings_options(ExportConfig, recipe=True)
@option("-o", "--output", unless="dry_run", type=click.Path(path_type=Path), help="Folder to make.")
@option("--force", is_flag=True, help="Replace a bundle that is there.")
@option("--dry-run", is_flag=True, help="Print the request as a recipe, and what would be done; write nothing.")
@option("--from-sweep", metavar="DIR", first=False, help="Deliver a model of this sweep, without MODEL.")
@option("--point", type=click.IntRange(min=1), first=False, help="Number of the point in the sweep.")
@option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def export(
    context: click.Context,
    /,
    model: str | None,
    output: Path | None,
    settings: ExportConfig,
    *,
    force: bool,
    dry_run: bool,
    from_sweep: str | None,
    point: int | None,
    as_json: bool,
) -> None:
    """Compress MODEL and write a bundle: model.onnx, report.json, plan.json, recipe.toml, README.md.

    How small: with unlabelled data (--calib) alone, the smallest model that answers as the dense one does, or a faster
    one that is at most a tenth larger; likewise for a quality (--max-perplexity, --min-agreement, --min-cosine,
    --max-output-error) or the accuracy (--max-drop). Or a budget for the whole model (--keep-params, --keep-macs,
    --max-size). Without data: --rank, the same everywhere; --max-error; or a --plan.

    MODEL is torchvision:NAME, package.module:factory (its code runs: name only code you trust), FILE.pt2, FILE.onnx or
    the FOLDER of a model in ONNX or of transformers, whose tokenizer and configurations go along into the bundle.
    The paper's own rounding of a ratio is not known to us; here it is ceil(ratio * min(out, in)).
    """
    from rsi_deploy.exporting.api import export as run_export
    from rsi_deploy.exporting.dry_run import dry_run as run_dry
    from rsi_deploy.report.tables.report import print_report

    if dry_run:
        if from_sweep is not None:
            raise UsageError("--from-sweep copies a model that is made already: leave out --dry-run")
        outlook = run_dry(model, settings)
        click.echo(outlook.model_dump_json(indent=2) if as_json else outlook.text(), nl=as_json)
        return
    assert output is not None, "click requires it"
    with progress_bar() as progress:
        report = run_export(
            model,
            output,
            settings,
            force=force,
            progress=progress,
            command=context.find_root().obj,
            from_sweep=from_sweep,
            point=point,
        )
    if as_json:
        click.echo(report.model_dump_json(indent=2))
        return
    terminal = console()
    print_report(terminal, report)
    terminal.print(f"bundle: {output}", markup=False)
