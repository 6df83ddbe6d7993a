"""`rsi-deploy doctor` and `rsi-deploy schema`: about the tool itself."""

import click

from rsi_deploy.cli.terminal import console
from rsi_deploy.errors import ModelError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def doctor(as_json: bool) -> None:
    """Versions, providers, CPU features: what will work here; exit 3 if something will not."""
    from rsi_deploy.diagnosis import doctor as run_doctor
    from rsi_deploy.report.table import print_diagnosis

    result = run_doctor()
    click.echo(result.model_dump_json(indent=2)) if as_json else print_diagnosis(console(), result)
    if not result.ok:
        raise ModelError("this installation has problems; see above for what to type")


@click.command()
def schema() -> None:
    """The JSON schema of report.json."""
    import json

    from rsi_deploy.report.schema import Report

    click.echo(json.dumps(Report.model_json_schema(), indent=2))
