"""CI gates, and results of several devices side by side, on the terminal."""

from rich.console import Console
from rich.markup import escape

from rsi_deploy.benchmark.ci_gate import GateReport
from rsi_deploy.benchmark.compare import Device, DeviceComparison, DeviceTiming, FigureRow
from rsi_deploy.core.text import human_bytes
from rsi_deploy.report.table import Table
from rsi_deploy.report.tables.terminal import print_table

STYLES = {"holds": "green", "failed": "bold red", "not shown": "yellow"}


def print_gates(console: Console, report: GateReport) -> None:
    """Print one line for each check."""
    for check in report.checks:
        console.print(f"[{STYLES[check.status]}]{check.status:>9}[/]  {check.gate:<8}  {escape(check.sentence)}")
    for note in report.notes:
        console.print(f"note: {escape(note)}")


def print_comparison(console: Console, result: DeviceComparison) -> None:
    """Print the devices, a row for each configuration and model with a column for each device, and the figures."""
    for device in result.devices:
        console.print(escape(_described(device)))
    timings = Table(
        caption="",
        columns=("configuration", "model", *(f"{device.name}: median ms [95 %]" for device in result.devices)),
        rows=[(row.configuration, row.arm, *map(_timed, row.timings)) for row in result.timings],
    )
    figures = Table(
        caption="",
        columns=("figure", "model", *(f"#{device.name}" for device in result.devices)),
        rows=[(row.figure, row.arm, *(_figure(row, value) for value in row.values)) for row in result.figures],
    )
    print_table(console, timings)
    print_table(console, figures)
    console.print("verdicts compare with the first model on the same device; devices are not compared", style="dim")
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
