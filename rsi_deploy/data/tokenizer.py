"""The tokenizer of a model's folder (`tokenizer.json`), and what the folder says of the texts that the model takes.

Needs the package tokenizers (`rsi-deploy[text]`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.documents import read_document
from rsi_deploy.io.folders.config import TOKENIZER, is_decoder, read_config
from rsi_deploy.io.model_folder import find_model, folder_of
from rsi_deploy.runtime.feeds.caches import ID_INPUTS

if TYPE_CHECKING:
    from onnx import ModelProto

DEFAULT_LENGTH = {False: 128, True: 1024}
"""Whether the model is a decoder -> largest default number of tokens of a row."""
CHUNK = 256
"""Texts that are tokenized at once."""
_PASS_ON = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Clip", "Transpose", "DequantizeLinear"}

Tokens = npt.NDArray[np.int32]


class Row(NamedTuple):
    """A tokenized text.

    Attributes:
        ids: token ids, `(tokens,)`.
        types: numbers of the segments, `(tokens,)`.
        is_cut: whether the text is longer.
    """

    ids: Tokens
    types: Tokens
    is_cut: bool


@dataclass(frozen=True, kw_only=True)
class FolderTokenizer:
    """The tokenizer of a folder.

    Attributes:
        folder: the model's folder.
        document: content of tokenizer.json.
        pad: token id of padding.
        is_decoder: whether the model continues texts.
        longest: most tokens of a text that the model takes; None where the folder does not say.
    """

    folder: Path
    document: str
    pad: int
    is_decoder: bool
    longest: int | None

    @classmethod
    def of_model(cls, model: object, data: str, folder: Path | None = None) -> "FolderTokenizer":
        """Return the tokenizer of a MODEL.

        Args:
            model: MODEL, a folder or an ONNX file in one.
            data: name of the text, for messages.
            folder: folder of the model that MODEL is a copy of; None if MODEL is the user's.

        Raises:
            UsageError: MODEL has no folder or no tokenizer, the tokenizer cannot be read, or it has more tokens than
                the model's embedding table.
        """
        place = folder or folder_of(model)
        if place is None or not (place / TOKENIZER).is_file():
            where = f"{model} is no folder" if place is None else f"{place} has no {TOKENIZER}"
            raise UsageError(
                f"data: {data} is text, which needs the tokenizer of the model's folder, but {where}",
                hint=f"type a MODEL that is a folder with {TOKENIZER} (of transformers: "
                "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)), or give arrays (.npz) for the inputs",
            )
        document = read_document(place / TOKENIZER)
        found = load_tokenizer(document, place)
        path = find_model(Path(str(model))) if Path(str(model)).is_dir() else Path(str(model))
        from rsi_deploy.io.onnx_reader import read_proto  # loads onnx

        rows = None if path.suffix != ".onnx" else embedding_rows(read_proto(path))
        rows = read_config(place).get("vocab_size") if rows is None else rows
        if isinstance(rows, int) and (known := found.get_vocab_size()) > rows:
            raise UsageError(
                f"data: the tokenizer of {place} has {known:,} tokens, but the model's embedding table has "
                f"{rows:,} rows: it is the tokenizer of another model",
                hint=f"put the model's own {TOKENIZER} there",
            )
        decoder = is_decoder(place)
        return cls(folder=place, document=document, pad=_pad(found), is_decoder=decoder, longest=_longest(place, found))

    def length(self, fixed: int | None, chosen: int | None) -> int:
        """Return the number of tokens of a row.

        Args:
            fixed: number that the model's inputs have; None if it is open.
            chosen: value of `--sequence-length`; None for the default.

        Raises:
            UsageError: The chosen number is another one than the fixed one, or more than the model takes.
        """
        if fixed is not None and chosen not in (None, fixed):
            raise UsageError(
                f"--sequence-length {chosen}: the model takes {fixed} tokens", hint=f"type --sequence-length {fixed}"
            )
        if fixed is not None:
            return fixed
        if chosen is not None and self.longest is not None and chosen > self.longest:
            raise UsageError(
                f"--sequence-length {chosen}: the model takes at most {self.longest} tokens, as its folder says",
                hint=f"type --sequence-length {self.longest} or less",
            )
        default = DEFAULT_LENGTH[self.is_decoder]
        return chosen or min(default, self.longest or default)

    def ready(self, most: int | None) -> Any:
        """Return the `tokenizers.Tokenizer`, which cuts texts at `most` tokens; None cuts none."""
        tokenizer = load_tokenizer(self.document, self.folder)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if most is not None:
            tokenizer.enable_truncation(most)
        return tokenizer

    def rows(self, texts: Sequence[str], most: int | None, ready: Any = None) -> Iterator[Row]:
        """Yield the tokens of every text, the tokenizer's special ones among them.

        Args:
            texts: texts.
            most: most tokens of a text, the rest of which is cut off; None cuts none.
            ready: result of `ready(most)`, to use it again.

        Raises:
            UsageError: The tokenizer fails.
        """
        tokenizer = self.ready(most) if ready is None else ready
        for start in range(0, len(texts), CHUNK):
            try:
                found = tokenizer.encode_batch(list(texts[start : start + CHUNK]))
            except Exception as error:  # of a library in Rust, without a type of its own
                raise UsageError(
                    f"data: the tokenizer of {self.folder} fails: {error}", hint=f"put a working {TOKENIZER} there"
                ) from error
            for row in found:
                yield Row(np.asarray(row.ids, np.int32), np.asarray(row.type_ids, np.int32), bool(row.overflowing))


def embedding_rows(proto: "ModelProto") -> int | None:
    """Return the number of rows of the table that the token ids choose from; None if no node chooses by them.

    Args:
        proto: model; its weights are not read.
    """
    sizes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    ids = set(ID_INPUTS)
    for node in proto.graph.node:
        first = node.input[0] if node.input else ""
        if node.op_type in _PASS_ON and first in sizes:
            turned = node.op_type == "Transpose"  # a tied table: the weight of the head
            sizes[node.output[0]] = sizes[first][::-1] if turned else sizes[first]
        elif node.op_type in _PASS_ON and first in ids:
            ids.add(node.output[0])
        elif node.op_type in ("Gather", "GatherBlockQuantized") and node.input[1] in ids and first in sizes:
            return int(sizes[first][0])
    return None


def load_tokenizer(document: str, folder: Path) -> Any:
    """Return the `tokenizers.Tokenizer` in the text of a tokenizer.json.

    Raises:
        UsageError: The package tokenizers is not installed, or does not read it.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError(
            "data: text needs the package tokenizers", hint="type: pip install 'rsi-deploy[text]'"
        ) from error
    try:
        return Tokenizer.from_str(document)
    except Exception as error:  # of a library in Rust, without a type of its own
        raise UsageError(
            f"data: {folder / TOKENIZER} cannot be read: {error}",
            hint="copy it again, or install the version of tokenizers that wrote it",
        ) from error


def _pad(tokenizer: Any) -> int:
    """Return the token id of padding; 0 where the tokenizer names none, for the mask hides it."""
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    known = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"))
    return next((int(found) for found in known if found is not None), 0)


def _longest(folder: Path, tokenizer: Any) -> int | None:
    """Return the smallest limit on the length of a text that the folder's files name."""
    config = read_config(folder)
    limits = [
        config.get("max_position_embeddings"),
        config.get("n_positions"),
        read_config(folder, "sentence_bert_config.json").get("max_seq_length"),
        read_config(folder, "tokenizer_config.json").get("model_max_length"),
    ]
    genai = read_config(folder, "genai_config.json").get("model")
    limits += [genai.get("context_length")] if isinstance(genai, dict) else []
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 1 < limit < 1 << 24]
    return min(known, default=None)
