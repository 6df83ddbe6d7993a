"""The folder of a model of transformers: config.json and safetensors, and what in it cannot become one ONNX model."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.folders.config import GENAI, is_decoder, read_config

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
"""Files that hold a tokenizer."""


def is_transformers(folder: Path) -> bool:
    """Return whether a folder has a configuration and safetensors, and no ONNX file."""
    if not (folder / CONFIG).is_file() or (folder / GENAI).is_file():
        return False
    has_weights = (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))
    return has_weights and not any((*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")))


def check_transformers(folder: Path) -> None:
    """Refuse a folder that cannot become one ONNX model here, before any work.

    Raises:
        UsageError: A shard, the tokenizer or a package is missing, or the model is one that is not taken.
        ModelError: The configuration or the weights' index cannot be read.
    """
    config = read_config(folder)
    missing = [name for name in weight_files(folder) if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 4} more" * (len(missing) > 4)
        raise UsageError(
            f"{folder} lacks weights: {', '.join(missing[:4])}{more}", hint="copy these files into it, or copy it again"
        )
    names = config.get("architectures") or []
    named = ", ".join(map(str, names)) or "no architecture"
    if config.get("quantization_config"):
        raise UsageError(
            f"{folder} holds quantized weights, but ranks are chosen on weights in floating point",
            hint="type the folder of the model before it was quantized",
        )
    if config.get("is_encoder_decoder") or any("ForConditionalGeneration" in str(name) for name in names):
        raise UsageError(
            f"{folder} ({named}) becomes several ONNX models, but a bundle holds one",
            hint=f"make them with: {_optimum(folder)}; then type one of these files",
        )
    _check_packages(folder)
    if config.get("auto_map") and not _is_known(config.get("model_type")):
        raise UsageError(
            f"{folder}: auto_map in config.json names code of its own for {named}, and such code is never run",
            hint=f"make the ONNX folder yourself, if you trust that code: {_optimum(folder)} --trust-remote-code",
        )
    if is_decoder(folder) and not any((folder / name).is_file() for name in TOKENIZERS):
        raise UsageError(
            f"{folder} has no tokenizer, which onnxruntime-genai's builder takes along",
            hint="put the model's tokenizer.json and tokenizer_config.json there "
            "(AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER))",
        )


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files of weights that transformers would read.

    Raises:
        ModelError: The index is no JSON object, or names files elsewhere.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    shards = read_config(folder, INDEX).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ModelError(f"{folder / INDEX} names no files of the folder", hint="copy the whole folder again")
    return names


def staged_files(folder: Path) -> Iterator[Path]:
    """Yield the files of the folder itself that conversion reads: weights, configurations, tokenizer; never code."""
    kinds = {".json", ".txt", ".model", ".jinja", ".bpe", ".tiktoken"}
    shards = set(weight_files(folder))
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.suffix in kinds or path.name in shards):
            yield path


def unsupported(folder: Path, reason: str) -> ModelError:
    """Return the error for a model that no converter takes.

    Args:
        folder: the user's folder.
        reason: the converter's own words.
    """
    return ModelError(
        f"{folder} cannot be made an ONNX model here: {reason}",
        hint=f"try: {_optimum(folder)}; then type that folder",
    )


def _optimum(folder: Path) -> str:
    return f"optimum-cli export onnx --model {folder} ONNX_FOLDER"


def _check_packages(folder: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UsageError(
            f"{folder} is a folder of transformers, which is not installed", hint='type: pip install "rsi-deploy[hf]"'
        )
    if is_decoder(folder) and importlib.util.find_spec("onnxruntime_genai") is None:
        raise UsageError(
            f"{folder} becomes an ONNX model through onnxruntime-genai, which is not installed",
            hint='type: pip install "rsi-deploy[hf,genai]"',
        )


def _is_known(kind: object) -> bool:
    """Return whether transformers itself has a model of this type, which it then prefers to the folder's code."""
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING
