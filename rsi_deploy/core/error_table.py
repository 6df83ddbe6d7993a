"""Every error that can be met, with how it ends, when it comes and what to type; read from this package's own source.

Nothing is listed by hand: an error is a class of `rsi_deploy` or `graph_passes` (or one of Python's) that is made
somewhere in them, and its row holds the words that are written there.
"""

import ast
import builtins
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydantic

from rsi_deploy.core.error_texts import parted, template
from rsi_deploy.core.errors import ModelError

PACKAGES = ("rsi_deploy", "graph_passes")


class ErrorRow(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One error.

    Attributes:
        kind: its class.
        ends: "exit 2", "HTTP 400", or "within" for what the callers inside turn into one of these, or a Python program
            that uses the functions meets.
        when: what the message says of what came, with `{name}` for what is known only then.
        to_type: the rest of the message: what to type, or what was expected.
    """

    kind: str
    ends: str
    when: str
    to_type: str
    module: str
    line: int


class ErrorTable(pydantic.BaseModel, frozen=True, extra="forbid"):
    """All of them, by how they end and where they stand; `kinds` says of each class when it comes."""

    kinds: dict[str, str]
    errors: tuple[ErrorRow, ...]


@dataclass(kw_only=True)
class Kind:
    """A class of errors as the source defines it.

    Attributes:
        module: where it is defined; empty for Python's own.
        meaning: the first paragraph of its docstring.
        exit_code: what a command ends with, where one does.
        status: whether its first argument is a status of HTTP.
        message: what it says by itself, where it does.
    """

    module: str = ""
    meaning: str
    exit_code: int | None = None
    status: bool = False
    message: ast.expr | None = None


@functools.cache
def read_errors() -> ErrorTable:
    """The table of every error, read from the source that is installed.

    Raises:
        ModelError: the installation has no source to read.
    """
    root = Path(__file__).resolve().parents[2]
    trees = {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    if not trees:
        raise ModelError(f"{root / PACKAGES[0]} holds no source to read the errors from; pip install rsi-deploy again")
    return table(trees)


def table(trees: dict[str, ast.Module]) -> ErrorTable:
    """The errors of parsed modules, by file."""
    kinds = error_classes(trees)
    rows = [row for file, tree in trees.items() for row in _rows(file, tree, _known_to(file, tree, kinds))]
    rows.sort(key=lambda row: (*_place(row.ends), row.module, row.line))
    used = dict.fromkeys(row.kind for row in rows)
    return ErrorTable(kinds={name: kinds[name].meaning for name in used if name in kinds}, errors=tuple(rows))


def _place(ends: str) -> tuple[int, int]:
    """Exit codes first, then HTTP's, each by number."""
    first, _, number = ends.partition(" ")
    return (["exit", "HTTP", "within"].index(first), int(number) if number.isdigit() else 0)


def error_classes(trees: dict[str, ast.Module]) -> dict[str, Kind]:
    """Python's exceptions, and every class that descends from one, by name."""
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
    made = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    first = [argument.arg for argument in made.args.args[1:2]] if made else []
    calls = [node for node in ast.walk(made) if isinstance(node, ast.Call)] if made else []
    said = [call.args[0] for call in calls if ast.unparse(call.func) == "super().__init__" and call.args]
    return Kind(
        module=module,
        meaning=(ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " "),
        exit_code=code if isinstance(code, int) else None,
        status=first == ["status"],
        message=said[0] if said and not isinstance(said[0], ast.Name) else None,
    )


def _known_to(file: str, tree: ast.Module, kinds: dict[str, Kind]) -> dict[str, Kind]:
    """The classes that a module means by these names: Python's, its own, and those it imports from where they stand."""
    imported = {
        (alias.name, node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    own = _dotted(file)
    return {name: kind for name, kind in kinds.items() if kind.module in ("", own) or (name, kind.module) in imported}


def _dotted(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def _rows(file: str, tree: ast.Module, kinds: dict[str, Kind]) -> Iterator[ErrorRow]:
    """One row wherever an error is made, and wherever the command line turns Python's own into a message."""
    for function, node in _within_functions(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in kinds and _makes_an_error(node, kinds[name]):
                yield _row(file, node, name, kinds[name], function)
            case ast.Raise(exc=ast.Name(id=name)) if name in kinds:
                yield _ended(file, node, name, _how(kinds[name], None), kinds[name].meaning)
            case ast.ExceptHandler(type=ast.expr() as caught):
                for told in (call for call in ast.walk(node) if isinstance(call, ast.Call)):
                    match told:
                        case ast.Call(func=ast.Name(id="_fail"), args=[message, ast.Constant(value=int(code))]):
                            yield _ended(file, told, ast.unparse(caught), f"exit {code}", template(message))
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr="fail"), args=[message, *_]):
                yield _ended(file, node, "click.BadParameter", "exit 2", template(message, function))


def _within_functions(tree: ast.AST) -> Iterator[tuple[ast.AST | None, ast.AST]]:
    """Every node with the function it stands in, in the order of the source."""
    waiting: list[tuple[ast.AST | None, ast.AST]] = [(None, tree)]
    while waiting:
        function, node = waiting.pop()
        yield function, node
        inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        waiting += [(inner, child) for child in reversed(list(ast.iter_child_nodes(node)))]


def _makes_an_error(call: ast.Call, kind: Kind) -> bool:
    """Python's own without a word are made to be handed on; with a message they are errors of ours."""
    return bool(kind.module or call.args)


def _row(file: str, call: ast.Call, name: str, kind: Kind, function: ast.AST | None) -> ErrorRow:
    given = [*call.args, *(word.value for word in call.keywords)]
    status = given.pop(0) if kind.status else None
    message = kind.message or next((one for one in given if not _is_flag(one)), ast.Constant(kind.meaning))
    return _ended(file, call, name, _how(kind, status), template(message, function))


def _is_flag(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not isinstance(value.value, str)


def _how(kind: Kind, status: ast.expr | None) -> str:
    if kind.exit_code is not None:
        return f"exit {kind.exit_code}"
    return f"HTTP {ast.unparse(status)}" if status is not None else "within"


def _ended(file: str, node: ast.expr | ast.stmt, kind: str, ends: str, text: str) -> ErrorRow:
    when, to_type = parted(text)
    return ErrorRow(kind=kind, ends=ends, when=when, to_type=to_type, module=file, line=node.lineno)
