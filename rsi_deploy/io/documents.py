"""JSON documents from anywhere: no more text than a document of ours has, and no numbers that no measurement has."""

import json
import math
import re
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import UsageError

DOCUMENT_BYTES = 64 << 20
"""Of one document: a report of ten thousand sites has a sixth of it."""

LARGEST = 1 << 63
"""No number in a document is as large."""

_QUOTED = re.compile(r'"\s*[+-]?[\d_]{300,}')
"""A text that schemas would read as a number, larger than floats are."""


def read_document(path: str | Path) -> str:
    """The text of a JSON document.

    Args:
        path: a file, or something else that can be read once, such as a shell's `<(...)`.

    Raises:
        UsageError: more than `DOCUMENT_BYTES`, or a number that is not finite or not below `LARGEST`, or a text of one.
        UnicodeDecodeError: it is no UTF-8.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(DOCUMENT_BYTES + 1)
    if len(content) > DOCUMENT_BYTES:
        raise UsageError(
            f"{path} has more than {DOCUMENT_BYTES >> 20} MiB, which no document of rsi-deploy has; name the right file"
        )
    text = content.decode("utf-8")
    if found := _QUOTED.search(text):
        raise UsageError(f"{path} holds the text {found[0][:20]}... for a number; make it again")
    try:
        json.loads(text, parse_constant=_constant, parse_int=_number, parse_float=_number)
    except _NumberError as error:
        raise UsageError(
            f"{path} holds the number {error}, which no document of rsi-deploy has; make it again"
        ) from None
    except (ValueError, RecursionError):
        pass  # no JSON: whoever reads it says so in better words
    return text


class _NumberError(Exception):
    """A number that no document of ours has."""


def _number(text: str) -> float:
    value = float(text) if len(text) < 400 else math.inf
    if not abs(value) < LARGEST:
        raise _NumberError(text[:40])
    return value


def _constant(text: str) -> Any:
    raise _NumberError(text)
