"""The raise statements of the packages, each known by what it says and not by its line."""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("rsi_deploy", "graph_passes")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One raise: its key (as the hook writes it down, and as it stands in unreached.txt), its file and its line."""

    key: str
    file: str
    line: int


def statements(root: Path) -> Iterator[Statement]:
    """Every raise that makes an error."""
    hook = _hook()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = path.relative_to(root).with_suffix("").as_posix().removesuffix("/__init__")
            for node, key in hook.keys(ast.parse(path.read_text(encoding="utf-8")), module).items():
                yield Statement(key=key, file=path.relative_to(root).as_posix(), line=node.lineno)


def _hook():
    """The module that notes, under another name than Python looks for, so that it only defines."""
    path = Path(__file__).parent / "hook" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("noting_raises", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
