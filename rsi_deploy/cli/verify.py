"""`rsi-deploy verify`: what a report claims, computed again."""

from pathlib import Path

import click

from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.cli.terminal import console, progress_bar
from rsi_deploy.core.errors import GateError
from rsi_deploy.core.settings.verbs import VerifyConfig


@click.command(cls=Verb)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@settings_options(VerifyConfig)
@option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def verify(folder: Path, settings: VerifyConfig, *, as_json: bool) -> None:
    """Compute again what the report of the bundle DIR claims; exit 4 if a claim is broken.

    The first claim is the manifest: every file of DIR has the size and sha256 it was written with, and no file is
    missing or was added. Of a folder that `package` wrote it is the only one.
    """
    from rsi_deploy.report.tables.report import print_verification
    from rsi_deploy.verifying.api import verify as run_verify

    with progress_bar("claims", is_short=True):
        result = run_verify(folder, **settings.keywords())
    click.echo(result.model_dump_json(indent=2)) if as_json else print_verification(console(), result)
    if broken := [c for c in result.claims if c.status == "broken"]:
        raise GateError(f"{folder}: {', '.join(c.name for c in broken)} not as reported; export (or package) again")
