"""The raise statements of a source file, each known by what it says and not by its line."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("rsi_deploy", "graph_passes")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One raise: its file within the checkout, its line, and its words as `ast.unparse` writes them."""

    file: str
    line: int
    words: str

    @property
    def key(self) -> str:
        """What stands in unreached.txt; it outlives changes elsewhere in the file."""
        return f"{self.file}: {self.words}"


def statements(root: Path) -> Iterator[Statement]:
    """Every raise that makes an error; a bare `raise` passes on what another one made."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    yield Statement(file=str(path.relative_to(root)), line=node.lineno, words=ast.unparse(node.exc))
