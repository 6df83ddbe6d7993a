"""The configuration files of a model's folder."""

import json
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.documents import DOCUMENT_BYTES

MODEL = "model.onnx"
GENAI = "genai_config.json"
TOKENIZER = "tokenizer.json"


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a configuration file of a folder; empty if there is none.

    Raises:
        ModelError: It is no JSON object.
    """
    return read_object(folder / name) if (folder / name).is_file() else {}


def is_decoder(folder: Path) -> bool:
    """Return whether a folder's configuration is that of a decoder, which continues a text."""
    names = read_config(folder).get("architectures")
    causal = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names) if names else False
    return causal or (folder / GENAI).is_file()


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


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        ModelError: It holds none.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object", hint="copy the whole folder again")
    return found
