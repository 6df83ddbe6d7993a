"""The raise statements of the packages, identified by their text and not by their line."""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("rsi_deploy", "graph_passes")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A raise statement: its key (in the record and in unreached.txt), its file and its line."""

    key: str
    file: str
    line: int


def statements(root: Path) -> Iterator[Statement]:
    """Yield every raise statement that makes an exception."""
    hook = _hook()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = path.relative_to(root).with_suffix("").as_posix().removesuffix("/__init__")
            for node, key in hook.keys(ast.parse(path.read_text(encoding="utf-8")), module).items():
                yield Statement(key=key, file=path.relative_to(root).as_posix(), line=node.lineno)


def _hook():
    """Import the hook under another name, so that it does not install itself."""
    path = Path(__file__).parent / "hook" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("noting_raises", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
