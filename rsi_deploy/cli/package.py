"""`rsi-deploy package`: a bundle made ready for an engine."""

from pathlib import Path
from typing import Any

import click

from rsi_deploy.cli.terminal import console


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--target", required=True, type=click.Choice(["ort", "triton", "kserve", "ray-serve"]), help="The engine."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--name", help="Of the model in the engine. [default: the name of DIR]")
@click.option("--feeds", type=click.Path(), help=".npz, one array per input: run the model with these.")
@click.option(
    "--platform",
    type=click.Choice(["arm", "amd64"]),
    default="arm",
    show_default=True,
    help="ort: arm runs on every CPU; amd64 stores x86-64's own layouts.",
)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "python"]),
    default="onnxruntime",
    show_default=True,
    help="triton: which of the server's backends.",
)
@click.option("--dense", type=click.Path(path_type=Path), metavar="FILE.onnx", help="triton: the dense model, for A/B.")
@click.option(
    "--dense-as",
    type=click.Choice(["version", "name"]),
    default="version",
    show_default=True,
    help="triton: dense as version 1 of the same model, or as NAME-dense.",
)
@click.option("--max-batch", default=8, show_default=True, type=click.IntRange(min=1), help="Samples that share a run.")
@click.option(
    "--max-delay",
    "max_delay_ms",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="MS",
    help="How long a request may wait for others.",
)
@click.option("--instances", default=1, show_default=True, type=click.IntRange(min=1), help="Copies on each device.")
@click.option("--threads", type=click.IntRange(min=1), help="Inside one operator. [default: onnxruntime's, all cores]")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option(
    "--tensorrt",
    type=click.Choice(["off", "fp32", "fp16"]),
    default="off",
    show_default=True,
    help="Have TensorRT run it on the GPU.",
)
@click.option(
    "--storage-uri",
    metavar="URI",
    help="kserve: where the models will lie (s3://..., pvc://...); ray-serve: where the zipped package will lie.",
)
@click.option("--replicas", default="1-4", show_default=True, help="kserve, ray-serve: the fewest and the most.")
@click.option(
    "--cpus", default=2, show_default=True, type=click.IntRange(min=1), help="kserve, ray-serve: of each replica."
)
@click.option("--memory", default="2Gi", show_default=True, help="kserve: of each replica.")
@click.option("--force", is_flag=True, help="Replace a folder that is there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def package(folder: Path, output: Path, as_json: bool, **options: Any) -> None:
    r"""Make of the bundle DIR what an engine serves: a folder with a README of the commands, and a manifest.

    \b
    ort        ORT format with its required-operators file, for onnxruntime's minimal builds
    triton     a model repository, for the onnxruntime backend or the Python backend
    kserve     an InferenceService, and the repository for its storage
    ray-serve  an application and its config, which run without rsi-deploy
    """
    from rsi_deploy.packaging.packing import package as run_package

    result = run_package(folder, output, **options)
    if as_json:
        click.echo(result.model_dump_json(indent=2))
        return
    terminal = console()
    for file in result.files:
        terminal.print(f"  {file}", markup=False)
    for note in result.notes:
        terminal.print(f"note: {note}", markup=False)
    terminal.print(f"package: {output} ({result.name}, {result.target}); its README.md has the commands", markup=False)
