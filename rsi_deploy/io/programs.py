"""Read `torch.export` programs (`.pt2`) after checking that torch's reader would execute no code from the file.

    pickles                     loaded with `weights_only`, wherever torch would execute them
    custom and opaque objects   refused: they exist only as pickles
    compiled libraries          refused: loading them executes them
    expressions, guards         torch evaluates their text, so only arithmetic on sizes is allowed
    operators                   torch looks them up by name, so only names of its operator tables are allowed

These checks are no proof: torch's reader is large and changes. Load files that you do not trust on an isolated machine,
or use ONNX.
"""

import ast
import contextlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.archives import check_archive

OBJECTS = ("custom_obj", "opaque_obj")
"""Prefixes of the names of pickled objects in an archive."""

_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|torch\._?sym_\w+|_operator\.\w+|math\.\w+")
_ARITHMETIC = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
)
_NAME = re.compile(r"(?!.*__)[A-Za-z]\w*")
_METHODS = ("size", "stride", "storage_offset")  # methods of inputs that guards call
_LONGEST = 10_000


def read_program(path: Path) -> "torch.export.ExportedProgram":
    """Read the program in a file.

    Raises:
        ModelError: The file holds something that would be executed, or torch cannot read it.
    """
    try:
        check_archive(path)
        for name, content in _members(path):
            _check_member(name, content)
    except (ValueError, OSError, RecursionError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{path.name} is not a readable torch.export archive: {error}", hint="save it again with torch.export.save"
        ) from error
    except _CodeError as error:
        raise ModelError(
            f"{path.name} contains {error}, which could run code when it is loaded, so it is refused",
            hint="if you trust it, export it to ONNX yourself (torch.onnx.export) and give the .onnx file",
        ) from error
    try:
        with _weights_only():
            return torch.export.load(path)
    except Exception as error:  # torch.export.load raises many types for a damaged archive
        raise ModelError(
            f"{path.name} is not a readable torch.export archive: {error}", hint="save it again with torch.export.save"
        ) from error


class _CodeError(Exception):
    """Something in an archive that would be executed."""


def _members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield names and contents as Python reads the archive and as torch does, which may differ."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            yield entry.filename, lambda entry=entry: archive.read(entry)  # type: ignore[misc]
    try:
        reader = torch._C.PyTorchFileReader(os.fspath(path))
    except RuntimeError:  # then torch reads it as Python does
        return
    for name in reader.get_all_records():
        yield name, lambda name=name: reader.get_record(name)  # type: ignore[misc]


def _check_member(name: str, content: Callable[[], bytes]) -> None:
    parts = PurePosixPath(name).parts
    if "aotinductor" in parts or (parts[-1:] and parts[-1].endswith((".so", ".o", ".dll", ".dylib"))):
        raise _CodeError("a compiled library")
    if parts and parts[-1].startswith(OBJECTS):
        raise _CodeError("a pickled object")
    if name.endswith(".json"):
        _check_json(json.loads(content()))


def _check_json(value: Any) -> None:
    if isinstance(value, list):
        for entry in value:
            _check_json(entry)
    if not isinstance(value, dict):
        return
    for key, entry in value.items():
        if key == "expr_str" and isinstance(entry, str):
            _check_expression(entry, calls=True)
        elif key == "guards_code":
            for guard in entry if isinstance(entry, list) else [entry]:
                _check_expression(str(guard), calls=False)
        elif key == "target" and isinstance(entry, str) and entry.startswith(("torch", "_operator", "math", "#")):
            if not _OPERATOR.fullmatch(entry):
                raise _CodeError(f"the operator {entry[:80]!r}")
        elif key == "path_name" and isinstance(entry, str) and entry.startswith(OBJECTS):
            raise _CodeError("a pickled object")
        _check_json(entry)


def _check_expression(text: str, *, calls: bool) -> None:
    """Allow arithmetic on names and numbers; with `calls`, also calls of capitalized functions, else of `_METHODS`."""
    try:
        tree = ast.parse(text[: _LONGEST + 1], mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _CodeError(f"the expression {text[:80]!r}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            is_symbolic = isinstance(function, ast.Name) and calls and not function.id.islower()  # sympy's or torch's
            is_method = isinstance(function, ast.Attribute) and not calls and function.attr in _METHODS
            fine = is_symbolic or (is_method and not node.keywords)
        elif isinstance(node, ast.Attribute):
            fine = not calls and node.attr in _METHODS
        elif isinstance(node, ast.Name):
            fine = "__" not in node.id
        elif isinstance(node, ast.Constant):
            text_ = isinstance(node.value, str) and (not calls or _NAME.fullmatch(node.value) is not None)
            fine = isinstance(node.value, int | float) or text_
        elif isinstance(node, ast.keyword):  # Symbol('s0', positive=True)
            fine = isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool)
        else:
            fine = isinstance(node, _ARITHMETIC) or (isinstance(node, ast.Subscript) and not calls)
        if not fine or len(text) > _LONGEST:
            raise _CodeError(f"the expression {text[:80]!r}")


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Make torch.load use `weights_only` wherever torch calls it."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
