"""Where results and progress go: stdout, and on stderr bars where it is a terminal, else lines for a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from rsi_deploy.cli.progress_lines import ProgressLines
from rsi_deploy.core.progress import listening
from rsi_deploy.core.text import on_terminal

QUIET = 5.0
"""Seconds for which lines of progress are held back, so that what fails at once gives one line, its error."""

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.text import Text


def console(*, stderr: bool = False) -> "Console":
    """Results, on stdout; on stderr what stands beside a JSON document."""
    from rich.console import Console

    class Guarded(Console):
        """One that shows control codes in names from files, and does not obey them."""

        def render_str(self, text: str, **how: Any) -> "Text":
            return super().render_str(on_terminal(text), **how)

    # A pipe has no width: tables must not be cut for whoever reads it.
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else 160
    return Guarded(width=width, highlight=False, soft_wrap=not terminal, stderr=stderr, emoji=False)


class _Bar:
    """A bar that shows the step, or the piece of work within it; a `rsi_deploy.core.progress.Listener`."""

    def __init__(self, bar: "Progress", task: "TaskID") -> None:
        self._bar, self._task = bar, task
        self._series = (-1, 0)  # last piece and number of pieces

    def begin(self, name: str) -> None:
        """See `Listener`."""
        self._bar.update(self._task, description=_plain(name))

    def end(self, name: str) -> None:
        """See `Listener`."""

    def at(self, what: str, index: int, total: int) -> None:
        """See `Listener`."""
        last, pieces = self._series
        if index <= last or total != pieces:  # another count, with its own rate
            self._bar.reset(self._task, total=total)
        self._series = (index, total)
        self._bar.update(self._task, description=_plain(what), completed=index, total=total)


def _plain(name: str) -> str:
    """A name as it is, without control codes or markup."""
    from rich.markup import escape

    return escape(on_terminal(name))


@contextmanager
def progress_bar(unit: str = "sites", *, is_short: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on stderr: a bar on a terminal, else lines (see `progress_lines`).

    Args:
        unit: what is counted.
        is_short: whether runs are mostly short: the lines of those that are so are not written at all.
    """
    if not sys.stderr.isatty():
        lines = ProgressLines(lambda line: click.echo(line, err=True), after=QUIET)
        with listening(lines):
            yield lines.at
        if not is_short:
            lines.flush()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        shown = _Bar(bar, bar.add_task("loading", total=None))
        with listening(shown):
            yield shown.at
