"""The sections of a bench page on its configurations: all results, distributions, batch scaling, accuracy."""

from collections import defaultdict
from collections.abc import Sequence

from rsi_deploy.benchmark.result import BenchDocument, BenchResult, VariantResult
from rsi_deploy.report.bench_tables import generation_table, how_it_ran, latency_table
from rsi_deploy.report.pages.latency import latency_blocks
from rsi_deploy.report.pages.page import Block, Picture, Section, block_of
from rsi_deploy.report.pages.plots import Axis, Curves, Dots, PlotPoint
from rsi_deploy.report.table import Table

MOST = 6
"""Most configurations whose distributions are drawn."""


def results_section(document: BenchDocument) -> Section:
    """Return the section with every configuration and model in one table."""
    table = latency_table(document.cells, "Medians, milliseconds a call, with 95 % intervals")
    blocks = [*(block_of(generation_table(document)) if document.generation else []), *block_of(table)]
    return Section(name="verdicts", title="Results", blocks=blocks)


def distributions_section(document: BenchDocument) -> Section:
    """Return the section with percentiles and distributions of the first configurations."""
    blocks: list[Block] = []
    for number, cell in enumerate(document.cells[:MOST]):
        first, *rest = latency_blocks(cell, f"latency-{number}")
        blocks += [Block(words=[how_it_ran(cell)], picture=first.picture, table=first.table, wide=True), *rest]
    left = len(document.cells) - MOST
    words = [f"The first {MOST} configurations; {left} more are in the table above."] * (left > 0)
    methods = list(dict.fromkeys(f"Method: {cell.method}." for cell in document.cells))
    return Section(name="latency", title="Latency distributions", blocks=blocks, words=words, small=methods)


def scaling_section(document: BenchDocument) -> Section:
    """Return the section with the time a sample for configurations that differ in the batch alone."""
    groups: dict[tuple[object, ...], dict[int, BenchResult]] = defaultdict(dict)
    for cell in document.cells:
        key = (cell.provider, cell.threads, cell.pinned, cell.precision, _item_shapes(cell))
        groups[key].setdefault(cell.batch, cell)
    blocks = [_scaling(list(group.values()), number) for number, group in enumerate(groups.values()) if len(group) > 1]
    return Section(name="scaling", title="Batch scaling", blocks=blocks[:MOST])


def _item_shapes(cell: BenchResult) -> tuple[tuple[str, str], ...]:
    """Return the inputs without their first dimension."""
    return tuple((name, what.partition("(")[0] + what.partition(",")[2]) for name, what in sorted(cell.inputs.items()))


def _scaling(cells: Sequence[BenchResult], number: int) -> Block:
    cells = sorted(cells, key=lambda cell: cell.batch)
    labels = [arm.label for arm in cells[0].arms]
    points = [
        PlotPoint(
            x=cell.batch,
            y=arm.median_ms / cell.batch,
            low=arm.median_interval_ms[0] / cell.batch,
            high=arm.median_interval_ms[1] / cell.batch,
            series=arm.label,
            note=f"{arm.label}, batch {cell.batch}: {arm.median_ms / cell.batch:.4g} ms a sample",
        )
        for cell in cells
        for arm in cell.arms
    ]
    what = cells[0].name.partition(", ")[2]
    picture = Picture(
        name=f"scaling-{number}",
        title=f"Time per sample and batch{f', {what}' * bool(what)}",
        description="A curve for each model: milliseconds a sample at each batch, with 95 % intervals.",
        plot=Curves(
            points=points,
            x=Axis(title="batch", scale="log", form="~f", ticks=tuple(cell.batch for cell in cells)),
            y=Axis(title="ms a sample", zero=True, form=".4~g"),
            series=labels,
        ),
    )
    rows = [
        (
            str(cell.batch),
            *[f"{arm.median_ms / cell.batch:.4g}" for arm in cell.arms],
            "; ".join(arm.verdict for arm in cell.arms[1:]),
        )
        for cell in cells
    ]
    table = Table(
        caption="Milliseconds a sample", columns=("batch", *[f"#{label}" for label in labels], "verdict"), rows=rows
    )
    return Block(picture=picture, table=table)


def pareto_section(document: BenchDocument) -> Section:
    """Return the section with accuracy against latency of the first configuration, if several models have both."""
    times = {arm.label: arm for arm in document.cells[0].arms} if document.cells else {}
    shares: dict[str, tuple[float, tuple[float, float] | None]] = {}
    top1 = any(result.top1 is not None for result in document.accuracy.values())
    for label, result in document.accuracy.items():
        share = result.top1 if top1 else result.agreement
        if label in times and share is not None:
            shares[label] = (share, result.top1_interval if top1 else result.agreement_interval)
    if len(shares) < 2:
        return Section(name="pareto", title="Accuracy against latency", blocks=[])
    what = "top-1, %" if top1 else "same answer as the reference, %"
    points = [_dot(times[label], *share) for label, share in shares.items()]
    front = front_of(points)
    cell = document.cells[0]
    picture = Picture(
        name="pareto",
        title=f"{what.partition(',')[0].capitalize()} against latency, {cell.name}",
        description="A point for each model with its 95 % intervals; models that no other beats in both are joined.",
        plot=Dots(
            points=points,
            x=Axis(title="ms a call", zero=False, form=".4~g"),
            y=Axis(title=what, form=".4~g"),
            series=list(shares),
            front=front,
        ),
    )
    best = {point.series for point in front}
    rows = [
        (
            point.series,
            f"{point.x:.3f}",
            f"{point.y:.2f} %",
            "" if point.low is None else f"{point.low:.2f} to {point.high:.2f}",
            "on the front" if point.series in best else "another model is at least as fast and as good",
        )
        for point in points
    ]
    table = Table(
        caption="Accuracy and latency", columns=("model", "#ms", f"#{what}", "#95 % interval", "front"), rows=rows
    )
    words = ["The front compares measured values. Where intervals overlap, it is not shown which model is better."]
    blocks = [Block(picture=picture, table=table, wide=True)]
    return Section(name="pareto", title="Accuracy against latency", blocks=blocks, words=words)


def _dot(arm: VariantResult, share: float, ends: tuple[float, float] | None) -> PlotPoint:
    low, high = ends or (None, None)
    return PlotPoint(
        x=arm.median_ms,
        x_low=arm.median_interval_ms[0],
        x_high=arm.median_interval_ms[1],
        y=share,
        low=low,
        high=high,
        series=arm.label,
        note=f"{arm.label}: {share:.2f} %, {arm.median_ms:.4g} ms",
    )


def front_of(points: Sequence[PlotPoint]) -> list[PlotPoint]:
    """Return the points that no other one beats, sorted by x.

    One point beats another if its x is not larger, its y is not smaller, and one of the two differs.

    Example:
        >>> fast, good, bad = (PlotPoint(x=x, y=y, series=s) for x, y, s in ((1, 90, "f"), (2, 95, "g"), (3, 94, "b")))
        >>> [point.series for point in front_of([bad, good, fast])]
        ['f', 'g']
    """
    kept = [
        p
        for p in points
        if not any(o.x <= p.x and o.y >= p.y and (o.x < p.x or o.y > p.y) for o in points if o is not p)
    ]
    return sorted(kept, key=lambda point: point.x)
