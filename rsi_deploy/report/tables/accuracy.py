"""What the terminal shows of accuracy, models side by side; intervals of 95 % in brackets."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rsi_deploy.evaluation.accuracy import AccuracyResult

Named = Sequence[tuple[str, AccuracyResult]]


def print_accuracies(console: Console, results: Named, *, reference: str = "") -> None:
    """Models on the same data.

    Args:
        console: where to.
        results: each model's name and accuracy, in order.
        reference: name of the model the others are compared with; "" where there is none.
    """
    if any(result.kind == "classes" for _, result in results):
        console.print(_classes(results))
    if any(result.values for _, result in results):
        console.print(_values(results))
    some = results[0][1]
    against = f", compared with {reference}" if reference else ""
    console.print(escape(f"{some.samples:,} samples, {_short(some.provider)}{against}; intervals of 95 %"), style="dim")
    for name, result in results:
        if result.paired is not None:
            change, (low, high) = result.paired.change, result.paired.change_interval
            console.print(
                escape(f"{name}: {result.paired.verdict}; top-1 {change:+.2f} points [{low:+.2f}, {high:+.2f}]")
            )
    for note in dict.fromkeys(note for _, result in results for note in result.notes):
        console.print(escape(f"note: {note}"), style="yellow")
    if some.partial:
        console.print("note: interrupted; these are the first samples of the data, in their order", style="yellow")


def _classes(results: Named) -> Table:
    """A line for each share, and for the divergence, that anybody has; a column for each model."""
    lines = {
        "top-1 %": [_interval(found.top1, found.top1_interval, 2) for _, found in results],
        "top-5 %": [_interval(found.top5, found.top5_interval, 2) for _, found in results],
        "same answer %": [_interval(found.agreement, found.agreement_interval, 2) for _, found in results],
        "KL, nats": [_interval(found.divergence, found.divergence_interval, 4) for _, found in results],
    }
    table = _table("", *(escape(name) for name, _ in results))
    for title, cells in lines.items():
        if any(cells):
            table.add_row(title, *map(escape, cells))
    return table


def _values(results: Named) -> Table:
    table = _table("model", "output", "cosine", "relative distance")
    for name, result in results:
        for found in result.values:
            cells = (
                name,
                found.output,
                _interval(found.cosine, found.cosine_interval, 4),
                _interval(found.distance, found.distance_interval, 4),
            )
            table.add_row(*map(escape, cells))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right")
    return table


def _interval(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    if value is None or interval is None:
        return ""
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider").lower()
