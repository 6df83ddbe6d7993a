"""`python -m tests.raises` sees which raise statements run, and none that do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.raises import __main__ as raises
from tests.raises.statements import Statement, statements

ROOT = Path(__file__).parents[1]
MODULE = """
def one(x):
    if x:
        raise ValueError("same")
    raise ValueError("same")

def two():
    try:
        one(True)
    except ValueError as error:
        raise KeyError(f"{error}") from error

def three():
    raise TypeError("never")
"""
RUN = """
import graph_passes
try:
    graph_passes.two()
except KeyError as error:
    print(error.args, graph_passes.two.__code__.co_firstlineno)
"""


def test_a_statement_is_noted_when_it_runs(tmp_path):
    (tmp_path / "graph_passes").mkdir()
    (tmp_path / "graph_passes" / "__init__.py").write_text(MODULE)
    environment = {**os.environ, "RSI_RAISES": str(tmp_path / "record")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "raises" / "hook"), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "('same',) 7\n", done.stderr
    reached = (tmp_path / "record").read_text().splitlines()
    assert reached == ["graph_passes: ValueError('same')", "graph_passes: KeyError(f'{error}')"]
    left = [one.key for one in raises.unreached(tmp_path / "record", list(statements(tmp_path)))]
    assert left == ["graph_passes: ValueError('same') #2", "graph_passes: TypeError('never')"]


def test_every_statement_has_a_key_of_its_own():
    found = list(statements(ROOT))
    assert len({one.key for one in found}) == len(found) > 500
    for one in found:
        assert "raise " in (ROOT / one.file).read_text(encoding="utf-8").splitlines()[one.line - 1]


def judged(monkeypatch, tmp_path, capsys, *, listed, reached):
    found = [Statement(key=key, file="f.py", line=1) for key in ("a", "b")]
    monkeypatch.setattr(raises, "statements", lambda root: iter(found))
    monkeypatch.setattr(raises, "LIST", tmp_path / "list")
    (tmp_path / "list").write_text("# because\n" + "".join(f"{key}\n" for key in listed))
    (tmp_path / "record").write_text("".join(f"{key}\n" for key in reached))
    code = raises.judge(tmp_path / "record", whole=True)
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("listed", "reached", "code", "words"),
    [
        (["b"], ["a"], 0, "2 raise statements, 1 reached, 1 unreached and listed"),
        ([], ["a"], 1, "unreached, line 1: b"),
        (["b", "c"], ["a"], 1, "not in the code: c"),
        ([], ["a", "b"], 0, "2 raise statements, 2 reached"),
    ],
)
def test_what_is_unreached_must_be_listed(monkeypatch, tmp_path, capsys, listed, reached, code, words):
    got, said = judged(monkeypatch, tmp_path, capsys, listed=listed, reached=reached)
    assert got == code
    assert words in said


def test_everything_listed_has_a_reason():
    reasons = raises.listed(raises.LIST.read_text(encoding="utf-8"))
    assert all(reasons.values())
    assert raises.listed("alone\n") == {"alone": ""}
