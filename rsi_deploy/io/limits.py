"""How much an ONNX file may claim before it is refused, and how names from it are spoken of.

A limit stands far above what real models reach; where one is in the way, the message says which.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import NodeProto

MODEL_BYTES = (1 << 31) - 1
"""Of an ONNX file without its external data: what a protobuf message can hold."""

NAME_LENGTH = 10_000
"""Characters of one name in a model."""

RANK = 32
"""Dimensions of a tensor: numpy's own limit before version 2."""

NESTED_GRAPHS = 24
"""Graphs within graphs (If, Loop, Scan); protobuf itself reads about 33."""

NESTED_CALLS = 64
"""Local functions that call each other."""

EXPANDED_NODES = 300_000
"""Nodes once every local function is written out where it is called."""

MADE_NUMBERS = 100_000_000
"""Numbers in one value that a graph makes out of little: 400 MB of float32."""

MADE_RATIO = 1024
"""Numbers that a graph may make of each one that is stored in it or fed to it, where they are above `MADE_NUMBERS`."""

_SHOWN = 80


def shown(name: str) -> str:
    r"""A name from a file in quotes: control codes and marks of direction as their codes, the middle of long ones out.

    Example:
        >>> shown("fc\x1b[31m\u202e")
        "'fc\\x1b[31m\\u202e'"
    """
    if len(name) > _SHOWN:
        name = f"{name[:50]}...{name[-20:]}"
    return repr(name)


def called(node: "NodeProto") -> str:
    """How a message speaks of a node: its operator, and its name or its first output."""
    operator = node.op_type if node.op_type.isidentifier() and len(node.op_type) < _SHOWN else shown(node.op_type)
    return f"{operator} {shown(node.name or (node.output[0] if node.output else ''))}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, fit to be shown."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text)
