"""A model that is a folder: its ONNX file, and the files beside it that a compressed model needs as well.

    onnxruntime-genai       genai_config.json names the ONNX file
    optimum-onnx            model.onnx or onnx/model.onnx, config.json, tokenizer.json
    sentence-transformers   likewise, with modules.json and a folder for each further module
    rsi-deploy              a bundle: model.onnx

The files beside the model keep their names and bytes in a bundle. The bundle's model is always `model.onnx` in the
folder itself, where these libraries look for it too; only genai_config.json gets that name where it holds another.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.units import size_text
from rsi_deploy.io.bundle import is_ours
from rsi_deploy.io.documents import DOCUMENT_BYTES, read_document
from rsi_deploy.io.system_files import is_system_file

MODEL = "model.onnx"
GENAI = "genai_config.json"
TOKENIZER = "tokenizer.json"
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
Model = TypeVar("Model")


def find_model(folder: Path) -> Path:
    """Return the ONNX file of a model's folder: the one that its configuration names, `model.onnx`, or the only one.

    Raises:
        UsageError: There is no ONNX file, or several may be meant; the message says what to type.
    """
    if (folder / GENAI).is_file():
        named = _file_of_config(folder)
        if named is not None:
            return named
    found = [path for path in (folder / MODEL, folder / "onnx" / MODEL) if path.is_file()]
    if not found:
        found = sorted(path for path in (*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")) if _is_data(path, folder))
    if len(found) == 1:
        return found[0]
    if not found:
        raise _without_model(folder)
    names = ", ".join(path.relative_to(folder).as_posix() for path in found)
    raise UsageError(
        f"{folder} holds several ONNX files, and no configuration names one: {names}",
        hint=f"type the file, such as {found[0]} (nothing else goes into the bundle then), or move the others away",
    )


def model_file(model: Model) -> Model | str:
    """Return the ONNX file of a MODEL that is a folder; any other MODEL unchanged.

    Raises:
        UsageError: As `find_model`.
    """
    return str(find_model(Path(model))) if isinstance(model, str) and model and Path(model).is_dir() else model


def folder_of(model: object) -> Path | None:
    """Return the folder that a MODEL is, or that its ONNX file lies in; None for other models."""
    if not isinstance(model, str | Path):
        return None
    path = Path(model)
    if path.is_dir():
        return path
    if path.suffix not in (".onnx", ".ort") or not path.is_file():
        return None
    return path.parent.parent if path.parent.name == "onnx" else path.parent


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
            hint=f"type a folder that holds the model's files alone, or the ONNX file: {find_model(folder)}",
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


def _is_data(path: Path, folder: Path) -> bool:
    return path.is_file() and not is_system_file(path.relative_to(folder))


def _file_of_config(folder: Path) -> Path | None:
    """Return the decoder's file that genai_config.json names; None if it names none."""
    model = _json(folder / GENAI).get("model")
    parts = {key: part for key, part in model.items() if isinstance(part, dict)} if isinstance(model, dict) else {}
    named = {key: str(part["filename"]) for key, part in parts.items() if part.get("filename")}
    if len(named) > 1:
        raise UsageError(
            f"{folder}: {GENAI} names several models: {', '.join(f'{file} ({key})' for key, file in named.items())}",
            hint=f"type one of them, such as {folder / next(iter(named.values()))}; a bundle holds one model",
        )
    if not named:
        return None
    path = folder / next(iter(named.values()))
    if not path.is_file() or not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{folder}: {GENAI} names {next(iter(named.values()))!r}, which is no file in the folder",
            hint="copy the whole folder again, or type the ONNX file",
        )
    return path


def _copy_config(path: Path, target: Path) -> None:
    """Copy genai_config.json, with the bundle's model as the decoder's file."""
    found = _json(path)
    decoder = found.get("model", {}).get("decoder", {})
    if not isinstance(decoder, dict) or decoder.get("filename", MODEL) == MODEL:
        shutil.copyfile(path, target)
        return
    decoder["filename"] = MODEL
    target.write_text(json.dumps(found, indent=4, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _without_model(folder: Path) -> UsageError:
    """Return the error for a folder without an ONNX file."""
    config = read_config(folder)
    has_weights = any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*") if path.is_file())
    if not config or not has_weights:
        return UsageError(f"no ONNX file in {folder}", hint="type an .onnx file, or a folder that holds one")
    if is_decoder(folder):
        command = f"python -m onnxruntime_genai.models.builder -i {folder} -o ONNX_FOLDER -p fp32 -e cpu"
    else:
        command = f"optimum-cli export onnx --model {folder} ONNX_FOLDER"
    return UsageError(
        f"{folder} holds weights of transformers and no ONNX file",
        hint=f"make the ONNX folder with: {command}; then type that folder",
    )


def is_decoder(folder: Path) -> bool:
    """Return whether a folder's configuration is that of a decoder, which continues a text."""
    names = read_config(folder).get("architectures")
    causal = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names) if names else False
    return causal or (folder / GENAI).is_file()


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a configuration file of a folder; empty if there is none.

    Raises:
        ModelError: It is no JSON object.
    """
    return _json(folder / name) if (folder / name).is_file() else {}


def read_json(path: Path) -> Any:
    """Return a document of a folder.

    Raises:
        ModelError: It is no JSON.
    """
    try:
        with path.open("rb") as file:  # tokenizer_config.json has numbers that `read_document` refuses
            return json.loads(file.read(DOCUMENT_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", hint="copy the whole folder again") from error


def _json(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object", hint="copy the whole folder again")
    return found


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
