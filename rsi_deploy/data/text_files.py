"""Read the documents of a text file.

FILE.txt        a line is a text. A document starts at a title of WikiText (` = Title = `); without titles at each blank
                line; without blank lines every line is one
FILE.jsonl      an object on each line is a document; one of its fields is the text
FILE.parquet    a row is a document; one of its columns is the text

At most the first 64 MB are read.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.arrow_files import SUFFIXES as TABLES
from rsi_deploy.data.arrow_files import ArrowTable, table_files

SUFFIXES = (".txt", ".jsonl")
COLUMN = "text"
MOST_BYTES = 64 << 20
"""Most bytes of text that are read."""
_TITLE = re.compile(r" = [^=\s].* = \s*")

Document = list[str]
"""The texts of a document, none of them blank."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The documents of a file.

    Attributes:
        documents: documents with their texts; at least one.
        is_whole: whether the whole file was read.
    """

    documents: list[Document]
    is_whole: bool


def read_texts(path: Path, column: str = COLUMN) -> Texts:
    """Read a text file.

    Args:
        path: file.
        column: field or column with the text of a record; has no meaning for a .txt file.

    Raises:
        UsageError: A record cannot be read (the message has its line), or there is no text.
    """
    reader = _Limited(path)
    if path.suffix == ".txt":
        documents = _of_lines([line for _, line in reader.lines()])
    elif path.suffix == ".jsonl":
        documents = [[_record(line, path, number, column)] for number, line in reader.lines() if line.strip()]
    else:
        documents = [[text] for text in reader.within(_cells(path, column))]
    documents = [texts for document in documents if (texts := [text for text in document if text.strip()])]
    if not documents:
        raise UsageError(f"data: {path} holds no text", hint="give a file with text in it")
    return Texts(documents=documents, is_whole=reader.is_whole)


def text_columns(path: Path) -> tuple[str, ...]:
    """Return the columns of a table that hold text; empty if there are columns of token ids already."""
    table = ArrowTable(table_files(path), str(path))
    return () if "input_ids" in table.columns else table.texts


def is_table(path: Path) -> bool:
    """Return whether a file is a table, whose columns may be text or something else."""
    return path.suffix in TABLES and path.is_file()


class _Limited:
    """A reader that stops after `MOST_BYTES`."""

    def __init__(self, path: Path) -> None:
        self._path, self._left, self.is_whole = path, MOST_BYTES, True

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield the lines without their ends, and their numbers from 1."""
        with self._path.open("rb") as file:
            number = 0
            while (content := file.readline(self._left + 1)) and self._takes(len(content)):
                number += 1
                try:
                    yield number, content.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise _unreadable(self._path, number, f"it is not UTF-8: {error.reason}") from error

    def within(self, texts: Iterator[str]) -> Iterator[str]:
        """Yield the texts that fit."""
        for text in texts:
            if not self._takes(len(text)):
                return
            yield text

    def _takes(self, size: int) -> bool:
        self._left -= size
        self.is_whole = self._left >= 0
        return self.is_whole


def _of_lines(lines: list[str]) -> list[Document]:
    """Part lines into documents; see the module's docstring."""
    has_titles = any(_TITLE.fullmatch(line) for line in lines)
    if not has_titles and all(line.strip() for line in lines):
        return [[line] for line in lines]
    documents: list[Document] = [[]]
    for line in lines:
        if _TITLE.fullmatch(line) if has_titles else not line.strip():
            documents.append([])
        documents[-1].append(line)
    return documents


def _record(line: str, path: Path, number: int, column: str) -> str:
    """Return the text of a record of a .jsonl file."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, number, f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _unreadable(path, number, f"expected an object such as {{{column!r}: ...}}, but got {line[:40]!r}")
    if column not in found:
        raise UsageError(
            f"data: {path}, line {number}: there is no field {column!r}, only {', '.join(map(str, found)) or 'none'}",
            hint="name the field of the text with --column",
        )
    text = found[column]
    if not isinstance(text, str):
        raise _unreadable(path, number, f"the field {column!r} must be a text, but got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _unreadable(path, number, f"the field {column!r} is no Unicode text: {error.reason}") from error
    return text


def _cells(path: Path, column: str) -> Iterator[str]:
    """Yield the texts of a table's column."""
    table = ArrowTable(table_files(path), str(path))
    if column not in table.texts:
        raise UsageError(
            f"data: {path} has no column of text named {column!r}; there are {', '.join(table.texts) or 'none'}",
            hint="name the column of the text with --column",
        )
    row = 0
    for piece in table.pieces([column]):
        for text in piece.column(0).to_pylist():
            row += 1
            if text is None:
                raise UsageError(
                    f"data: {path}, row {row}: the column {column!r} is empty", hint="remove that row, or write ''"
                )
            yield text


def _unreadable(path: Path, number: int, why: str) -> UsageError:
    return UsageError(f"data: {path}, line {number}: {why}", hint="repair that line, or remove it")
