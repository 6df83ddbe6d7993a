"""Names from files wherever they are shown: terminals, pages, model cards, commands to type, names of files."""

import ast
import io
import logging
import re

import numpy as np
import onnx
import pytest
from hostile_models import model
from onnx import helper, numpy_helper

import rsi_deploy
from rsi_deploy.cli import run
from rsi_deploy.cli.terminal import console
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.text import in_markdown, on_terminal
from rsi_deploy.io.limits import first_line, quoted_name
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.packaging.triton_config import proto_text
from rsi_deploy.report.card import model_card

NAMES = (
    "clear\x1b[2J\x1b]0;title\x07",
    "red[red]bold[/red][/]",
    "smile:bomb:",
    "\u202egnirts\u2066\u200b",
    "line\nfake: all is well",
    "return\rover",
    "c1\x9b31m\x85",
    '"; import os; os.system("true") #',
    "`code` | cell [a](javascript:x) <script>alert(1)</script>",
    "../../../etc/passwd",
    "tag\U000e0041",
)
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\U000e0000-\U000e007f]")


def weighty(name):
    """A MatMul of 32 x 32, all of whose names are this one."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32), f"w{name}")
    node = helper.make_node("MatMul", [f"x{name}", f"w{name}"], ["y"], name=name)
    made = model([node], [weight], shape=("n", 32))
    made.graph.input[0].name = f"x{name}"
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 32]))
    return made


@pytest.fixture(params=NAMES, ids=range(len(NAMES)))
def named(request, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(weighty(request.param), path)
    return request.param, path


def test_on_a_terminal_nothing_steers(named, capsys):
    name, path = named
    assert run(["inspect", str(path), "--rank", "4"]) == 0
    printed = capsys.readouterr().out
    assert not STEERS.search(printed)
    for mark in ("[red]bold[/red][/]", ":bomb:"):
        assert mark not in name or mark in printed
    broken = weighty(name)
    broken.graph.node[0].input[1] = f"no{name}"
    onnx.save(broken, path)
    assert run(["inspect", str(path)]) == 3
    said = capsys.readouterr().err
    assert not STEERS.search(said)
    assert said.count("\n") == 1


def test_the_check_for_what_steers_can_fail():
    assert all(STEERS.search(name) for name in NAMES if name != on_terminal(name))
    assert sum(name != on_terminal(name) for name in NAMES) >= 5


def test_a_bundle_of_such_names(named, tmp_path):
    """Everything that `export` writes: no path is made of a name, and no text can be left by one."""
    _, path = named
    report = rsi_deploy.export(str(path), output=tmp_path / "out", rank=4, measure=False)
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    bundle = {"model.onnx", "report.json", "report.html", "README.md", "manifest.json", "plan.json", "recipe.toml"}
    assert files == {"m.onnx", *(f"out/{file}" for file in bundle)}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    words, _, rest = card.partition("```python\n")
    code, _, more = rest.partition("```")
    for text in (page, words, more):
        assert not STEERS.search(text)
        assert "<script>" not in text
    assert not STEERS.search(code)
    assert "\nfake" not in card  # in HTML it is a space
    assert "](javascript" not in words + more
    assert "`code`" not in words + more
    assert len(ast.parse(code).body) == 4  # two imports, a session, a run
    table = card.splitlines()[next(i for i, line in enumerate(card.splitlines()) if line.startswith("| site ")) :][:3]
    head, _, site = [line.count("|") - line.count("\\|") for line in table]
    assert table[2].startswith("| w")
    assert head == site
    assert model_card(report, tmp_path / "out" / "model.onnx") == card
    assert rsi_deploy.verify(tmp_path / "out").ok


def test_logs_do_not_steer(capsys):
    run(["--verbose", "doctor", "--help"])
    root = logging.getLogger()
    stream = io.StringIO()
    for handler in root.handlers:
        record = logging.LogRecord("n", logging.ERROR, "f", 1, "node %s", ("a\x1b[31m",), None)
        stream.write(handler.format(record))
    assert "\x1b" not in stream.getvalue() or not root.handlers


def test_a_console_escapes_markup(capsys):
    console().print("a\x1b[2J:bomb:", markup=False)
    assert capsys.readouterr().out == "a\\x1b[2J:bomb:\n"


@pytest.mark.parametrize("name", NAMES)
def test_in_messages_and_markdown_a_name_is_one_line(name):
    for text in (quoted_name(name), in_markdown(name), first_line(ValueError(name))):
        assert not STEERS.search(text)
        assert "\n" not in text
    assert len(quoted_name(name * 1000)) < 400


@pytest.mark.parametrize("name", NAMES)
def test_in_a_triton_config_a_name_stays_a_string(name):
    line = proto_text({"name": name}).rstrip("\n")
    assert re.fullmatch(r'name: "([^"\\\x00-\x1f\x7f]|\\[\\"n]|\\\d{3})*"', line)


def test_an_operator_of_any_name(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(model([helper.make_node("Op\x1b[31m" + "x" * 500, ["nowhere"], ["y"])]), path)
    with pytest.raises(ModelError, match=r"node 'Op\\x1b\[31mx+\.\.\.x+' 'y' uses 'nowhere'"):
        read_proto(path)
