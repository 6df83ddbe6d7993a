"""A run of `bench` on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from rsi_deploy.benchmark.result import BenchDocument, BenchResult
from rsi_deploy.report.bench_tables import (
    bursts_table,
    cell_notes,
    cold_start_table,
    generation_table,
    how_it_ran,
    latency_table,
    machine_text,
    memory_table,
    op_table,
    site_time_table,
    streams_table,
    throughput_table,
)
from rsi_deploy.report.tables.terminal import print_notes, print_table

MOST_ROWS = 15
"""Most op types and split sites of a profile."""


def print_document(console: Console, document: BenchDocument) -> None:
    """Print everything of a run but accuracy and LoadGen."""
    if document.generation:
        print_table(console, generation_table(document))
        both = document.cells[0].model_copy(update={"phase": "call"})  # what is said holds for both phases
        console.print(escape(how_it_ran(both)), style="dim")
        print_notes(console, cell_notes(document.cells))
    else:
        print_cells(console, document.cells)
    for table in (
        memory_table(document.memory).without_empty(),
        cold_start_table(document.cold_start),
        bursts_table(document.bursts),
        streams_table(document.streams),
        throughput_table(document.throughput),
    ):
        print_table(console, table)
    for table in (op_table(document.profile), site_time_table(document.profile)):
        print_table(console, table, limit=MOST_ROWS)
    environment, pinned = document.environment, document.cells[0].pinned
    parts = [machine_text(environment), *([f"pinned to cores {', '.join(map(str, pinned))}"] if pinned else [])]
    if environment.load_average is not None:
        after = f" to {document.load_after[0]:.1f}" if document.load_after else ""
        parts.append(f"load {environment.load_average[0]:.1f}{after}")
    console.print(escape(", ".join([*parts, document.tool])), style="dim")
    print_notes(console, list(document.notes))
    if document.partial:
        console.print("partial result", style="bold yellow")


def print_cells(console: Console, cells: Sequence[BenchResult]) -> None:
    """Print one row for each configuration and model, and how they were measured."""
    print_table(console, latency_table(cells, name_cells=len(cells) > 1))
    console.print(escape(how_it_ran(cells[0])), style="dim")
    if len(cells) > 1:
        console.print(f"all configurations: {sum(cell.seconds for cell in cells):.1f} s", style="dim")
    print_notes(console, cell_notes(cells))
