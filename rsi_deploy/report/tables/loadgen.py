"""An MLPerf LoadGen test on the terminal."""

from rich.console import Console
from rich.markup import escape

from rsi_deploy.benchmark.mlperf.loadgen import LoadGenResult
from rsi_deploy.report.table import Table
from rsi_deploy.report.tables.terminal import print_table

_NAMES = {"min": "min", "50": "p50", "90": "p90", "95": "p95", "97": "p97", "99": "p99", "99.9": "p99.9", "max": "max"}


def print_loadgen(console: Console, label: str, result: LoadGenResult) -> None:
    """Print LoadGen's verdict with its reasons, its percentiles, and this tool's figures."""
    verdict = "[green]VALID[/]" if result.valid else "[red]INVALID[/]"
    console.print(f"{escape(label)}: LoadGen {result.scenario}: {verdict}, {escape(result.headline)}")
    for reason in result.reasons:
        console.print(f"  {escape(reason)}")
    shown = [key for key in _NAMES if key in result.latency_ms]
    percentiles = Table(
        caption="",
        columns=[f"#{_NAMES[key]} ms" for key in shown],
        rows=[[f"{result.latency_ms[key]:.3f}" for key in shown]] if shown else [],
    )
    print_table(console, percentiles)
    for line in _sentences(result):
        console.print(f"  {escape(line)}")


def _sentences(result: LoadGenResult) -> list[str]:
    lines = []
    if result.per_second is not None:
        lines.append(f"{result.per_second:.4g} samples a second")
    if result.own_p90_ms is not None and "90" in result.latency_ms:
        difference = result.latency_ms["90"] / result.own_p90_ms - 1
        lines.append(
            f"p90 of the same calls by this tool's clock: {result.own_p90_ms:.3f} ms; LoadGen's is {difference:+.1%}"
        )
    if result.target_latency_ms is not None and result.target_qps is not None:
        lines.append(
            f"target: {result.target_qps:.4g} queries a second, 99 % of them within {result.target_latency_ms:.4g} ms"
        )
    nodes = ", ".join(f"{count} nodes on {name}" for name, count in result.provider_nodes.items())
    lines.append(f"batch {result.batch}, {result.how}; {nodes}; LoadGen {result.loadgen}")
    return lines
