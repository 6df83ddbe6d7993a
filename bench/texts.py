"""Short English texts from docstrings of installed packages: torch, transformers, numpy and Python.

A paragraph counts where it is prose of 200 to 600 characters. Docstrings are copied from class to class with a word
changed, so a text is dropped where more than a quarter of its runs of five words are in earlier texts: test texts must
not be in the calibration data. Texts differ between versions, so every result stores their `digest`.
"""

import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

PACKAGES = ("numpy", "torch", "transformers")
LENGTH = (200, 600)
"""Characters of a text, at least and at most."""
FAMILIAR = 0.25
"""Share of a text's runs of five words that may stand in texts before it."""

_DOCSTRING = re.compile(r'^[ \t]*[rRuU]?"""(.*?)"""', re.DOTALL | re.MULTILINE)
_PROSE = re.compile(rf"[A-Z][A-Za-z0-9 ,;:.'\-()/]{{{LENGTH[0] - 2},{LENGTH[1] - 2}}}\.")


def harvest(folders: Sequence[Path] | None = None) -> tuple[str, ...]:
    """All texts, sorted.

    Args:
        folders: of Python files; by default the standard library's and those of the `PACKAGES` that are installed.
    """
    found: set[str] = set()
    for folder in _installed() if folders is None else folders:
        for file in folder.rglob("*.py"):
            inner = file.relative_to(folder).parts
            if "site-packages" not in inner and not any(part.startswith(("test", "_test")) for part in inner):
                found.update(paragraphs(file.read_text(encoding="utf-8", errors="ignore")))
    return without_copies(sorted(found))


def paragraphs(code: str) -> Iterator[str]:
    """The paragraphs of prose in the docstrings of some Python code, on one line each."""
    for docstring in _DOCSTRING.findall(code):
        for paragraph in re.split(r"\n[ \t]*\n", docstring):
            flat = " ".join(paragraph.split())
            if _PROSE.fullmatch(flat):
                yield flat


def without_copies(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the texts in their order without near copies of earlier ones.

    Example:
        >>> without_copies(["one two three four five six", "one two three four five", "quite another one of five"])
        ('one two three four five six', 'quite another one of five')
    """
    seen: set[tuple[str, ...]] = set()
    kept = []
    for text in texts:
        words = re.findall(r"[a-z]+", text.lower())
        runs = {tuple(words[start : start + 5]) for start in range(max(len(words) - 4, 1))}
        if len(runs & seen) <= FAMILIAR * len(runs):
            kept.append(text)
        seen |= runs
    return tuple(kept)


def parted(texts: Sequence[str], held_out: int, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`held_out` texts to test on, chosen by the seed alone, and all others in a shuffled order."""
    order = np.random.default_rng(seed).permutation(len(texts))
    shuffled = tuple(texts[index] for index in order)
    return shuffled[:held_out], shuffled[held_out:]


def digest(texts: Sequence[str]) -> str:
    """The sha256 (hex) of the texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _installed() -> Iterator[Path]:
    yield Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent
