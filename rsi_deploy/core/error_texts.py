"""Messages as they are spelled in the source: templates in which each value is replaced by a short name.

`f"{path} exists; add --force"` becomes "{path} exists; add --force", and `', '.join(known)` within one "{known}".
"""

import ast
import re

# The beginning of the advice in messages without a `hint`, in order of priority; what was expected counts as advice.
_ADVICE = (
    re.compile(r"; (?=[^;]*$)"),
    re.compile(r" \((?=(?:type|exclude) )"),
    re.compile(r"[:?] (?=(?:add|convert|leave|make|measure|name|pass|save|type|write) )", re.IGNORECASE),
    re.compile(r" (?=(?:add --|pip install|convert it))"),
    re.compile(r"(?:^| )(?=(?:expected|choose|give|exactly one|go together|goe?s? with|takes?|needs?)\b)"),
    re.compile(r" (?=(?:must|may|is none of|is neither|is spelled|is a number|are \d|could be) )"),
    re.compile(r" (?=behind the # go )"),
)


def template(message: ast.expr, function: ast.AST | None = None) -> str:
    """Return the text of an expression with `{name}` for each value that is known only at run time.

    Args:
        message: argument of the error.
        function: function that contains it, to look up a text that was assigned to a variable.
    """
    match message:
        case ast.Constant():
            return str(message.value)
        case ast.JoinedStr():
            return "".join(_piece(piece, function) for piece in message.values)
        case ast.BinOp(op=ast.Add()):
            return template(message.left, function) + template(message.right, function)
        case ast.IfExp():
            either = [template(message.body, function), template(message.orelse, function)]
            return " / ".join(filter(None, either))
        case ast.Name() if (assigned := _assigned(message.id, function)) is not None:
            return template(assigned)
    return f"{{{short_name(message)}}}"


def split_advice(text: str) -> tuple[str, str]:
    """Split a message into what came and what to type or what was expected; the second may be empty.

    Example:
        >>> split_advice("--points must be at least 2, but got {points}"), split_advice("{path} exists; add --force")
        (('--points', 'must be at least 2, but got {points}'), ('{path} exists', 'add --force'))
    """
    for pattern in _ADVICE:
        if found := pattern.search(text):
            return text[: found.start()].strip(), text[found.end() :].strip(" ()")
    return text, ""


def short_name(value: ast.expr) -> str:
    """Return one word for a value: the name of the variable it is made from.

    Example:
        >>> [short_name(ast.parse(code, mode="eval").body) for code in ("path.name", "sorted(names)", "x[0]")]
        ['name', 'names', 'x']
    """
    match value:
        case ast.Name():
            return value.id.strip("_")
        case ast.Attribute():
            return value.attr.strip("_")
        case ast.Call(args=[first, *_]):
            return short_name(first.elt if isinstance(first, ast.GeneratorExp) else first)
        case ast.Call():
            return short_name(value.func.value if isinstance(value.func, ast.Attribute) else value.func)
        case ast.Subscript() | ast.Starred():
            return short_name(value.value)
        case ast.BoolOp():
            return short_name(value.values[0])
        case ast.IfExp():
            return short_name(value.body)
        case ast.BinOp():
            return short_name(value.right if isinstance(value.left, ast.Constant) else value.left)
        case ast.JoinedStr(values=pieces):
            return next((short_name(piece.value) for piece in pieces if isinstance(piece, ast.FormattedValue)), "text")
    return "value"


def _piece(piece: ast.expr, function: ast.AST | None) -> str:
    if not isinstance(piece, ast.FormattedValue):
        return template(piece, function)
    if isinstance(piece.value, ast.JoinedStr):
        return template(piece.value, function)
    return f"{{{short_name(piece.value)}}}"


def _assigned(name: str, function: ast.AST | None) -> ast.expr | None:
    """Return the text that the function assigns to a variable, if it does so once."""
    if function is None:
        return None
    values = [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]
    ]
    return values[0] if len(values) == 1 and isinstance(values[0], ast.JoinedStr | ast.Constant | ast.BinOp) else None
