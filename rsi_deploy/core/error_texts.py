"""Messages as the source spells them: a template with each value that comes in under a short name.

`f"{path} exists; add --force"` is "{path} exists; add --force", and `', '.join(known)` within one is "{known}".
"""

import ast
import re

# Where the advice begins, in the order in which they are looked for; without one, what was expected is the advice.
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
    """What the expression says, with `{name}` for what is known only when it is said.

    Args:
        message: the argument of the error.
        function: where it stands; a text that was put into a variable there is looked up.
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
        case ast.Name() if (told := _assigned(message.id, function)) is not None:
            return template(told)
    return f"{{{short_name(message)}}}"


def parted(text: str) -> tuple[str, str]:
    """A message as when it comes, and what to type or what was expected; the second is empty where it says neither.

    Example:
        >>> parted("--points must be at least 2, but got {points}"), parted("{path} exists; add --force")
        (('--points', 'must be at least 2, but got {points}'), ('{path} exists', 'add --force'))
    """
    for pattern in _ADVICE:
        if found := pattern.search(text):
            return text[: found.start()].strip(), text[found.end() :].strip(" ()")
    return text, ""


def short_name(value: ast.expr) -> str:
    """One word for a value: that of the variable it is made from.

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
    """The text that the function puts into a variable, where it does so once."""
    if function is None:
        return None
    told = [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]
    ]
    return told[0] if len(told) == 1 and isinstance(told[0], ast.JoinedStr | ast.Constant | ast.BinOp) else None
