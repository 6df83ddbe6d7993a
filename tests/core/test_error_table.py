"""`doctor --errors`: a row for every error that the code makes, with its exit code and what to type."""

import ast
import json
import re
from pathlib import Path

import pytest

import rsi_deploy
from rsi_deploy.cli import run
from rsi_deploy.core import errors
from rsi_deploy.core.error_table import PACKAGES, read_errors, table

ROOT = Path(rsi_deploy.__file__).parents[1]

# Raised as they came: made elsewhere, where their row is.
PASSED_ON = {
    "error.cause": "by a worker of Ray",
    "kind": "by a process that measures",
    "first_refusal": "of the first model that cannot be served",
    "type(made.problem)": "by a point of a sweep",
    "type(error)": "with the model under the name that the user knows it by",
    "pb_utils.TritonModelException": "to Triton, which runs that file",
}
# Messages whose advice is in the text that they pass on; the first two files are about what a hostile file holds.
NO_ADVICE_OF_THEIR_OWN = {
    "rsi_deploy/io/onnx_file.py": {...},
    "rsi_deploy/io/checkpoint.py": {...},
    "rsi_deploy/calibration/calibration_data.py": {"{OPTION}: {value}"},
    "rsi_deploy/data/arrow_data.py": {"data: {name}, column {column}: {error}"},
    "rsi_deploy/planning/plan_file.py": {"plan {path}: {value}", "the plan does not fit the model: {problems}"},
    "rsi_deploy/runtime/sessions.py": {"{name}: onnxruntime cannot load it on {name}: {message}{advice}"},
    "rsi_deploy/cli/__init__.py": {"no permission: {filename}", "{words}", "{WHOLE}"},
    "rsi_deploy/serving/ray/app.py": {"{details}"},
}


@pytest.fixture(scope="module")
def listed():
    return read_errors()


@pytest.fixture(scope="module")
def places(listed):
    return {(row.module, row.line) for row in listed.errors}


def trees():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def without_a_row(files, places):
    """The raise statements of parsed files whose error has no row, neither there nor in the function that makes it."""
    makers = {
        node.name
        for file, tree in files
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(
            (file, getattr(inner, "lineno", 0)) in places for inner in ast.walk(node) if isinstance(inner, ast.Call)
        )
    }
    for file, tree in files:
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            made = ast.unparse(node.exc.func) if isinstance(node.exc, ast.Call) else ast.unparse(node.exc)
            in_place = (file, node.exc.lineno) in places or (file, node.lineno) in places
            if not in_place and made not in PASSED_ON and made.rpartition(".")[2] not in makers:
                yield f"{file}:{node.lineno}"


def silent(rows):
    """Rows that end a command and say neither what to type nor what was expected."""
    for row in rows:
        passing = NO_ADVICE_OF_THEIR_OWN.get(row.module, set())
        if row.ends.startswith("exit") and not row.to_type and not {row.when, ...} & passing:
            yield f"{row.module}:{row.line}: {row.when}"


def test_every_raise_statement_has_its_row(places):
    assert list(without_a_row(list(trees()), places)) == []


def test_a_raise_without_a_row_is_found(listed, places):
    """A class that the table knows nothing of, and a row that was lost."""
    files = list(trees())
    foreign = ("rsi_deploy/new.py", ast.parse("import other\nraise other.Trouble('x')"))
    assert list(without_a_row([*files, foreign], places)) == ["rsi_deploy/new.py:2"]
    lost = next(row for row in listed.errors if row.module == "rsi_deploy/io/bundle.py")
    assert list(without_a_row(files, places - {(lost.module, lost.line)})) == [f"{lost.module}:{lost.line}"]


def test_what_is_passed_on_is_still_in_the_code():
    text = "\n".join(ast.unparse(tree) for _, tree in trees())
    assert [name for name in PASSED_ON if f"raise {name}" not in text] == []


@pytest.mark.parametrize("kind", [errors.UsageError, errors.ModelError, errors.GateError])
def test_exit_codes_are_those_of_the_classes(listed, kind):
    rows = [row for row in listed.errors if row.kind == kind.__name__]
    assert {row.ends for row in rows} == {f"exit {kind.exit_code}"}
    assert len(rows) >= 10


def test_every_class_of_ours_that_ends_a_command_is_used(listed):
    assert {kind.__name__ for kind in errors.RsiDeployError.__subclasses__()} <= set(listed.kinds)


def test_every_message_says_what_to_type_or_what_was_expected(listed):
    assert list(silent(listed.errors)) == []
    assert [row.when for row in listed.errors if row.ends.startswith("exit") and not (row.when + row.to_type)] == []


def test_a_message_that_says_nothing_is_found():
    source = "from rsi_deploy.core.errors import UsageError\nraise UsageError(f'{path} is broken')"
    known = {"rsi_deploy/core/errors.py": ast.parse((ROOT / "rsi_deploy" / "core/errors.py").read_text())}
    found = table({**known, "rsi_deploy/new.py": ast.parse(source)})
    assert list(silent(found.errors)) == ["rsi_deploy/new.py:2: {path} is broken"]


def test_every_message_names_something(listed):
    """The file, the site or the value that is meant, or the option or argument to look at."""
    words = "model|data|module|calib|labels|stages|LoadGen|worker|DIR|MODEL|outputs|serve|bench"
    named = re.compile(rf"[{{]|--|_|\b({words})\b")
    texts = [f"{row.when} {row.to_type}" for row in listed.errors if row.ends.startswith("exit")]
    assert [text for text in texts if not named.search(text)] == [
        "this installation has problems see above for what to type",
    ]
    assert not named.search("something is wrong")


def test_a_message_that_a_user_meets_is_a_row(listed, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert run(["export", "any.onnx", "--rank", "4", "-o", str(tmp_path / "full")]) == 2
    said = capsys.readouterr().err.removeprefix("rsi-deploy: ").strip()
    patterns = [
        "; ".join(re.sub(r"\\{\w+\\}", ".*", re.escape(text)) for text in (row.when, row.to_type))
        for row in listed.errors
    ]
    assert any(re.fullmatch(pattern, said) for pattern in patterns), said


def test_it_is_printed(listed, capsys):
    assert run(["doctor", "--errors"]) == 0
    shown = capsys.readouterr().out
    assert f"{len(listed.errors)} errors" in shown
    for kind in listed.kinds:
        assert kind in shown
    assert run(["doctor", "--errors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["errors"] == [row.model_dump() for row in listed.errors]
