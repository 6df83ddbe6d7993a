"""The sections of a bench page on load: bursts, throughput, concurrent streams, MLPerf LoadGen."""

from collections.abc import Sequence

from rsi_deploy.benchmark.result import BenchDocument
from rsi_deploy.report.bench_tables import bursts_table, streams_table, throughput_table
from rsi_deploy.report.pages.page import Picture, Section, bar_chart, block_of
from rsi_deploy.report.pages.plots import Axis, Bar, Curves, PlotPoint
from rsi_deploy.report.table import Table


def load_sections(document: BenchDocument) -> list[Section]:
    """Return the sections on load."""
    return [_bursts(document), _throughput(document), _streams(document), _loadgen(document)]


def _bursts(document: BenchDocument) -> Section:
    kinds = ("first call", "later calls")
    bars = [
        Bar(label=b.label, value=value, series=kind)
        for b in document.bursts
        for kind, value in zip(kinds, (b.first_ms, b.rest_ms), strict=True)
    ]
    what = "Bars for each model: the first call of a burst, and the later calls."
    picture = bar_chart("bursts", "Calls of a burst after an idle gap", what, bars, "ms", series=kinds)
    blocks = block_of(bursts_table(document.bursts), picture, wide=True)
    return Section(name="bursts", title="Bursts", blocks=blocks)


def _throughput(document: BenchDocument) -> Section:
    points = [
        PlotPoint(x=batch, y=rate, low=low, high=high, series=t.label, note=f"{t.label}, batch {batch}: {rate:.4g}/s")
        for t in document.throughput
        for batch, rate, (low, high) in zip(t.batches, t.per_second, t.per_second_intervals, strict=True)
    ]
    labels = [t.label for t in document.throughput]
    picture = _rates("throughput", "Samples a second over the batch", "batch", points, labels)
    best = "; ".join(f"{t.label}: highest at batch {t.best} ({t.ended})" for t in document.throughput)
    blocks = block_of(throughput_table(document.throughput), picture)
    return Section(name="throughput", title="Throughput", blocks=blocks, words=[f"{best}."] if best else [])


def _streams(document: BenchDocument) -> Section:
    points = [
        PlotPoint(
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
    blocks = block_of(streams_table(document.streams), picture)
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
    table = Table(
        caption="LoadGen's own results",
        columns=("model, scenario", "verdict", "result", "#samples/s", "#queries", "#own p90 ms", "reasons"),
        rows=rows,
    )
    words = ["VALID means that a run was long enough and met LoadGen's constraints. It is not an MLPerf submission."]
    return Section(name="loadgen", title="MLPerf LoadGen", blocks=block_of(table), words=words)


def _rates(name: str, title: str, axis: str, points: Sequence[PlotPoint], labels: Sequence[str]) -> Picture:
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
