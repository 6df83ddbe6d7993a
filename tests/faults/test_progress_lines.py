"""Progress of a long run in a log: a line for each step, and within a step at most one a minute."""

import ast
import json
import re
from pathlib import Path

import pytest
from calibrated_nets import IMAGE, conv_net, inputs

import rsi_deploy
from rsi_deploy.cli import run
from rsi_deploy.cli.progress_lines import MEANINGS, ProgressLines
from rsi_deploy.core.progress import at, listening, step


class Clock:
    """A clock whose time the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log():
    """Return the lines, the clock, and the listener that writes the lines."""
    lines, clock = [], Clock()
    return lines, clock, ProgressLines(lines.append, clock)


def test_a_step_has_one_line_at_its_start(log):
    lines, clock, listener = log
    with listening(listener):
        with step("trace"):
            clock.now += 3
        with step("certificate"):
            clock.now += 3
    assert len(lines) == 2
    assert lines[0] == f"[0:00] trace: {MEANINGS['trace']}"
    assert lines[1].startswith("[0:03] certificate: ")


def test_within_a_step_there_is_a_line_a_minute_with_the_share_and_the_time_left(log):
    lines, clock, listener = log
    with listening(listener), step("calibrate and plan"):
        for number in range(600):
            at(f"conv{number}", number, 600)
            clock.now += 1
    within = [line for line in lines if "done (" in line]
    assert len(within) == 9
    assert within[0] == "[1:00] calibrate and plan: conv60, 60 of 600 done (10 %), about 9 minutes left"
    assert "conv540, 540 of 600 done (90 %), about 1 minute left" in within[-1]
    assert lines[-1] == "[10:00] calibrate and plan: done after 10:00"


def test_a_slow_piece_of_work_has_a_line_at_the_start_of_the_next(log):
    lines, clock, listener = log
    with listening(listener), step("cost table"):
        for number in range(3):
            at(f"shape{number}", number, 3)
            clock.now += 200
    assert [line.split("] ")[0] for line in lines] == ["[0:00", "[3:20", "[6:40", "[10:00"]


def test_time_left_is_of_the_present_count(log):
    lines, clock, listener = log
    with listening(listener), step("calibrate and plan"):
        for number in range(10):  # fast
            at("first", number, 10)
            clock.now += 1
        for number in range(4):  # and slow
            at("second", number, 10)
            clock.now += 100
    assert "second, 1 of 10 done (10 %), about 15 minutes left" in lines[1]


def test_nested_steps_are_indented_and_end_after_a_failure(log):
    lines, _clock, listener = log
    with listening(listener):
        with pytest.raises(ValueError, match="no"), step("point 1 of 2"), step("trace"):
            raise ValueError("no")
        with step("latency"):
            pass
    assert [line.index("]") for line in lines] == [5, 5, 5]
    assert [len(line[7:]) - len(line[7:].lstrip()) for line in lines] == [0, 2, 0]


def test_lines_are_held_back_for_some_seconds_and_none_is_lost():
    lines, clock = [], Clock()
    listener = ProgressLines(lines.append, clock, after=10)
    with listening(listener):
        with step("first"):
            clock.now += 2
        with step("second"):
            at("samples", 1, 100)
            assert lines == []
            clock.now += 11
            at("samples", 2, 100)
            assert lines == ["[0:00] first", "[0:02] second"]


def test_lines_held_back_at_the_end_can_be_written(log):
    lines, clock = [], Clock()
    listener = ProgressLines(lines.append, clock, after=10)
    with listening(listener), step("first"):
        pass
    assert lines == []
    listener.flush()
    assert lines == ["[0:00] first"]


def test_control_codes_in_names_are_shown(log):
    lines, clock, listener = log
    with listening(listener), step("spectra"):
        clock.now += 61
        at("conv\x1b[31m\nleft", 1, 2)
    assert not {"\x1b", "\n"} & set("".join(lines))
    assert "conv" in lines[1]
    assert "left" in lines[1]


def test_a_function_that_is_called_from_python_writes_nothing(capsys, log):
    lines, _, listener = log
    with step("trace"):
        at("conv", 0, 1)
    assert lines == []
    assert capsys.readouterr() == ("", "")
    with listening(listener), step("trace"):  # a listener would hear the same step
        pass
    assert lines


def test_every_step_of_an_export_has_a_description():
    names = set()
    for path in Path(rsi_deploy.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                names |= {node.args[0].value} if called in ("stage", "step") else set()
    assert names == MEANINGS.keys()


def steps_in(text):
    """Return the names of the steps in the lines, in order."""
    found = [re.fullmatch(r"\[\d+:\d\d\] ( *)([^:]+)(: .*)?", line) for line in text.splitlines()]
    return [(len(match[1]) // 2, match[2]) for match in found if match]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conv_net(tmp_path / "m.onnx")
    inputs(tmp_path / "c.npz", *IMAGE, count=64)
    return tmp_path


def test_an_export_writes_its_stages_to_stderr(here, capsys):
    argv = ["export", "m.onnx", "-o", "b", "--calib", "c.npz", "--keep-macs", "70%", "--no-bench", "--json"]
    assert run(argv) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [name for _, name in steps_in(err)] == [stage["name"] for stage in report["stages"]]


def test_a_sweep_writes_its_points_and_their_steps(here, capsys):
    argv = ["sweep", "m.onnx", "-o", "s", "--calib", "c.npz", "--points", "2", "--no-bench", "--json"]
    assert run(argv) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    steps = steps_in(err)
    assert [name for depth, name in steps if not depth] == ["point 1 of 2, 95% of macs", "point 2 of 2, 30% of macs"]
    assert (1, "calibrate and plan") in steps


def test_a_profile_writes_what_it_times(here, capsys):
    assert run(["profile", "m.onnx", "-o", "cost.json", "--budget", "1s", "--fresh", "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert [name for _, name in steps_in(err)] == ["load", "cost table"]


def test_an_export_that_fails_at_once_writes_only_its_error(here, capsys):
    argv = ["export", "m.onnx", "-o", "b", "--calib", "c.npz", "--keep-macs", "1%", "--no-bench"]
    assert run(argv) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rsi-deploy: ")


@pytest.mark.parametrize("argv", [["inspect", "m.onnx", "--json"], ["verify", "b", "--json"]])
def test_short_verbs_write_lines_only_if_they_take_long(here, capsys, monkeypatch, argv):
    if argv[0] == "verify":
        assert run(["export", "m.onnx", "-o", "b", "--rank", "25%", "--no-bench"]) == 0
        capsys.readouterr()
    assert run(argv) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rsi_deploy.cli.terminal.QUIET", 0.0)
    assert run(argv) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert len(steps_in(err)) >= 1
