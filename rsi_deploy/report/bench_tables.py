"""The tables and sentences of a `bench` document, for the terminal and for the page."""

from collections.abc import Sequence

from rsi_deploy.benchmark.result import BenchDocument, BenchResult, VariantResult
from rsi_deploy.benchmark.sections import Bursts, ColdStart, Memory, Profile, SessionStreams, Throughput
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, direction
from rsi_deploy.core.text import human_bytes
from rsi_deploy.core.types import Interval
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.report.table import Table, Tone, range_text, with_interval
from rsi_deploy.runtime.machine import Environment

PERCENTILES = ("p90", "p99", "p99.9")
INTERVAL = "#95\u00a0% interval"
PHASES = ("first token, prefill", "next tokens, decode")
AGAINST = "against the first model"
_TONES: dict[int, Tone] = {1: "good", 0: "neutral", -1: "bad"}


# -- latency


def speed_tone(arm: VariantResult) -> Tone:
    """Return "good" if the arm is shown to be faster than the first one, "bad" if slower, else "neutral"."""
    if arm.speedup_interval is None or arm.blocks < MIN_BLOCKS:
        return "neutral"
    return _TONES[direction(arm.speedup_interval)]


def latency_table(cells: Sequence[BenchResult], caption: str = "", *, name_cells: bool = True) -> Table:
    """Return a row for each configuration and model: median, interval, percentiles, verdict.

    Args:
        cells: the configurations.
        caption: caption of the table.
        name_cells: whether the first column names the configuration.
    """
    shown = [p for p in PERCENTILES if any(p in arm.percentiles_ms for cell in cells for arm in cell.arms)]
    rows = [
        (
            configuration(cell, cells),
            arm.label,
            f"{arm.median_ms:.3f}",
            range_text(arm.median_interval_ms),
            *[f"{arm.percentiles_ms[p]:.3f}" if p in arm.percentiles_ms else "too few" for p in shown],
            rate(cell.batch * 1e3 / arm.median_ms),
            f"{arm.n:,}",
            "" if arm.speedup is None else arm.verdict,
        )
        for cell in cells
        for arm in cell.arms
    ]
    percentiles = [f"#{p}" for p in shown]
    table = Table(
        caption=caption,
        columns=("configuration", "model", "#median ms", INTERVAL, *percentiles, "#samples/s", "#calls", AGAINST),
        rows=rows,
        details=(INTERVAL, *percentiles[1:], "#samples/s", "#calls"),
        tones=[speed_tone(arm) for cell in cells for arm in cell.arms],
    )
    return table if name_cells else table.without(("configuration",))


def configuration(cell: BenchResult, cells: Sequence[BenchResult]) -> str:
    """Return the name of a configuration, with the inputs by which it differs from others of this name."""
    same = [other.inputs for other in cells if other.name == cell.name]
    differing = [f"{name} {kind}" for name, kind in cell.inputs.items() if any(o.get(name) != kind for o in same)]
    return ", ".join([cell.name, *differing[:2]])


def how_it_ran(result: BenchResult) -> str:
    """Return provider, options, threads, time and executed nodes in a sentence."""
    options = "".join(f", {name}={value}" for name, value in result.provider_options.items())
    pinned = f", pinned to cores {', '.join(map(str, result.pinned))}" if result.pinned else ""
    return (
        f"{result.provider}{options}, {result.name}{pinned}, onnxruntime {result.onnxruntime}, measured for "
        f"{result.seconds:.1f} s in {result.arms[0].blocks} blocks{' (partial)' * result.partial}{_nodes(result)}."
    )


def cell_notes(cells: Sequence[BenchResult]) -> list[str]:
    """Return every note once; one that does not hold for all configurations begins with their names."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        for note in cell.notes:
            found.setdefault(note, []).append(configuration(cell, cells))
    return [note if len(names) == len(cells) else f"{', '.join(names)}: {note}" for note, names in found.items()]


def machine_text(environment: Environment) -> str:
    """Return processor, cores and GPUs."""
    return ", ".join([environment.cpu, f"{environment.cores} cores", *environment.gpus])


def _nodes(result: BenchResult) -> str:
    return "".join(
        f"; {arm.label}: " + ", ".join(f"{count} nodes on {name}" for name, count in arm.provider_nodes.items())
        for arm in result.arms
        if arm.provider_nodes
    )


def generation_table(document: BenchDocument) -> Table:
    """Return two rows for each model that generates text: the first token with its prompt, and the next tokens."""
    rows: list[tuple[str, ...]] = []
    tones: list[Tone] = []
    caption = ""
    for speeds, *arms in zip(document.generation, *(cell.arms for cell in document.cells), strict=True):
        caption = f"Generation: a prompt of {speeds.prompt_tokens} tokens, {speeds.generated_tokens} generated; medians"
        prefill = _rate_with(speeds.prefill_per_second, speeds.prefill_per_second_interval)
        decode = _rate_with(speeds.decode_per_second, speeds.decode_per_second_interval)
        for arm, phase, per_second in zip(arms, PHASES, (prefill, decode), strict=True):
            words = "" if arm.speedup is None else arm.verdict
            rows.append(
                (arm.label, phase, f"{arm.median_ms:.3f}", range_text(arm.median_interval_ms), per_second, words)
            )
            tones.append(speed_tone(arm))
    return Table(
        caption=caption,
        columns=("model", "phase", "#ms", INTERVAL, "#tokens/s", AGAINST),
        rows=rows,
        details=(INTERVAL,),
        tones=tones,
    )


# -- the other measurements


def memory_table(rows: Sequence[Memory]) -> Table:
    """Return resident memory of each model."""

    def verdict(m: Memory) -> str:
        fits = "" if m.fits is None else "fits" if m.fits else f"does not fit: ended in {m.stopped_in}"
        return f"{fits} {m.detail}".strip()

    def size(count: int | None) -> str:
        return "" if count is None else human_bytes(count)

    return Table(
        caption="Resident memory, each model in its own process",
        columns=("model", "#importing", "#loaded", "#peak", "#limit", ""),
        rows=[
            (m.label, *map(size, (m.import_bytes, m.loaded_bytes, m.peak_bytes, m.limit_bytes)), verdict(m))
            for m in rows
        ],
        tones=["bad" if m.fits is False else "neutral" for m in rows],
    )


def cold_start_table(rows: Sequence[ColdStart]) -> Table:
    """Return the time of each phase from the start of a process to the first answer."""
    return Table(
        caption="Cold start: milliseconds, medians; the file is in the page cache",
        columns=("model", "#process", "#import", "#load", "#first call", "#total", INTERVAL, AGAINST),
        rows=[
            (
                c.label,
                *(f"{ms:.1f}" for ms in (c.process_ms, c.import_ms, c.load_ms, c.first_ms, c.total_ms)),
                range_text(c.total_interval_ms, ".1f"),
                c.verdict if number else "",
            )
            for number, c in enumerate(rows)
        ],
        details=(INTERVAL,),
    )


def bursts_table(rows: Sequence[Bursts]) -> Table:
    """Return the time of the first and of the later calls of a burst."""
    first = rows[0] if rows else None
    of = f" of {first.calls} calls after {first.gap_ms:g} ms idle" if first else ""
    return Table(
        caption=f"Bursts{of}: milliseconds, medians with 95 % intervals",
        columns=("model", "#first call", "#later calls", "#bursts", f"first call {AGAINST}"),
        rows=[
            (
                b.label,
                _rate_with(b.first_ms, b.first_interval_ms),
                _rate_with(b.rest_ms, b.rest_interval_ms),
                str(b.bursts),
                "" if b.speedup is None else b.verdict,
            )
            for b in rows
        ],
    )


def streams_table(rows: Sequence[SessionStreams]) -> Table:
    """Return samples a second and latency for each number of concurrent streams."""
    return Table(
        caption="Concurrent streams on one session: samples a second of all streams, and milliseconds a call",
        columns=("model", "#streams", "#samples/s", INTERVAL, "#median ms", "#p90 ms", "#p99 ms"),
        rows=[
            (
                s.label,
                str(s.streams),
                rate(s.per_second),
                f"{rate(s.per_second_interval[0])} to {rate(s.per_second_interval[1])}",
                f"{s.median_ms:.4g}",
                *[f"{s.percentiles_ms[p]:.4g}" if p in s.percentiles_ms else "too few" for p in ("p90", "p99")],
            )
            for s in rows
        ],
    )


def throughput_table(rows: Sequence[Throughput]) -> Table:
    """Return samples a second for each batch size."""
    return Table(
        caption="Throughput: samples a second, with 95 % intervals",
        columns=("model", "#batch", "#samples/s", ""),
        rows=[
            (t.label, str(batch), _rate_with(per_second, ends), "highest" if batch == t.best else "")
            for t in rows
            for batch, per_second, ends in zip(t.batches, t.per_second, t.per_second_intervals, strict=True)
        ],
    )


def op_table(profiles: Sequence[Profile]) -> Table:
    """Return the time of each op type, slowest first."""
    ops = sorted({op for p in profiles for op in p.op_ms}, key=lambda op: -max(p.op_ms.get(op, 0) for p in profiles))
    return Table(
        caption="Milliseconds a call (number of nodes) of each op type, as onnxruntime runs them",
        columns=("op type", *[f"#{p.label}" for p in profiles]),
        rows=[(op, *[f"{p.op_ms.get(op, 0):.4g} ({p.op_nodes.get(op, 0)})" for p in profiles]) for op in ops],
    )


def site_time_table(profiles: Sequence[Profile]) -> Table:
    """Return the time of each split site, slowest first."""
    times = [{site.site: site for site in p.sites} for p in profiles]
    names = dict.fromkeys(site.site for p in profiles for site in p.sites)
    rows = []
    for name in sorted(names, key=lambda name: -max(found[name].total_ms for found in times if name in found)):
        cells = []
        for found in times:
            site = found.get(name)
            parts = [] if site is None else [ms for ms in (site.right_ms, site.left_ms) if ms is not None]
            split = f" ({' + '.join(f'{ms:.3g}' for ms in parts)})" if parts else ""
            cells.append("" if site is None else f"{site.total_ms:.4g}{split}")
        rows.append((name, *cells))
    return Table(
        caption="Milliseconds a call of each split site (first + second factor)",
        columns=("site", *[f"#{p.label}" for p in profiles]),
        rows=rows,
    )


# -- accuracy

NamedResults = Sequence[tuple[str, AccuracyResult]]


def accuracy_table(results: NamedResults) -> Table:
    """Return the accuracy of each model, with 95 % intervals; that of decoders is in `text_table`."""

    def percent(value: float | None, ends: tuple[float, float] | None) -> str:
        return "" if value is None else with_interval(f"{value:.2f} %", ends)

    return Table(
        caption="Accuracy, with 95 % intervals",
        columns=("model", "#top-1", "#top-5", "#same answer", "#KL, nats", "#samples", "paired test"),
        rows=[
            (
                name,
                percent(r.top1, r.top1_interval),
                percent(r.top5, r.top5_interval),
                percent(r.agreement, r.agreement_interval),
                "" if r.divergence is None else with_interval(f"{r.divergence:.4f}", r.divergence_interval, ".4f"),
                f"{r.samples:,}{' (partial)' * r.partial}",
                "" if r.paired is None else r.paired.verdict,
            )
            for name, r in results
            if r.text is None
        ],
    ).without_empty()


def text_table(results: NamedResults) -> Table:
    """Return how well decoders continue texts, with 95 % intervals over documents."""

    def number(value: float | None, ends: Interval | None, form: str, unit: str = "") -> str:
        return "" if value is None else with_interval(f"{value:{form}}{unit}", ends, form)

    return Table(
        caption="Next tokens of the text, with 95 % intervals over documents",
        columns=(
            "model",
            "#perplexity",
            "#times the reference's",
            "#same token",
            "#KL a token, nats",
            "#same greedy tokens",
        ),
        rows=[
            (
                name,
                number(r.text.perplexity, r.text.perplexity_interval, ",.2f"),
                number(r.text.ratio, r.text.ratio_interval, ".4f"),
                number(r.agreement, r.agreement_interval, ".2f", " %"),
                number(r.divergence, r.divergence_interval, ".4f"),
                number(r.text.greedy, r.text.greedy_interval, ".1f", " %"),
            )
            for name, r in results
            if r.text is not None
        ],
    ).without_empty()


def value_table(results: NamedResults) -> Table:
    """Return the distance of each output that is compared as values, with 95 % intervals."""
    return Table(
        caption="Outputs compared as values, with 95 % intervals",
        columns=("model", "output", "#cosine", "#relative distance"),
        rows=[
            (
                name,
                v.output,
                with_interval(f"{v.cosine:.4f}", v.cosine_interval, ".4f"),
                with_interval(f"{v.distance:.4f}", v.distance_interval, ".4f"),
            )
            for name, result in results
            for v in result.values
        ],
    )


def rate(per_second: float) -> str:
    """Return a rate with four significant digits, without an exponent."""
    return f"{per_second:,.0f}" if per_second >= 1000 else f"{per_second:.4g}"


def _rate_with(value: float, ends: tuple[float, float]) -> str:
    return f"{rate(value)} [{rate(ends[0])}, {rate(ends[1])}]"
