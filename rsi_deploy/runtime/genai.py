"""A model of onnxruntime-genai: what genai_config.json of its folder says, and its loading.

Needs the package onnxruntime-genai (`rsi-deploy[genai]`), which is imported when a model is loaded.
"""

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.folders.config import GENAI, TOKENIZER, read_config
from rsi_deploy.io.folders.conversion import onnx_folder
from rsi_deploy.io.model_folder import find_model
from rsi_deploy.io.onnx_reader import check_file

PACKAGE = "onnxruntime-genai"


@dataclass(frozen=True, kw_only=True)
class GenaiFolder:
    """The folder of a model of onnxruntime-genai.

    Attributes:
        path: the folder.
        file: its ONNX file.
        vocabulary: number of token ids.
        longest: most tokens of a prompt and what is generated; None where the folder does not say.
        special: token ids that are no text.
        provider: full name of the execution provider that the folder names first.
        session: session options that the folder sets.
    """

    path: Path
    file: Path
    vocabulary: int
    longest: int | None
    special: frozenset[int]
    provider: str
    session: dict[str, str]

    @classmethod
    def read(cls, text: str) -> "GenaiFolder":
        """Read a folder's configuration.

        Raises:
            UsageError: It is no folder of onnxruntime-genai.
            ModelError: The configuration has no vocabulary, or is no JSON object.
        """
        path = onnx_folder(Path(text))
        if not (path / GENAI).is_file():
            raise UsageError(
                f"{text} is no folder of onnxruntime-genai: it has no {GENAI}",
                hint="type a folder of onnxruntime-genai's builder, or a decoder's of transformers (safetensors)",
            )
        model = _object(read_config(path, GENAI).get("model"))
        session = _object(_object(model.get("decoder")).get("session_options"))
        vocabulary, longest = model.get("vocab_size"), model.get("context_length")
        if not isinstance(vocabulary, int) or vocabulary < 1:
            raise ModelError(f"{path / GENAI} has no vocab_size in its model", hint="make the folder again")
        providers = session.get("provider_options") or [{}]
        first = next(iter(_object(providers[0] if isinstance(providers, list) else None)), "CPU")
        return cls(
            path=path,
            file=find_model(path),
            vocabulary=vocabulary,
            longest=longest if isinstance(longest, int) else None,
            special=frozenset(_special(path, model)),
            provider=first if first.endswith("ExecutionProvider") else f"{first}ExecutionProvider",
            session={name: str(value) for name, value in session.items() if name not in ("log_id", "provider_options")},
        )

    def load(self, threads: int | None = None, *, spin_between_runs: bool = True) -> Any:
        """Load the model.

        Args:
            threads: threads inside one operator, in place of the folder's; None keeps those.
            spin_between_runs: whether idle threads spin after a run; False where several processes share the cores.

        Returns:
            An `onnxruntime_genai.Model`.

        Raises:
            UsageError: onnxruntime-genai is not installed.
            ModelError: It does not read the model; the message has its words.
        """
        genai = genai_library()
        check_file(self.file)
        options: dict[str, Any] = {} if threads is None else {"intra_op_num_threads": threads}
        options |= {} if spin_between_runs else {"session.force_spinning_stop": "1"}
        try:
            config = genai.Config(str(self.path))
            if options:
                config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            return genai.Model(config)
        except Exception as error:  # of a library in C++, without a type of its own
            raise ModelError(
                f"{self.path}: {PACKAGE} {genai_version()} does not read the model: {error}",
                hint=f"make the folder again with this version, or install the version of {PACKAGE} that made it",
            ) from error


def genai_library() -> Any:
    """Return the module onnxruntime_genai.

    Raises:
        UsageError: It is not installed, or cannot be imported.
    """
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise UsageError(
            f"generation needs the package {PACKAGE}: {error}", hint="type: pip install 'rsi-deploy[genai]'"
        ) from error
    if hasattr(onnxruntime_genai, "disable_telemetry_events"):
        onnxruntime_genai.disable_telemetry_events()  # rsi_deploy/__init__.py did so by a variable that it reads
    return onnxruntime_genai


def genai_version() -> str:
    """Return the version of the installed onnxruntime-genai."""
    return importlib.metadata.version(PACKAGE)


def _special(path: Path, model: dict[str, Any]) -> list[int]:
    """Return the ids of tokens that begin, end or fill a text, and of those that the tokenizer calls special."""
    named = [model.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")]
    tokens = read_config(path, TOKENIZER).get("added_tokens")
    named += [_object(token).get("id") for token in tokens if _object(token).get("special")] if tokens else []
    flat = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return [one for one in flat if isinstance(one, int)]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
