"""Read JSON documents from any source, with a limit on their size and on the numbers in them."""

import json
import math
import re
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import UsageError

DOCUMENT_BYTES = 64 << 20
"""Largest document; a report of ten thousand sites needs a sixth of it."""

LARGEST = 1 << 63
"""All numbers in a document are smaller than this."""

_QUOTED = re.compile(r'"\s*[+-]?[\d_]{300,}')
"""A quoted number too large for a float, which a schema would parse."""


def read_document(path: str | Path) -> str:
    """Read the text of a JSON document.

    Args:
        path: a file, or anything that can be read once, such as a shell's `<(...)`.

    Raises:
        UsageError: The document is larger than `DOCUMENT_BYTES`, or has a number that is not finite or not below
            `LARGEST`.
        UnicodeDecodeError: It is not UTF-8.
        OSError: It cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(DOCUMENT_BYTES + 1)
    if len(content) > DOCUMENT_BYTES:
        raise UsageError(
            f"{path} has more than {DOCUMENT_BYTES >> 20} MiB, more than any document of rsi-deploy",
            hint="check the path",
        )
    text = content.decode("utf-8")
    if found := _QUOTED.search(text):
        raise UsageError(f"{path} has the text {found[0][:20]}... in place of a number", hint="create it again")
    try:
        json.loads(text, parse_constant=_constant, parse_int=_number, parse_float=_number)
    except _NumberError as error:
        raise UsageError(
            f"{path} has the number {error}, which is out of range", hint="create the document again"
        ) from None
    except (ValueError, RecursionError):
        pass  # invalid JSON: the caller reports it with more context
    return text


class _NumberError(Exception):
    """A number that is out of range."""


def _number(text: str) -> float:
    value = float(text) if len(text) < 400 else math.inf
    if not abs(value) < LARGEST:
        raise _NumberError(text[:40])
    return value


def _constant(text: str) -> Any:
    raise _NumberError(text)
