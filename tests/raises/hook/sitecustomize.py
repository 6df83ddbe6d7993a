"""A hook that records raise statements. tests/raises puts it on PYTHONPATH of every process that it starts.

When a module is imported, a call is inserted before each raise statement. It appends the key of the statement to the
file in $RSI_RAISES, once in each process.
"""

import ast
import builtins
import importlib.machinery
import os
import sys

RECORD = os.environ.get("RSI_RAISES", "")
SEEN = set()


def note(key):
    """Append the key to the record, once in a process. A short append is atomic."""
    if key not in SEEN:
        SEEN.add(key)
        with open(RECORD, "a", encoding="utf-8") as record:
            record.write(f"{key}\n")


def keys(tree, file):
    """Return raise statement -> key: its file, its text, and a number if the text is repeated.

    Line numbers would change with the code above. A bare `raise` is left out, as it makes no exception.
    """
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    words = {node: ast.unparse(node.exc) for node in sorted(found, key=lambda node: node.lineno)}
    seen, named = [], {}
    for node, text in words.items():
        seen.append(text)
        named[node] = f"{file}: {text}" + f" #{seen.count(text)}" * (seen.count(text) > 1)
    return named


class Noting(ast.NodeTransformer):
    """Inserts a call before every raise statement."""

    def __init__(self, named):
        self.named = named

    def visit_Raise(self, node):
        """Return the call and the statement."""
        if node not in self.named:
            return node
        call = ast.parse(f"__builtins_noted_raise__({self.named[node]!r})").body[0]
        for made in ast.walk(call):
            ast.copy_location(made, node)
        return [call, node]


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles modules with the inserted calls, without the cache of bytecode."""

    def get_code(self, fullname):
        """Return the code of a module with the inserted calls."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path))
        named = keys(tree, fullname.replace(".", "/"))
        return compile(Noting(named).visit(tree), path, "exec", dont_inherit=True)


class Finder:
    """Finds the modules of our packages and gives them the loader above."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Return the spec of a module of our packages, or None for others."""
        if name.partition(".")[0] not in ("rsi_deploy", "graph_passes"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(name, spec.origin)
        return spec


if RECORD and __name__ == "sitecustomize":
    builtins.__builtins_noted_raise__ = note
    sys.meta_path.insert(0, Finder)
