"""`rsi-deploy doctor` and `rsi-deploy schema`: about the tool itself."""

from typing import TYPE_CHECKING

import click

from rsi_deploy.cli.terminal import console
from rsi_deploy.core.errors import ModelError, UsageError

if TYPE_CHECKING:
    from rsi_deploy.core.error_table import ErrorTable


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--errors", is_flag=True, help="Instead: every error there is, how it ends, when it comes, what to type.")
def doctor(as_json: bool, errors: bool) -> None:
    """Versions, providers, CPU features: what will work here; exit 3 if something will not."""
    if errors:
        from rsi_deploy.core.error_table import read_errors

        listing = read_errors()
        click.echo(listing.model_dump_json(indent=2)) if as_json else _print_errors(listing)
        return
    from rsi_deploy.report.tables.report import print_diagnosis
    from rsi_deploy.runtime.doctor import doctor as run_doctor

    result = run_doctor()
    click.echo(result.model_dump_json(indent=2)) if as_json else print_diagnosis(console(), result)
    if not result.ok:
        raise ModelError("this installation has problems; see above for what to type")


@click.command()
@click.argument("document", default="report", metavar="[report|VERB]")
def schema(document: str) -> None:
    """Print the JSON schema of report.json; with a VERB, of its settings, which are the keys of its recipes."""
    import json

    from rsi_deploy.core.settings.verbs import CONFIGS
    from rsi_deploy.report.schema import Report

    if document not in ("report", *CONFIGS):
        raise UsageError(f"schema takes report, {', '.join(CONFIGS)}, but got {document!r}")
    model = Report if document == "report" else CONFIGS[document]
    click.echo(json.dumps(model.model_json_schema(), indent=2))


def _print_errors(listing: "ErrorTable") -> None:
    from rich.markup import escape
    from rich.table import Table

    shown = Table("ends", "when", "what to type, or what was expected", "where", box=None, header_style="bold")
    for column in shown.columns:
        column.overflow = "fold"
    for row in listing.errors:
        texts = (f"{row.ends} {row.kind}", row.when, row.to_type, f"{row.module.removesuffix('.py')}:{row.line}")
        shown.add_row(*(escape(text) for text in texts))
    console().print(shown)
    for kind, meaning in listing.kinds.items():
        console().print(f"{escape(kind)}: {escape(meaning)}")
    console().print(
        f"{len(listing.errors)} errors. Exit 1 is what nobody foresaw. Options that are misspelled end with 2 before "
        "any of these: rsi-deploy VERB --help. `within` becomes one of the others, or is met by Python code."
    )
