"""A table of all errors: how each ends, when it occurs and what to type, read from the source of this package.

No error is listed by hand. A row describes a place where an exception class of `rsi_deploy` or `graph_passes`, or one
of Python's, is created, with the text in the source.
"""

import ast
import builtins
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydantic

from rsi_deploy.core.error_texts import split_advice, template
from rsi_deploy.core.errors import ModelError

PACKAGES = ("rsi_deploy", "graph_passes")


class ErrorRow(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One error.

    Attributes:
        kind: exception class.
        ends: "exit 2", "HTTP 400", or "within" if a caller inside handles it or only Python code can meet it.
        when: the first part of the message, which says what came, with `{name}` for values known only at run time.
        to_type: the hint, or the part of the message that says what was expected.
        module: source file.
        line: line in that file.
    """

    kind: str
    ends: str
    when: str
    to_type: str
    module: str
    line: int


class ErrorTable(pydantic.BaseModel, frozen=True, extra="forbid"):
    """All errors, sorted by exit code and place; `kinds` describes each exception class."""

    kinds: dict[str, str]
    errors: tuple[ErrorRow, ...]


@dataclass(kw_only=True)
class Kind:
    """An exception class in the source.

    Attributes:
        module: module that defines it; empty for Python's own.
        meaning: first paragraph of its docstring.
        exit_code: exit code of a command, if any.
        status: whether its first argument is an HTTP status.
        message: message that its constructor sets, if any.
    """

    module: str = ""
    meaning: str
    exit_code: int | None = None
    status: bool = False
    message: ast.expr | None = None


@functools.cache
def read_errors() -> ErrorTable:
    """Read the table of all errors from the installed source.

    Raises:
        ModelError: The installation contains no source.
    """
    root = Path(__file__).resolve().parents[2]
    trees = {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    if not trees:
        raise ModelError(
            f"{root / PACKAGES[0]} has no source to read the errors from", hint="pip install rsi-deploy again"
        )
    return table(trees)


def table(trees: dict[str, ast.Module]) -> ErrorTable:
    """Return the errors of parsed modules, by file."""
    kinds = error_classes(trees)
    rows = [row for file, tree in trees.items() for row in _rows(file, tree, _known_to(file, tree, kinds))]
    rows.sort(key=lambda row: (*_place(row.ends), row.module, row.line))
    used = dict.fromkeys(row.kind for row in rows)
    return ErrorTable(kinds={name: kinds[name].meaning for name in used if name in kinds}, errors=tuple(rows))


def _place(ends: str) -> tuple[int, int]:
    """Return a sort key: exit codes first, then HTTP statuses, each by number."""
    first, _, number = ends.partition(" ")
    return (["exit", "HTTP", "within"].index(first), int(number) if number.isdigit() else 0)


def error_classes(trees: dict[str, ast.Module]) -> dict[str, Kind]:
    """Return Python's exceptions and all classes derived from them, by name."""
    found = {
        name: Kind(meaning=(value.__doc__ or "").split("\n")[0])
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }
    homes = {
        node: _dotted(file) for file, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }
    while True:
        new = [one for one in homes if one.name not in found and any(ast.unparse(base) in found for base in one.bases)]
        if not new:
            return found
        found |= {one.name: _kind(one, homes[one], found) for one in new}


def _kind(node: ast.ClassDef, module: str, known: dict[str, Kind]) -> Kind:
    bases = tuple(ast.unparse(base) for base in node.bases)
    codes = [
        item.value.value
        for item in node.body
        if isinstance(item, ast.Assign)
        and ast.unparse(item.targets[0]) == "exit_code"
        and isinstance(item.value, ast.Constant)
    ]
    (code,) = codes or [next((known[base].exit_code for base in bases if base in known), None)]
    init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    first = [argument.arg for argument in init.args.args[1:2]] if init else []
    calls = [node for node in ast.walk(init) if isinstance(node, ast.Call)] if init else []
    messages = [call.args[0] for call in calls if ast.unparse(call.func) == "super().__init__" and call.args]
    return Kind(
        module=module,
        meaning=(ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " "),
        exit_code=code if isinstance(code, int) else None,
        status=first == ["status"],
        message=messages[0] if messages and not isinstance(messages[0], ast.Name) else None,
    )


def _known_to(file: str, tree: ast.Module, kinds: dict[str, Kind]) -> dict[str, Kind]:
    """Return the classes that a module can name: Python's, its own, and imported ones."""
    imported = {
        (alias.name, node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    own = _dotted(file)
    return {name: kind for name, kind in kinds.items() if kind.module in ("", own) or (name, kind.module) in imported}


def _dotted(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def _rows(file: str, tree: ast.Module, kinds: dict[str, Kind]) -> Iterator[ErrorRow]:
    """Yield a row for each error that is created, and for each built-in exception that the CLI turns into a message."""
    for function, node in _within_functions(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in kinds and _makes_an_error(node, kinds[name]):
                yield _row(file, node, name, kinds[name], function)
            case ast.Raise(exc=ast.Name(id=name)) if name in kinds:
                yield _ended(file, node, name, _how(kinds[name], None), kinds[name].meaning)
            case ast.ExceptHandler(type=ast.expr() as caught):
                for call in (call for call in ast.walk(node) if isinstance(call, ast.Call)):
                    match call:
                        case ast.Call(func=ast.Name(id="_fail"), args=[message, ast.Constant(value=int(code))]):
                            yield _ended(file, call, ast.unparse(caught), f"exit {code}", template(message))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr="fail"), args=[message, *_]):
                yield _ended(file, node, "click.BadParameter", "exit 2", template(message, function))


def _within_functions(tree: ast.AST) -> Iterator[tuple[ast.AST | None, ast.AST]]:
    """Yield every node with its innermost function, in the order of the source."""
    waiting: list[tuple[ast.AST | None, ast.AST]] = [(None, tree)]
    while waiting:
        function, node = waiting.pop()
        yield function, node
        inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        waiting += [(inner, child) for child in reversed(list(ast.iter_child_nodes(node)))]


def _makes_an_error(call: ast.Call, kind: Kind) -> bool:
    """Return whether a call creates an error: a built-in exception without arguments is only an internal signal."""
    return bool(kind.module or call.args)


def _row(file: str, call: ast.Call, name: str, kind: Kind, function: ast.AST | None) -> ErrorRow:
    arguments = list(call.args)
    status = arguments.pop(0) if kind.status else None
    hint = next((word.value for word in call.keywords if word.arg == "hint"), None)
    arguments += [word.value for word in call.keywords if word.arg != "hint"]
    message = kind.message or next((one for one in arguments if not _is_flag(one)), ast.Constant(kind.meaning))
    hint_text = "" if hint is None else template(hint, function)
    return _ended(file, call, name, _how(kind, status), template(message, function), hint_text)


def _is_flag(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not isinstance(value.value, str)


def _how(kind: Kind, status: ast.expr | None) -> str:
    if kind.exit_code is not None:
        return f"exit {kind.exit_code}"
    return f"HTTP {ast.unparse(status)}" if status is not None else "within"


def _ended(file: str, node: ast.expr | ast.stmt, kind: str, ends: str, text: str, hint: str = "") -> ErrorRow:
    when, to_type = (text, hint) if hint else split_advice(text)
    return ErrorRow(kind=kind, ends=ends, when=when, to_type=to_type, module=file, line=node.lineno)
