"""Options, goals and result files of all benchmark scripts."""

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from rsi_deploy.core.errors import RsiDeployError, UsageError
from rsi_deploy.io.atomic import write_text
from rsi_deploy.runtime.machine import environment

GATE_EXIT = 4
NO_NET = "no net could be loaded"
"""Begin of the error where a machine has none of the nets."""
Row = TypeVar("Row")


class UnavailableError(Exception):
    """The error of a net that this machine does not have; the message says why in one line."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A goal of a script's docstring and whether it held; `row` names what was measured, with the numbers."""

    name: str
    held: bool
    row: str


def parser(doc: str, module: str) -> argparse.ArgumentParser:
    """Return a parser with the script's docstring as help and the options of all scripts."""
    options = argparse.ArgumentParser(
        prog=f"python -m {module}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="fewer cases, under a minute on two quiet cores")
    options.add_argument("--json", type=Path, metavar="FILE", help="store all results, the machine and the command")
    options.add_argument("--markdown", type=Path, metavar="FILE", help="store the tables as Markdown")
    options.add_argument("--check", action="store_true", help="exit 4 when a goal named above is missed")
    return options


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a script's `main` and end the process; a user's error is one line on stderr."""
    try:
        code = main(sys.argv[1:])
    except RsiDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    raise SystemExit(code)


def progress(text: str) -> None:
    """Print one line on stderr."""
    print(text, file=sys.stderr, flush=True)


def console() -> Console:
    """Return the console for tables: stdout, 120 columns wide where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def check_writable(*paths: Path | None) -> None:
    """Check before the long work that the result files can be written.

    Raises:
        UsageError: its folder does not exist.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"the folder of {path} does not exist: make it first, mkdir -p {path.parent}")


def measured_nets(names: Iterable[str], settings: dict[str, Any], measure: Callable[[str], Sequence[Row]]) -> list[Row]:
    """Return the rows of all nets, and store in `settings` which were left out and the wall-clock seconds.

    Raises:
        UsageError: no net could be loaded.
    """
    started, rows = time.perf_counter(), list[Row]()
    settings["left_out"] = {}
    for name in names:
        try:
            rows += measure(name)
        except UnavailableError as reason:
            settings["left_out"][name] = str(reason)
            progress(f"{name} is left out: {reason}")
    if not rows:
        raise UsageError(f"{NO_NET}: {settings['left_out']}")
    settings["wall_seconds"] = time.perf_counter() - started
    return rows


def finish(
    module: str,
    arguments: Sequence[str],
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    table: str,
    goals: Sequence[Goal],
    **results: Any,
) -> int:
    """Print the table and the goals, store both with the results, and return the exit code.

    Args:
        module: module of the script.
        arguments: its command line.
        args: options of all scripts (`parser`).
        settings: settings of the run.
        table: all rows in Markdown.
        goals: goals of the script.
        results: rows to be stored.
    """
    print(table)
    stored = document(module, arguments, settings, **results, goals=[asdict(goal) for goal in goals])
    write(args.json, stored)
    write(args.markdown, table)
    return judge(goals, args.check)


def document(module: str, arguments: Sequence[str], settings: Mapping[str, Any], **results: Any) -> dict[str, Any]:
    """Return the JSON document of one run: `results` with command, date, machine and settings."""
    return {
        "benchmark": module,
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": environment().model_dump(mode="json"),
        "settings": dict(settings),
        **results,
    }


def write(path: Path | None, content: str | Mapping[str, Any]) -> None:
    """Write text or a JSON document atomically."""
    if path is None:
        return
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    write_text(path, text)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of these cells."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def judge(goals: Sequence[Goal], check: bool) -> int:
    """Print which goals held and return the exit code: with `check`, 4 when one was missed."""
    out = console()
    for goal in goals:
        out.print(f"{'held  ' if goal.held else 'MISSED'}  {goal.name}: {goal.row}", soft_wrap=True)
    missed = [goal for goal in goals if not goal.held]
    if check:
        for goal in missed:
            print(f"goal missed: {goal.name}: {goal.row}", file=sys.stderr)
    return GATE_EXIT if check and missed else 0
