"""`rsi-deploy package`: a bundle made ready for an engine."""

from pathlib import Path

import click

from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.cli.terminal import console
from rsi_deploy.packaging.settings import PackageConfig


@click.command(cls=Verb)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@settings_options(PackageConfig)
@option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@option("--force", is_flag=True, help="Replace a package that is there.")
@option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def package(folder: Path, output: Path, settings: PackageConfig, *, force: bool, as_json: bool) -> None:
    """Make of the bundle DIR what an engine serves: a folder with a README of the commands, and a manifest.

    \b
    ort        ORT format with its required-operators file, for onnxruntime's minimal builds
    triton     a model repository, for the onnxruntime backend or the Python backend
    kserve     an InferenceService, and the repository for its storage
    ray-serve  an application and its config, which run without rsi-deploy
    """  # noqa: D301 - click reads the control character
    from rsi_deploy.packaging.packing import package as run_package

    result = run_package(folder, output, force=force, **settings.keywords())
    if as_json:
        click.echo(result.model_dump_json(indent=2))
        return
    terminal = console()
    for file in result.files:
        terminal.print(f"  {file}", markup=False)
    for note in result.notes:
        terminal.print(f"note: {note}", markup=False)
    terminal.print(f"package: {output} ({result.name}, {result.target}); its README.md has the commands", markup=False)
