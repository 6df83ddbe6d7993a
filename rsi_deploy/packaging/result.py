"""The result of `package`, and what several targets write."""

import shutil
from pathlib import Path
from typing import Literal

import pydantic

from rsi_deploy.core.text import in_markdown
from rsi_deploy.io.onnx_file import external_files
from rsi_deploy.packaging.servable import Servable

Target = Literal["ort", "triton", "kserve", "ray-serve"]


class PackageResult(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A written package.

    Attributes:
        target: the engine.
        name: name of the model in the engine.
        folder: folder of the package.
        files: names in the folder, sorted; each is in its manifest.
        batched: whether several requests may share a run; None for "ort".
        notes: what a reader must know.
    """

    target: Target
    name: str
    folder: str
    files: tuple[str, ...]
    batched: bool | None
    notes: tuple[str, ...]


def copy_model(model: Path, folder: Path) -> None:
    """Copy a model to `folder/model.onnx`, and its external weights under their names."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, folder / "model.onnx")
    for data in external_files(model):
        target = folder / data.relative_to(model.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data, target)


def tensor_lines(model: Servable) -> list[str]:
    """Return the inputs, outputs and preprocessing of a model as lines of Markdown."""
    steps = model.facts.preprocessing
    return [
        *(f"- input `{in_markdown(str(tensor))}`" for tensor in model.inputs),
        *(f"- output `{in_markdown(str(tensor))}`" for tensor in model.outputs),
        "",
        f"Preprocessing by the client: {steps.describe() if steps else 'unknown; send ready inputs.'}",
    ]
