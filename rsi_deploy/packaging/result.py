"""What `package` wrote, and files that several targets write alike."""

import shutil
from pathlib import Path
from typing import Literal

import pydantic

from rsi_deploy.core.text import in_markdown
from rsi_deploy.io.onnx_file import external_files
from rsi_deploy.packaging.servable import Servable

Target = Literal["ort", "triton", "kserve", "ray-serve"]


class PackageResult(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A package.

    Attributes:
        target: the engine.
        name: of the model there.
        folder: of the package.
        files: names within the folder, sorted; each is in its manifest.
        batched: whether the engine puts several requests into one run; None where that is not its matter.
        notes: what a reader must know.
    """

    target: Target
    name: str
    folder: str
    files: tuple[str, ...]
    batched: bool | None
    notes: tuple[str, ...]


def copy_model(model: Path, folder: Path) -> None:
    """Copy a model to `folder/model.onnx`, and the files of its external weights as they are called in it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, folder / "model.onnx")
    for data in external_files(model):
        target = folder / data.relative_to(model.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data, target)


def described(model: Servable) -> list[str]:
    """Lines of Markdown: what goes in and out, and how pictures become inputs."""
    steps = model.report.preprocessing
    return [
        *(f"- input `{in_markdown(str(tensor))}`" for tensor in model.inputs),
        *(f"- output `{in_markdown(str(tensor))}`" for tensor in model.outputs),
        "",
        f"Preprocessing, to be done by the client: {steps.describe() if steps else 'unknown; send ready inputs.'}",
    ]
