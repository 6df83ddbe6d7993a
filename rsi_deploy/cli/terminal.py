"""Where results and progress go: stdout, and bars on stderr where it is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rsi_deploy.report.text import on_terminal

if TYPE_CHECKING:
    from rich.console import Console
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


@contextmanager
def progress_bar(unit: str = "sites") -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on stderr with the site at work; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda name, index, total: bar.update(
            task, description=escape(on_terminal(name)), completed=index + 1, total=total
        )
