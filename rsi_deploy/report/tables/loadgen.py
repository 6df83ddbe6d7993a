"""What the terminal shows of an MLPerf LoadGen test."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rsi_deploy.benchmark.loadgen import LoadGenResult

_NAMES = {"min": "min", "50": "p50", "90": "p90", "95": "p95", "97": "p97", "99": "p99", "99.9": "p99.9", "max": "max"}


def print_loadgen(console: Console, label: str, result: LoadGenResult) -> None:
    """LoadGen's own verdict first, with its reasons; then its figures, and the tool's beside them."""
    verdict = "[green]VALID[/]" if result.valid else "[red]INVALID[/]"
    console.print(f"{escape(label)}: LoadGen {result.scenario}: {verdict}, {escape(result.headline)}")
    for reason in result.reasons:
        console.print(f"  {escape(reason)}")
    if result.latency_ms:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        shown = [key for key in _NAMES if key in result.latency_ms]
        for key in shown:
            table.add_column(f"{_NAMES[key]} ms", justify="right")
        table.add_row(*(f"{result.latency_ms[key]:.3f}" for key in shown))
        console.print(table)
    for line in facts(result):
        console.print(f"  {escape(line)}")


def facts(result: LoadGenResult) -> list[str]:
    """The sentences under the table."""
    lines = []
    if result.per_second is not None:
        lines.append(f"{result.per_second:.4g} samples a second")
    if result.own_p90_ms is not None and "90" in result.latency_ms:
        apart = result.latency_ms["90"] / result.own_p90_ms - 1
        lines.append(
            f"p90 of the same calls by this tool's clock: {result.own_p90_ms:.3f} ms; LoadGen's is {apart:+.1%}"
        )
    if result.target_latency_ms is not None and result.target_qps is not None:
        lines.append(
            f"asked for {result.target_qps:.4g} queries a second, 99 % of them in {result.target_latency_ms:.4g} ms"
        )
    nodes = ", ".join(f"{count} nodes on {name}" for name, count in result.provider_nodes.items())
    lines.append(f"batch {result.batch}, {result.how}; {nodes}; LoadGen {result.loadgen}")
    return lines
