"""Put on PYTHONPATH by tests/raises: every process that starts under it notes the raise statements that it runs.

A raise statement gets a call before it, when its module is imported; nothing else is slowed down. Each process appends
`file:line` to the file that RSI_RAISES names, once for each statement.
"""

import ast
import builtins
import importlib.machinery
import os
import sys

RECORD = os.environ.get("RSI_RAISES", "")
SEEN = set()


def note(place):
    """Write the place down, once in a process; one short append is whole or not there."""
    if place not in SEEN:
        SEEN.add(place)
        with open(RECORD, "a", encoding="utf-8") as record:
            record.write(f"{place}\n")


class Noting(ast.NodeTransformer):
    """Before every `raise`, a call that notes it."""

    def __init__(self, path):
        self.path = path

    def visit_Raise(self, node):
        """The call, and then the statement as it was."""
        call = ast.parse(f"__builtins_noted_raise__({f'{self.path}:{node.lineno}'!r})").body[0]
        for made in ast.walk(call):
            ast.copy_location(made, node)
        return [call, node]


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles the noting source; the cache of bytecode is neither read nor written."""

    def get_code(self, fullname):
        """The module's code with its raise statements noted."""
        path = self.get_filename(fullname)
        return compile(Noting(path).visit(ast.parse(self.get_data(path))), path, "exec", dont_inherit=True)


class Finder:
    """Finds our packages where Python would, and gives them the loader above."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The spec of a module of ours; None leaves all others to Python."""
        if name.partition(".")[0] not in ("rsi_deploy", "graph_passes"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(name, spec.origin)
        return spec


if RECORD:
    builtins.__builtins_noted_raise__ = note
    sys.meta_path.insert(0, Finder)
