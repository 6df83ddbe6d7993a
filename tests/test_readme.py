"""What the README says can be typed."""

import re
import shlex
from pathlib import Path

import click
import pytest

from rsi_deploy.cli import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)


def commands(text):
    """The rsi-deploy command lines of a text, as words, comments and continuations taken out."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if "rsi-deploy" in line and "pip" not in line]
    return [w for w in words if w and w[0].endswith("rsi-deploy")]


COMMANDS = [command for kind, text in BLOCKS if kind == "sh" for command in commands(text)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_parses(command):
    verb = cli.commands[command[1]]
    arguments = [a for a in command[2:] if a != "|"]
    assert verb.make_context(command[1], arguments).params


def test_a_wrong_command_would_not_parse():
    with pytest.raises(click.UsageError):
        cli.commands["export"].make_context("export", ["m.onnx", "--ranks", "3", "-o", "x"])
    assert len(COMMANDS) >= 5


def test_the_demo_is_the_makefile_s():
    recipe = re.search(r"^demo:.*?\n\t(.*?)\n\n", (ROOT / "Makefile").read_text(), re.S | re.M)[1].replace("\\\n", " ")
    make = shlex.split(recipe.replace("$(BIN)", ".venv/bin").replace("$(DEMO)", "demo-bundle"))
    readme = next(c for c in COMMANDS if "samples.digits:cnn" in c)
    assert set(make) - {"--force"} == set(readme)


def test_the_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    names = {}
    exec(code, names)
    assert names["report"].dense.bytes > names["report"].compressed.bytes
    assert (tmp_path / "mlp-bundle" / "model.onnx").is_file()
    assert any(record.decision == "split" for record in names["records"])


def test_every_verb_is_in_the_table():
    for verb in set(cli.commands) - {"schema"}:
        assert f"| `{verb}" in TEXT, verb
