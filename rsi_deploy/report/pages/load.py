"""A bench page's sections on a model under load: bursts, throughput, concurrent streams, MLPerf LoadGen."""

from collections.abc import Sequence

from rsi_deploy.benchmark.result import BenchDocument
from rsi_deploy.report.pages.page import Block, PageTable, Picture, Section
from rsi_deploy.report.pages.plots import Axis, Bar, Bars, Curves, Point


def load_sections(document: BenchDocument) -> list[Section]:
    """Those that hold something."""
    made = (_bursts(document), _throughput(document), _streams(document), _loadgen(document))
    return [section for section in made if section.blocks]


def _bursts(document: BenchDocument) -> Section:
    kinds = ("first call", "later calls")
    bars = [
        Bar(label=b.label, value=value, series=kind)
        for b in document.bursts
        for kind, value in zip(kinds, (b.first_ms, b.rest_ms), strict=True)
    ]
    picture = Picture(
        name="bursts",
        title="Calls of a burst after an idle gap",
        description="Bars for each model: the first call of a burst, and those after it.",
        plot=Bars(bars=bars, axis=Axis(title="ms", zero=True, form=".4~g"), series=kinds),
    )
    rows = [
        (
            b.label,
            f"{b.gap_ms:g}",
            _with(b.first_ms, b.first_interval_ms),
            _with(b.rest_ms, b.rest_interval_ms),
            b.verdict,
        )
        for b in document.bursts
    ]
    table = PageTable(
        caption="Milliseconds, medians with 95 % intervals",
        columns=("model", "#idle ms", "#first call", "#later calls", "verdict of the first"),
        rows=rows,
    )
    blocks = [Block(picture=picture, table=table, wide=True)] if rows else []
    return Section(name="bursts", title="Bursts", blocks=blocks)


def _throughput(document: BenchDocument) -> Section:
    points = [
        Point(
            x=batch, y=rate, low=ends[0], high=ends[1], series=t.label, note=f"{t.label}, batch {batch}: {rate:.4g}/s"
        )
        for t in document.throughput
        for batch, rate, ends in zip(t.batches, t.per_second, t.per_second_intervals, strict=True)
    ]
    labels = [t.label for t in document.throughput]
    picture = _rates("throughput", "Samples a second over the batch", "batch", points, labels)
    rows = [(str(int(p.x)), p.series, _with(p.y, (p.low or 0.0, p.high or 0.0))) for p in points]
    table = PageTable(
        caption="Samples a second, with 95 % intervals", columns=("batch", "model", "#samples/s"), rows=rows
    )
    best = "; ".join(f"{t.label}: most at batch {t.best} ({t.ended})" for t in document.throughput)
    words = [f"{best}."] if best else []
    blocks = [Block(picture=picture, table=table)] if points else []
    return Section(name="throughput", title="Throughput", blocks=blocks, words=words)


def _streams(document: BenchDocument) -> Section:
    points = [
        Point(
            x=s.streams,
            y=s.per_second,
            low=s.per_second_interval[0],
            high=s.per_second_interval[1],
            series=s.label,
            note=f"{s.label}, {s.streams} streams: {s.per_second:.4g}/s",
        )
        for s in document.streams
    ]
    labels = list(dict.fromkeys(s.label for s in document.streams))
    picture = _rates("streams", "Samples a second over concurrent streams", "streams", points, labels)
    rows = [
        (
            str(s.streams),
            s.label,
            _with(s.per_second, s.per_second_interval),
            f"{s.median_ms:.4g}",
            f"{s.percentiles_ms['p99']:.4g}" if "p99" in s.percentiles_ms else "too few",
        )
        for s in document.streams
    ]
    table = PageTable(
        caption="Samples a second of all streams, and milliseconds a call",
        columns=("streams", "model", "#samples/s", "#median ms", "#p99 ms"),
        rows=rows,
    )
    blocks = [Block(picture=picture, table=table)] if rows else []
    return Section(name="streams", title="Concurrent streams", blocks=blocks)


def _loadgen(document: BenchDocument) -> Section:
    rows = [
        (
            f"{label}, {r.scenario}",
            "VALID" if r.valid else "INVALID",
            r.headline,
            "" if r.per_second is None else f"{r.per_second:,.1f}",
            "unknown" if r.queries is None else f"{r.queries:,}",
            "" if r.own_p90_ms is None else f"{r.own_p90_ms:.4g}",
            "; ".join(r.reasons),
        )
        for label, results in document.loadgen.items()
        for r in results
    ]
    table = PageTable(
        caption="As LoadGen says it",
        columns=("model, scenario", "verdict", "result", "#samples/s", "#queries", "#own p90 ms", "why"),
        rows=rows,
    )
    words = ["LoadGen's VALID says that a run was long enough and kept its constraints; it is no MLPerf submission."]
    return Section(name="loadgen", title="MLPerf LoadGen", blocks=[Block(table=table)] if rows else [], words=words)


def _rates(name: str, title: str, axis: str, points: Sequence[Point], labels: Sequence[str]) -> Picture:
    return Picture(
        name=name,
        title=title,
        description=f"A curve for each model: samples a second, more is better, over {axis}, with 95 % intervals.",
        plot=Curves(
            points=points,
            x=Axis(title=axis, scale="log", form="~f", ticks=tuple(sorted({point.x for point in points}))),
            y=Axis(title="samples a second", zero=True, form=".4~s"),
            series=labels,
        ),
    )


def _with(value: float, ends: tuple[float, float]) -> str:
    shown, low, high = (f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in (value, *ends))
    return f"{shown} [{low}, {high}]"
