"""What the terminal shows of a run of `bench`: one line an arm and configuration, then what else was measured."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rsi_deploy.benchmark.result import BenchDocument, BenchResult, VariantResult
from rsi_deploy.benchmark.sections import Bursts, ColdStart, Memory, Profile, SessionStreams, Throughput
from rsi_deploy.benchmark.statistics import direction

Titled = tuple[str, Table]

WIDE = 120  # columns from which the tail and a bar are shown
_BAR = 12
_STYLES = {1: "green", 0: "", -1: "red"}
_MOST_OPS, _MOST_SITES = 8, 15


def print_document(console: Console, document: BenchDocument) -> None:
    """All of a run but its accuracy and LoadGen."""
    print_cells(console, document.cells)
    shown: list[Titled] = [
        *([_memory(document.memory)] if document.memory else []),
        *([_cold_start(document.cold_start)] if document.cold_start else []),
        *([_bursts(document.bursts)] if document.bursts else []),
        *([_streams(document.streams)] if document.streams else []),
        *([_throughput(document.throughput)] if document.throughput else []),
        *([_profile(document.profile)] if document.profile else []),
    ]
    for title, table in shown:
        console.print(title, style="bold")
        console.print(table)
    e = document.environment
    cores = f"cores {','.join(map(str, document.cells[0].pinned))} of {e.cores}" if document.cells[0].pinned else ""
    load = (
        ""
        if e.load_average is None
        else f"load {e.load_average[0]:.1f}" + (f" to {document.load_after[0]:.1f}" if document.load_after else "")
    )
    console.print(
        escape(", ".join(part for part in (e.cpu, cores or f"{e.cores} cores", load, document.tool) if part)),
        style="dim",
    )
    for note in document.notes:
        console.print(f"note: {escape(note)}", style="yellow")
    if document.partial:
        console.print("partial result", style="bold yellow")


def print_cells(console: Console, cells: Sequence[BenchResult]) -> None:
    """One line an arm; configurations apart, and under them what they have in common."""
    wide = console.width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if len(cells) > 1:
        table.add_column("configuration", style="bold")
    table.add_column("model", overflow="fold")
    for name in ("median ms", *(("95 %",) if wide else ()), "p90", *(("p99", "p99.9", "calls") if wide else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("against the first")
    if wide:
        table.add_column("", no_wrap=True)
    for cell in cells:
        slowest = max(arm.median_ms for arm in cell.arms)
        for place, arm in enumerate(cell.arms):
            first = [_shown(cell, cells) if not place else ""] * (len(cells) > 1)
            table.add_row(*first, *_arm(arm, slowest, wide), end_section=place == len(cell.arms) - 1)
    console.print(table)
    one = cells[0]
    nodes = "; ".join(
        f"{arm.label}: " + ", ".join(f"{count} on {name}" for name, count in arm.provider_nodes.items())
        for arm in one.arms
    )
    seconds = sum(cell.seconds for cell in cells)
    blocks = "" if len(cells) > 1 else f", {one.arms[0].blocks} blocks"
    console.print(
        f"{one.provider}, {'' if len(cells) > 1 else _shown(one, cells) + ', '}onnxruntime {one.onnxruntime}, "
        f"{seconds:.1f} s{blocks}",
        style="dim",
    )
    console.print(f"nodes run: {escape(nodes)}", style="dim")
    for note, said in _notes(cells).items():
        where = f"{', '.join(said)}: " if len(cells) > 1 and len(said) < len(cells) else ""
        console.print(f"note: {escape(where + note)}", style="yellow")


def _arm(arm: VariantResult, slowest: float, wide: bool) -> list[str]:
    style = _STYLES[direction(arm.speedup_interval)] if arm.speedup_interval else "dim"
    words = "" if arm.speedup is None else arm.verdict
    low, high = arm.median_interval_ms
    tails = [f"{arm.percentiles_ms[p]:.4g}" if p in arm.percentiles_ms else "-" for p in ("p90", "p99", "p99.9")]
    cells = [escape(arm.label), f"{arm.median_ms:.4g}"]
    cells += [f"{low:.4g} - {high:.4g}"] * wide + (tails if wide else tails[:1]) + [f"{arm.n:,}"] * wide
    cells.append(f"[{style}]{escape(words)}[/]" if style and words else escape(words))
    return cells + ["█" * max(1, round(_BAR * arm.median_ms / slowest))] * wide


def _shown(cell: BenchResult, cells: Sequence[BenchResult]) -> str:
    """The configuration, with its inputs' shapes where cells differ in them alone."""
    same = [other for other in cells if other.name == cell.name]
    if len(same) == 1:
        return cell.name
    kinds = [f"{name} {kind.partition(' ')[2]}" for name, kind in cell.inputs.items()]
    differing = [
        kind for index, kind in enumerate(kinds) if len({list(other.inputs.values())[index] for other in same}) > 1
    ]
    return ", ".join([cell.name, *differing[:2]])


def _notes(cells: Sequence[BenchResult]) -> dict[str, list[str]]:
    """Note -> the configurations that carry it."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        for note in cell.notes:
            found.setdefault(note, []).append(_shown(cell, cells))
    return found


def _table(*columns: str) -> Table:
    """The first column to the left, a last one named "" too, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        number = bool(place and column)
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 1000 else f"{per_second:.4g}"


def _memory(rows: Sequence[Memory]) -> Titled:
    limit = rows[0].limit_bytes
    table = _table("model", "imports MB", "loaded MB", "peak MB", *[""] * bool(limit))
    for r in rows:
        fits = "" if r.fits is None else "fits" if r.fits else f"[red]does not fit[/]: stopped in {r.stopped_in}"
        said = f"{fits} under {(limit or 0) / 1e6:.0f} MB"
        sizes = (_megabytes(size) for size in (r.import_bytes, r.loaded_bytes, r.peak_bytes))
        table.add_row(escape(r.label), *sizes, *[said] * bool(limit))
    return "Resident memory, a process each", table


def _cold_start(rows: Sequence[ColdStart]) -> Titled:
    table = _table("model", "process", "import", "load", "first", "total", "")
    for r in rows:
        parts = (r.process_ms, r.import_ms, r.load_ms, r.first_ms, r.total_ms)
        table.add_row(escape(r.label), *(f"{part:.4g}" for part in parts), _against(r))
    return "Cold start, ms", table


def _bursts(rows: Sequence[Bursts]) -> Titled:
    title = f"Bursts of {rows[0].calls} after {rows[0].gap_ms:g} ms idle, ms"
    table = _table("model", "first call", "rest", "bursts", "")
    for r in rows:
        table.add_row(escape(r.label), f"{r.first_ms:.4g}", f"{r.rest_ms:.4g}", str(r.bursts), _against(r))
    return title, table


def _streams(rows: Sequence[SessionStreams]) -> Titled:
    table = _table("model", "streams", "samples/s", "95 %", "median ms", "p90 ms")
    for r in rows:
        low, high = r.per_second_interval
        tail = f"{r.percentiles_ms['p90']:.4g}" if "p90" in r.percentiles_ms else "-"
        ends = f"{_rate(low)} - {_rate(high)}"
        table.add_row(escape(r.label), str(r.streams), _rate(r.per_second), ends, f"{r.median_ms:.4g}", tail)
    return "Streams on one session", table


def _throughput(rows: Sequence[Throughput]) -> Titled:
    batches = sorted({batch for r in rows for batch in r.batches})
    table = _table("model", *(str(batch) for batch in batches), "best at")
    for r in rows:
        rates = dict(zip(r.batches, r.per_second, strict=True))
        cells = (_rate(rates[batch]) if batch in rates else "-" for batch in batches)
        table.add_row(escape(r.label), *cells, str(r.best))
    return "Throughput, samples/s at batch", table


def _profile(rows: Sequence[Profile]) -> Titled:
    """Op types, then split sites; a row each, an arm a column."""
    table = _table("", *(escape(r.label) for r in rows))
    ops = sorted({op for r in rows for op in r.op_ms}, key=lambda op: -max(r.op_ms.get(op, 0.0) for r in rows))
    for place, op in enumerate(ops[:_MOST_OPS]):
        last = place == min(len(ops), _MOST_OPS) - 1
        table.add_row(escape(op), *_columns(rows, lambda r, op=op: r.op_ms.get(op)), end_section=last)  # type: ignore[misc]
    times = [{site.site: site.total_ms for site in r.sites} for r in rows]
    sites = sorted({site for found in times for site in found}, key=lambda s: -max(t.get(s, 0.0) for t in times))
    for site in sites[:_MOST_SITES]:
        table.add_row(escape(site), *("-" if site not in found else f"{found[site]:.3f}" for found in times))
    if len(sites) > _MOST_SITES:
        table.add_row(f"{len(sites) - _MOST_SITES} more sites: --json", *[""] * len(rows))
    return "Time per op type and split site, profiled, ms a call", table


def _columns(rows: Sequence[Profile], of: Callable[[Profile], float | None]) -> list[str]:
    return ["-" if (value := of(r)) is None else f"{value:.3f}" for r in rows]


def _against(row: ColdStart | Bursts) -> str:
    return "" if "compared with" in row.verdict else escape(row.verdict)


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"
