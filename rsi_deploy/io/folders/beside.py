"""The files that lie beside a model, and go along into a bundle."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.units import size_text
from rsi_deploy.io.bundle import is_ours
from rsi_deploy.io.documents import read_document
from rsi_deploy.io.folders.config import GENAI, MODEL, read_object
from rsi_deploy.io.system_files import is_system_file

WRITTEN = {
    *(MODEL, f"{MODEL}.data", "dense.onnx", "dense.onnx.data"),
    *("report.json", "report.html", "plan.json", "recipe.toml", "README.md", "manifest.json"),
}
"""Names of the files that an export writes into a bundle."""
SOURCE_CARD = "README.source.md"
"""Name in the bundle of the model card that the folder had."""
WEIGHTS = {
    *(".onnx", ".data", ".onnx_data", ".ort", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"),
    *(".ot", ".gguf", ".tflite", ".xml", ".npz"),
}
"""Suffixes of weights, and of graphs that name them."""
MOST_BYTES = 1 << 30
"""Most bytes of the files that go along."""


def copy_beside(folder: Path, target: Path) -> list[str]:
    """Copy the files that lie beside a folder's model into a bundle, and return notes for the report.

    Args:
        folder: the model's folder.
        target: the bundle's folder, which is being made.

    Raises:
        UsageError: A file is a link that leaves the folder, or the files are too large to be a model's.
    """
    names = list(files_beside(folder))
    if (size := sum((folder / name).stat().st_size for name in names)) > MOST_BYTES:
        raise UsageError(
            f"{folder} holds {size_text(size)} beside its model, but at most {size_text(MOST_BYTES)} go into a bundle",
            hint="type a folder that holds the model's files alone, or the ONNX file",
        )
    kept = [name for name in names if name not in WRITTEN or name == "README.md"]
    for name in kept:
        path = target / (SOURCE_CARD if name == "README.md" else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == GENAI:
            _copy_config(folder / name, path)
        else:
            shutil.copyfile(folder / name, path)
    notes = [f"{_listed(kept)} of {folder.resolve().name} went along"] if kept else []
    if left := [name for name in names if name not in kept]:
        notes.append(f"{_listed(left)} of {folder.resolve().name} stayed behind: the bundle has files of that name")
    return notes


def files_beside(folder: Path) -> Iterator[str]:
    """Yield the names of the files beside a folder's model: all but weights, hidden files, and what rsi-deploy wrote.

    Weights of the modules that modules.json names (a dense layer of sentence-transformers) are among them.

    Raises:
        UsageError: A file is a link that leaves the folder.
    """
    modules, is_bundle = _module_folders(folder), is_ours(folder)
    within = [folder]
    while within:
        here = within.pop()
        for path in sorted(here.iterdir()):
            name = path.relative_to(folder)
            if is_system_file(name):
                continue
            if path.is_dir():
                within += [] if path.is_symlink() or is_ours(path) else [path]
                continue
            is_weight = path.suffix in WEIGHTS or path.name.endswith(".index.json")
            is_own = is_bundle and here == folder and path.name in WRITTEN
            if path.is_file() and not is_own and (not is_weight or name.parts[0] in modules):
                _refuse_foreign_link(path, folder)
                yield name.as_posix()


def _copy_config(path: Path, target: Path) -> None:
    """Copy genai_config.json, with the bundle's model as the decoder's file."""
    found = read_object(path)
    decoder = found.get("model", {}).get("decoder", {})
    if not isinstance(decoder, dict) or decoder.get("filename", MODEL) == MODEL:
        shutil.copyfile(path, target)
        return
    decoder["filename"] = MODEL
    target.write_text(json.dumps(found, indent=4, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _module_folders(folder: Path) -> set[str]:
    """Return the subfolders that modules.json of sentence-transformers names."""
    try:
        modules = json.loads(read_document(folder / "modules.json"))
        return {str(module["path"]).split("/")[0] for module in modules if module["path"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()


def _refuse_foreign_link(path: Path, folder: Path) -> None:
    """Refuse a link that leaves the folder, except into the blobs of Hugging Face's cache."""
    target, allowed = path.resolve(), [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parents[1] / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise UsageError(f"{path} is a link to a file outside of {folder}", hint="copy the file into the folder")


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more files' * (len(names) > 4)}"
