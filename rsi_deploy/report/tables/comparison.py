"""What the terminal shows of gates, and of results of several devices side by side."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rsi_deploy.benchmark.ci_gate import GateReport
from rsi_deploy.benchmark.compare import Device, DeviceComparison, DeviceTiming, FigureRow
from rsi_deploy.core.text import human_bytes

STYLES = {"holds": "green", "failed": "bold red", "not shown": "yellow"}


def print_gates(console: Console, report: GateReport) -> None:
    """One line a check."""
    for check in report.checks:
        console.print(f"[{STYLES[check.status]}]{check.status:>9}[/]  {check.gate:<8}  {escape(check.sentence)}")
    for note in report.notes:
        console.print(f"note: {escape(note)}")


def print_comparison(console: Console, result: DeviceComparison) -> None:
    """Devices, then one line a model and configuration with one column a device, then accuracy and sizes."""
    for device in result.devices:
        console.print(escape(_described(device)))
    table = _table("configuration", "model", *(f"{device.name}: median ms [95 %]" for device in result.devices))
    before = ""
    for row in result.timings:
        table.add_row(
            escape(row.configuration if row.configuration != before else ""),
            escape(row.arm),
            *(escape(_timed(timing)) for timing in row.timings),
        )
        before = row.configuration
    console.print(table)
    if result.figures:
        table = _table("", "model", *(device.name for device in result.devices))
        for figure in result.figures:
            table.add_row(
                escape(figure.figure), escape(figure.arm), *(_figure(figure, value) for value in figure.values)
            )
        console.print(table)
    console.print("a verdict compares with the first model on the same device; devices are not tested", style="dim")
    for note in result.notes:
        console.print(f"note: {escape(note)}")


def _described(device: Device) -> str:
    providers = ", ".join(provider.removesuffix("ExecutionProvider").lower() for provider in device.providers)
    gpus = f", {', '.join(device.gpus)}" * bool(device.gpus)
    when = device.created[:10] + ", cut short" * device.partial
    where = f"{device.name}: {device.cpu}, {device.cores} cores{gpus}, {providers}"
    return f"{where}, onnxruntime {device.onnxruntime}, {when}"


def _timed(timing: DeviceTiming | None) -> str:
    if timing is None:
        return "not measured"
    low, high = timing.median_interval_ms
    times = f"{timing.median_ms:.3f} [{low:.3f}, {high:.3f}]"
    return times if timing.speedup is None else f"{times}\n{timing.verdict}"


def _figure(row: FigureRow, value: float | None) -> str:
    if value is None:
        return ""
    return human_bytes(round(value)) if row.unit == "bytes" else f"{value:.2f} {row.unit}"


def _table(first: str, second: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in (first, second):
        table.add_column(escape(title), overflow="fold")
    for title in others:
        table.add_column(escape(title), justify="right")
    return table
