"""Put on PYTHONPATH by tests/raises: every process that starts under it notes the raise statements that it runs.

A raise statement gets a call before it, when its module is imported; nothing else is slowed down. Each process appends
the statement's key to the file that RSI_RAISES names, once.
"""

import ast
import builtins
import importlib.machinery
import os
import sys

RECORD = os.environ.get("RSI_RAISES", "")
SEEN = set()


def note(key):
    """Write the statement down, once in a process; one short append is whole or not there."""
    if key not in SEEN:
        SEEN.add(key)
        with open(RECORD, "a", encoding="utf-8") as record:
            record.write(f"{key}\n")


def keys(tree, file):
    """Key by raise statement: its file, its words, and which one it is where the same words stand there again.

    Lines are no keys: they change with what stands above. A bare `raise` passes on what another one made.
    """
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    words = {node: ast.unparse(node.exc) for node in sorted(found, key=lambda node: node.lineno)}
    seen, named = [], {}
    for node, said in words.items():
        seen.append(said)
        named[node] = f"{file}: {said}" + f" #{seen.count(said)}" * (seen.count(said) > 1)
    return named


class Noting(ast.NodeTransformer):
    """Before every `raise`, a call that notes it."""

    def __init__(self, named):
        self.named = named

    def visit_Raise(self, node):
        """The call, and then the statement as it was."""
        if node not in self.named:
            return node
        call = ast.parse(f"__builtins_noted_raise__({self.named[node]!r})").body[0]
        for made in ast.walk(call):
            ast.copy_location(made, node)
        return [call, node]


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles the noting source; the cache of bytecode is neither read nor written."""

    def get_code(self, fullname):
        """The module's code with its raise statements noted."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path))
        named = keys(tree, fullname.replace(".", "/"))
        return compile(Noting(named).visit(tree), path, "exec", dont_inherit=True)


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


if RECORD and __name__ == "sitecustomize":
    builtins.__builtins_noted_raise__ = note
    sys.meta_path.insert(0, Finder)
