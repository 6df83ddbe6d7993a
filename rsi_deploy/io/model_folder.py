"""A model that is a folder: its ONNX file, and the files beside it that a compressed model needs as well.

    onnxruntime-genai       genai_config.json names the ONNX file
    optimum-onnx            model.onnx or onnx/model.onnx, config.json, tokenizer.json
    sentence-transformers   likewise, with modules.json and a folder for each further module
    rsi-deploy              a bundle: model.onnx
    transformers            model.safetensors, config.json, tokenizer.json: converted first, into the cache folder

The files beside the model keep their names and bytes in a bundle. The bundle's model is always `model.onnx` in the
folder itself, where these libraries look for it too; only genai_config.json gets that name where it holds another.
"""

from pathlib import Path
from typing import TypeVar

from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.folders.config import GENAI, MODEL, read_config, read_object
from rsi_deploy.io.folders.conversion import onnx_folder
from rsi_deploy.io.system_files import is_system_file

Model = TypeVar("Model")


def find_model(folder: Path) -> Path:
    """Return the ONNX file of a model's folder: the one that its configuration names, `model.onnx`, or the only one.

    A folder of transformers is converted first.

    Raises:
        UsageError: There is no ONNX file, or several may be meant; the message says what to type.
        ModelError: A folder of transformers cannot be converted.
    """
    folder = onnx_folder(folder)
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
        UsageError, ModelError: As `find_model`.
    """
    return str(find_model(Path(model))) if isinstance(model, str) and model and Path(model).is_dir() else model


def folder_of(model: object) -> Path | None:
    """Return the ONNX folder that a MODEL is, becomes or lies in; None for other models.

    Raises:
        UsageError, ModelError: A folder of transformers cannot be converted.
    """
    if not isinstance(model, str | Path):
        return None
    path = Path(model)
    if path.is_dir():
        return onnx_folder(path)
    if path.suffix not in (".onnx", ".ort") or not path.is_file():
        return None
    return path.parent.parent if path.parent.name == "onnx" else path.parent


def _is_data(path: Path, folder: Path) -> bool:
    return path.is_file() and not is_system_file(path.relative_to(folder))


def _file_of_config(folder: Path) -> Path | None:
    """Return the decoder's file that genai_config.json names; None if it names none."""
    model = read_object(folder / GENAI).get("model")
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


def _without_model(folder: Path) -> UsageError:
    """Return the error for a folder without an ONNX file."""
    config = read_config(folder)
    if not config:
        return UsageError(f"no ONNX file in {folder}", hint="type an .onnx file, or a folder that holds one")
    if not any(folder.glob("*.bin")):
        return UsageError(
            f"{folder} holds a configuration, but neither an ONNX file nor model.safetensors",
            hint="copy the whole folder again, with its weights",
        )
    return UsageError(
        f"{folder} holds weights as pickles (.bin), and no ONNX file",
        hint=f"make the ONNX folder with: optimum-cli export onnx --model {folder} ONNX_FOLDER; then type that folder",
    )
