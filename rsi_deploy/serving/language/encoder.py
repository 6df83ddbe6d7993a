"""An encoder's texts in, its embeddings out, as sentence-transformers computes them from the same folder.

    texts --tokenizer.json--> token ids, mask --the model--> (texts, tokens, width) --pooling--> (texts, width)

The pooling is that of 1_Pooling/config.json (mean or cls; without the file, mean). Vectors get the length 1 if
modules.json names a Normalize module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.text_data import INPUTS, TextRows
from rsi_deploy.data.tokenizer import FolderTokenizer, Row
from rsi_deploy.io.folders.config import read_config, read_json
from rsi_deploy.runtime.feeds.caches import ID_INPUTS, MASK_INPUTS
from rsi_deploy.serving.protocol.signature import Outputs, Signature

Vectors = npt.NDArray[np.float32]
LONGEST = 512
"""Most tokens of a text where the folder does not say."""
_MODULES = {"Transformer", "Pooling", "Normalize"}
_POOLINGS = ("mean", "cls")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The tokenizer and the pooling of an encoder.

    Attributes:
        signature: inputs and outputs of the model.
        output: name of the output `(texts, tokens, width)`.
        tokenizer: tokenizer of the folder.
        ready: what `tokenizer.ready` returns.
        longest: most tokens of a text; longer ones are cut.
        pooling: "mean" over the tokens of a text, or "cls", the first one.
        normalize: whether vectors get the length 1.
    """

    signature: Signature
    output: str
    tokenizer: FolderTokenizer
    ready: Any
    longest: int
    pooling: str
    normalize: bool

    @classmethod
    def of_folder(cls, folder: Path, signature: Signature) -> "Encoder":
        """Read what belongs to the model of a folder.

        Raises:
            UsageError: the package tokenizers is not installed, or the tokenizer cannot be read.
            ModelError: the model's inputs or outputs are others, or sentence-transformers' modules are not known.
        """
        unknown = [spec.name for spec in signature.inputs if spec.name not in INPUTS]
        if unknown or not any(spec.name in ID_INPUTS for spec in signature.inputs):
            raise ModelError(
                f"{folder} takes {', '.join(spec.name for spec in signature.inputs)}; expected {', '.join(INPUTS)}",
                hint="embeddings need an encoder",
            )
        outputs = [spec.name for spec in signature.outputs if len(spec.shape) == 3 and spec.dtype.kind == "f"]
        if not outputs:
            raise ModelError(f"{folder} has no output (batch, tokens, width)", hint="export the encoder without a head")
        pooling, normalize = _modules(folder)
        tokenizer = FolderTokenizer.of_model(folder, "an input of /v1/embeddings")
        widths = [spec.shape[1] for spec in signature.inputs if isinstance(spec.shape[1], int)]
        longest = min([*widths, tokenizer.longest or LONGEST])
        return cls(
            signature=signature,
            output=outputs[0],
            tokenizer=tokenizer,
            ready=tokenizer.ready(longest),
            longest=longest,
            pooling=pooling,
            normalize=normalize,
        )

    @property
    def rows_at_once(self) -> int | None:
        """Most texts of a run: 1 if the model takes no mask or one row; None for no limit."""
        has_mask = any(spec.name in MASK_INPUTS for spec in self.signature.inputs)
        fixed = [spec.shape[0] for spec in self.signature.inputs if isinstance(spec.shape[0], int)]
        return min(fixed) if fixed else None if has_mask else 1

    def rows(self, texts: Sequence[str]) -> list[Row]:
        """Return the tokens of each text."""
        return list(self.tokenizer.rows(texts, self.longest, self.ready))

    def feeds(self, rows: Sequence[Row]) -> Feeds:
        """Return the inputs of the model, each `(texts, tokens)`, padded to the longest text."""
        fixed = [spec.shape[1] for spec in self.signature.inputs if isinstance(spec.shape[1], int)]
        whole = TextRows(
            rows=rows,
            documents=np.arange(len(rows)),
            width=fixed[0] if fixed else max(len(row.ids) for row in rows),
            pad=self.tokenizer.pad,
            names=tuple(spec.name for spec in self.signature.inputs),
            notes=(),
            most_tokens=None,
        )
        ((arrays, _),) = whole.batches(len(rows), None)
        return {spec.name: arrays[spec.name].astype(spec.dtype) for spec in self.signature.inputs}

    def vectors(self, rows: Sequence[Row], outputs: Outputs) -> Vectors:
        """Return the embeddings `(texts, width)`."""
        states = outputs[self.output].astype(np.float32)
        if self.pooling == "cls":
            found = states[:, 0]
        else:
            found = np.stack([state[: len(row.ids)].mean(axis=0) for state, row in zip(states, rows, strict=True)])
        if self.normalize:
            found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return found.astype(np.float32)


def _modules(folder: Path) -> tuple[str, bool]:
    """Return the pooling, and whether vectors get the length 1, as the files of sentence-transformers say."""
    if not (folder / "modules.json").is_file():
        return "mean", False
    modules = read_json(folder / "modules.json")
    try:
        kinds = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in modules}
    except (TypeError, KeyError):
        raise ModelError(f"{folder}/modules.json is no list of modules", hint="copy the whole folder again") from None
    if unknown := sorted(kinds.keys() - _MODULES):
        raise ModelError(
            f"{folder}/modules.json has the module {', '.join(unknown)}", hint="embeddings know pooling and Normalize"
        )
    if read_config(folder, "config_sentence_transformers.json").get("default_prompt_name"):
        raise ModelError(f"{folder} puts a prompt before each text", hint="remove default_prompt_name there")
    config = read_config(folder, f"{kinds.get('Pooling', '1_Pooling')}/config.json")
    older = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    named = [older.get(name, name) for name, value in config.items() if name.startswith("pooling_mode_") and value]
    newer = config.get("pooling_mode")
    modes = named if newer is None else newer if isinstance(newer, list) else [newer]
    if len(modes := modes or ["mean"]) != 1 or modes[0] not in _POOLINGS:
        raise ModelError(
            f"{folder} has the pooling {', '.join(map(str, modes))}", hint=f"embeddings know {' and '.join(_POOLINGS)}"
        )
    return str(modes[0]), "Normalize" in kinds
