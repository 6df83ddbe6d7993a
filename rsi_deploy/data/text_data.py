"""Text as unlabelled data: the tokenizer of the model's folder makes the model's inputs of it.

    model       a row                                              rows of a document
    encoder     a text, cut at the sequence length and padded      one for each of its texts
    decoder     a window of as many tokens                         its windows; short neighbours count as one document

A row knows its document, so that calibration puts whole documents into the fit part or the check part.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array
from rsi_deploy.data.dataset import Batch, Dataset, Kind, Labels, Steps, checked_columns, row_batches
from rsi_deploy.data.text_files import COLUMN, SUFFIXES, Document, Texts, is_table, read_texts, text_columns
from rsi_deploy.data.tokenizer import FolderTokenizer, Row
from rsi_deploy.io.folders.config import TOKENIZER
from rsi_deploy.io.manifest import fingerprint
from rsi_deploy.io.model_folder import folder_of
from rsi_deploy.runtime.feeds.caches import ID_INPUTS, MASK_INPUTS, POSITION_INPUTS, Caches, is_cache
from rsi_deploy.runtime.feeds.inputs import InputSpec, list_specs

TYPE_INPUTS = ("token_type_ids", "segment_ids", "input_type_ids")
BATCH_TOKENS = 1024
"""Tokens of a decoder in a batch for fitting: its outputs have a score of every known token for each of them."""
INPUTS = (*ID_INPUTS, *MASK_INPUTS, *TYPE_INPUTS, *POSITION_INPUTS)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How text becomes rows.

    Attributes:
        column: field or column with the text; None is "text".
        sequence_length: most tokens of a row; None is the model's own.
        tokens: most tokens that factors are fitted to; None for no limit.
    """

    column: str | None = None
    sequence_length: int | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, settings: Any) -> "TextOptions":
        """Return the options among the settings of a verb."""
        return cls(
            column=settings.column,
            sequence_length=settings.sequence_length,
            tokens=getattr(settings, "calib_tokens", None),
        )


def with_text(source: Any, options: TextOptions, model: object, folder: Path | None = None) -> Any:
    """Return a source of data, opened if it is text, else as it is.

    Args:
        source: path or name of data, an object in memory, or None.
        options: how text becomes rows.
        model: MODEL of the command line.
        folder: folder of the model that MODEL is a copy of; None if MODEL is the user's.

    Raises:
        UsageError: As `FolderTokenizer.of_model` and `read_texts`.
    """
    if not is_text(source, options, folder or folder_of(model)):
        return source
    path = Path(source)
    tokenizer = FolderTokenizer.of_model(model, str(path), folder)
    return TextSource(path, read_texts(path, options.column or COLUMN), tokenizer, options)


def data_fingerprint(source: object) -> str:
    """Return a hash that changes when data change; "" for data that have none (see `rsi_deploy.io.manifest`)."""
    return source.fingerprint() if isinstance(source, TextSource) else fingerprint(source)


def is_text(source: object, options: TextOptions, folder: Path | None) -> bool:
    """Return whether a source is an existing file of text, for a model in `folder`.

    A table is text if a column was chosen, or if the model has a tokenizer and the table a column `text`.
    """
    if not isinstance(source, str | Path):
        return False
    path = Path(source)
    if path.suffix in SUFFIXES or not is_table(path):
        return path.suffix in SUFFIXES and path.is_file()
    if options.column is not None:
        return True
    return folder is not None and (folder / TOKENIZER).is_file() and COLUMN in text_columns(path)


class TextSource:
    """Text that becomes rows once the inputs of the model are known; see `for_inputs`."""

    labels: Labels | None = None
    classes: tuple[str, ...] = ()
    default = ""
    kind: Kind = "named"

    def __init__(self, path: Path, texts: Texts, tokenizer: FolderTokenizer, options: TextOptions):
        self._path, self._texts, self._tokenizer, self._options = path, texts, tokenizer, options
        self._known: dict[tuple[InputSpec, ...], TextRows] = {}

    def for_inputs(self, specs: Sequence[InputSpec]) -> Dataset:
        """See `dataset.for_inputs`.

        Raises:
            UsageError: The model has inputs that are not made of text, or the text is too short.
        """
        if tuple(specs) not in self._known:
            self._known[tuple(specs)] = self._rows(specs)
        return self._known[tuple(specs)]

    def fingerprint(self) -> str:
        """Return a hash of the text, the tokenizer and the options."""
        digest = hashlib.sha256(f"{self._options}\0{self._tokenizer.document}".encode())
        for document in self._texts.documents:
            digest.update(repr(document).encode())
        return digest.hexdigest()

    def _rows(self, specs: Sequence[InputSpec]) -> "TextRows":
        names, caches = [spec.name for spec in specs], Caches.of(specs)
        ids = next((spec for spec in specs if spec.name in ID_INPUTS), None)
        unknown = [] if caches else [spec for spec in specs if spec.name not in INPUTS]
        if ids is None or unknown or len(ids.shape) != 2:
            problem = f"also takes {_few(unknown)}" if unknown else f"has the inputs {', '.join(names)}"
            known = "caches past_key_values.N.key and .value (batch, heads, past, width)"
            raise UsageError(
                f"data: {self._path} is text, which gives input_ids, attention_mask, token_type_ids, position_ids"
                f"{f' and {known}' if any(is_cache(name) for name in names) else ''}, but the model {problem}",
                hint="give an .npz with one array for each input, caches too, as --calib and --feeds",
            )
        fixed = ids.shape[1] if isinstance(ids.shape[1], int) else None
        length = self._tokenizer.length(fixed, self._options.sequence_length)
        has_mask = any(name in MASK_INPUTS for name in names)
        is_decoder = self._tokenizer.is_decoder or caches is not None
        make = _windows if is_decoder else _rows_of_texts
        rows, documents, notes = make(self._texts.documents, self._tokenizer, length)
        if not is_decoder and not has_mask:
            rows, documents, notes = _without_short(rows, documents, notes, length)
        if not rows:
            raise UsageError(
                f"data: {self._path} is shorter than {length} tokens, the length of a row: {'; '.join(notes)}",
                hint="give more text, or type a smaller --sequence-length",
            )
        if not self._texts.is_whole:
            notes.append("its first 64 MB were read")
        width = length if fixed is not None or not has_mask else max(len(row.ids) for row in rows)
        about = f"{self._path.name}: {len(rows):,} rows of at most {length} tokens, {len(set(documents)):,} documents"
        return TextRows(
            rows=rows,
            documents=np.asarray(documents, np.int64),
            width=width,
            pad=self._tokenizer.pad,
            names=tuple(names),
            caches=caches,
            most_rows=max(1, BATCH_TOKENS // length) if is_decoder else None,
            notes=("; ".join([about, *notes]),),
            most_tokens=self._options.tokens,
            is_decoder=self._tokenizer.is_decoder,
        )


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """Rows of tokens as inputs of a model.

    Attributes:
        rows: tokens of each row.
        documents: number of each row's document, ascending, `(N,)`.
        width: number of tokens of a padded row.
        pad: token id of padding.
        names: inputs of the model.
        caches: its caches, which are fed empty; None without any.
        most_rows: most rows of a batch for fitting; None for no limit.
        notes: notes for the report.
        most_tokens: most tokens that factors are fitted to; None for no limit.
        is_decoder: whether the model continues texts, and rows are windows.
    """

    rows: Sequence[Row]
    documents: Labels
    width: int
    pad: int
    names: tuple[str, ...]
    notes: tuple[str, ...]
    most_tokens: int | None
    is_decoder: bool = False
    caches: Caches | None = None
    most_rows: int | None = None
    labels: Labels | None = None
    classes: tuple[str, ...] = ()
    default: str = ""
    kind: Kind = "named"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return self.names

    @property
    def ids(self) -> str:
        """Name of the input with the token ids."""
        return next(name for name in self.names if name in ID_INPUTS)

    @property
    def tokens(self) -> Labels:
        """Number of tokens of each row, without padding, `(N,)`."""
        return np.asarray([len(row.ids) for row in self.rows], np.int64)

    def select(self, names: Sequence[str]) -> "TextRows":
        """See `Dataset.select`."""
        checked_columns(names, self.names, "the text")
        return self

    def fingerprint(self) -> str:
        """Return the sha256 of all tokens."""
        digest = hashlib.sha256(f"{self.width} {self.pad} {sorted(self.names)}".encode())
        for row in self.rows:
            digest.update(f"{len(row.ids)} ".encode() + row.ids.tobytes() + row.types.tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`."""
        for chosen in row_batches(len(self), batch_size, limit):
            rows = [self.rows[number] for number in chosen]
            yield {name: self._input(name, rows) for name in self.names}, None

    def _input(self, name: str, rows: Sequence[Row]) -> Array:
        """Return one input `(n, width)`, int64; a cache as `(n, ...)` in its own type."""
        if self.caches is not None and (empty := self.caches.empty_rows(name, len(rows))) is not None:
            return empty
        if name in POSITION_INPUTS:
            return np.tile(np.arange(self.width, dtype=np.int64), (len(rows), 1))
        values = np.full((len(rows), self.width), self.pad if name in ID_INPUTS else 0, np.int64)
        for row, (ids, types, _) in zip(values, rows, strict=True):
            row[: len(ids)] = ids if name in ID_INPUTS else 1 if name in MASK_INPUTS else types
        return values


Made = tuple[list[Row], list[int], list[str]]
"""Rows, the document of each, and notes."""


def _rows_of_texts(documents: Sequence[Document], tokenizer: FolderTokenizer, length: int) -> Made:
    """Make a row of every text."""
    texts = [text for document in documents for text in document]
    rows = list(tokenizer.rows(texts, length))
    numbers = [number for number, document in enumerate(documents) for _ in document]
    cut = sum(row.is_cut for row in rows)
    return rows, numbers, [f"{cut:,} texts are longer, and cut"] if cut else []


def _without_short(rows: Sequence[Row], documents: Sequence[int], notes: Sequence[str], length: int) -> Made:
    """Leave out the rows that would need padding, for a model that takes no attention mask."""
    kept = [(row, document) for row, document in zip(rows, documents, strict=True) if len(row.ids) == length]
    more = f"{len(rows) - len(kept):,} texts are shorter, and left out: the model takes no attention mask"
    return [row for row, _ in kept], [document for _, document in kept], [*notes, more]


def _windows(documents: Sequence[Document], tokenizer: FolderTokenizer, length: int) -> Made:
    """Make windows that overlap in no token; a document that is shorter than a window is joined with the next ones."""
    windows: list[Row] = []
    numbers: list[int] = []
    group: list[Row] = []
    count = waiting = left = 0
    for row in tokenizer.rows(["\n".join(document) for document in documents], None):
        group.append(row)
        waiting += len(row.ids)
        if waiting < length:
            continue
        ids, types = (np.concatenate(parts) for parts in list(zip(*group, strict=True))[:2])
        whole = len(ids) // length
        windows += [
            Row(ids[start : start + length], types[start : start + length], False)
            for start in range(0, whole * length, length)
        ]
        numbers += [count] * whole
        left += len(ids) - whole * length
        count, waiting, group = count + 1, 0, []
    left += waiting
    return windows, numbers, [f"{left:,} tokens at the ends of documents fill no window"] if left else []


def _few(specs: Sequence[InputSpec]) -> str:
    return f"{list_specs(specs[:2])}{f' and {len(specs) - 2} more' * (len(specs) > 2)}"
