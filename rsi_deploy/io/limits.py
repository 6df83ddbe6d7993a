"""Limits on ONNX files from unknown sources, and how messages show names from such files.

The limits are far above what real models need. A message that refuses a model names the limit.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import NodeProto

MODEL_BYTES = (1 << 31) - 1
"""Largest ONNX file without its external data; a protobuf message cannot be larger."""

NAME_LENGTH = 10_000
"""Most characters in one name."""

RANK = 32
"""Most dimensions of a tensor, as in numpy 1."""

NESTED_GRAPHS = 24
"""Deepest nesting of graphs (If, Loop, Scan); protobuf reads about 33 levels."""

NESTED_CALLS = 64
"""Deepest nesting of calls of local functions."""

EXPANDED_NODES = 300_000
"""Most nodes once every local function is inlined."""

GENERATED_NUMBERS = 100_000_000
"""Most numbers in one value that a graph generates: 400 MB of float32."""

GENERATED_RATIO = 1024
"""For values above `GENERATED_NUMBERS`: the highest ratio to the numbers that are stored in the model or fed to it."""

_SHOWN = 80


def quoted_name(name: str) -> str:
    r"""Quote a name from a file: control and direction characters are escaped, long names lose their middle.

    Example:
        >>> quoted_name("fc\x1b[31m\u202e")
        "'fc\\x1b[31m\\u202e'"
    """
    if len(name) > _SHOWN:
        name = f"{name[:50]}...{name[-20:]}"
    return repr(name)


def describe_node(node: "NodeProto") -> str:
    """Describe a node in a message by its operator and its name or first output."""
    operator = node.op_type if node.op_type.isidentifier() and len(node.op_type) < _SHOWN else quoted_name(node.op_type)
    return f"{operator} {quoted_name(node.name or (node.output[0] if node.output else ''))}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with unprintable characters escaped."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text)
