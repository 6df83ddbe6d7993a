"""The renderer for terminals: one function that prints a `rsi_deploy.report.table.Table`."""

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from rsi_deploy.core.text import on_terminal
from rsi_deploy.report.table import Table

WIDE = 120
"""Columns of a terminal from which it shows every column of a table."""
LONG_HEAD = 9
"""Number of characters from which the head of a column of numbers has a line for each word."""
STYLES = {"good": "green", "bad": "red", "neutral": "", "missing": "dim"}


def print_table(console: Console, table: Table, *, limit: int = 0) -> None:
    """Print a table under its caption; print nothing if it has no rows.

    In a table whose first column repeats, it is shown once for each group of rows.

    Args:
        console: the terminal.
        table: the table.
        limit: most rows to print; 0 prints all.
    """
    if not table.rows:
        return
    if table.caption:
        console.print(Text(on_terminal(table.caption)), style="bold")
    if console.width < WIDE:
        table = table.without(table.details)
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head, number in table.heads:
        text = head.replace(" ", "\n") if number and len(head) >= LONG_HEAD else head
        drawn.add_column(
            Text(on_terminal(text)), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    rows = table.rows[:limit] if limit else table.rows
    firsts = [row[0] for row in rows]
    grouped = len(set(firsts)) < len(firsts)
    for index, row in enumerate(rows):
        cells = [Text(on_terminal(cell)) for cell in row]
        if table.tones:
            cells[-1].stylize(STYLES[table.tones[index]])
        if index and firsts[index - 1] == row[0]:
            cells[0] = Text("")
        ends = grouped and firsts[index + 1 : index + 2] != [row[0]]
        drawn.add_row(*cells, end_section=ends)
    console.print(drawn)
    if len(rows) < len(table.rows):
        console.print(f"{len(table.rows) - len(rows)} more rows: --json", style="dim")


def print_notes(console: Console, notes: list[str]) -> None:
    """Print one line for each note."""
    for note in notes:
        console.print(Text(on_terminal(f"note: {note}"), style="yellow"))
