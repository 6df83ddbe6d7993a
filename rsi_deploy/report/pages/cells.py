"""A bench page's sections on its configurations: all of them in a table, batch scaling, accuracy against latency."""

from collections import defaultdict
from collections.abc import Sequence

from rsi_deploy.benchmark.result import BenchDocument, BenchResult, VariantResult
from rsi_deploy.report.pages.latency import how_it_ran, latency_blocks
from rsi_deploy.report.pages.page import Block, PageTable, Picture, Section
from rsi_deploy.report.pages.plots import Axis, Curves, Dots, Point

MOST = 6
"""Configurations whose distributions are drawn."""


def verdicts_section(document: BenchDocument) -> Section:
    """Every configuration and model in one table."""
    rows = [
        (
            f"{cell.name}{inputs_of(cell, document)}",
            arm.label,
            f"{arm.median_ms:.3f}",
            f"{arm.median_interval_ms[0]:.3f} to {arm.median_interval_ms[1]:.3f}",
            f"{cell.batch * 1e3 / arm.median_ms:,.1f}",
            arm.verdict,
        )
        for cell in document.cells
        for arm in cell.arms
    ]
    table = PageTable(
        caption="Medians, ms a call, with 95 % intervals",
        columns=("configuration", "model", "#median", "#interval", "#samples/s", "verdict"),
        rows=rows,
    )
    blocks = [Block(table=table)] if rows else []
    return Section(name="verdicts", title="The verdicts", blocks=blocks)


def inputs_of(cell: BenchResult, document: BenchDocument) -> str:
    """The inputs, where cells differ in more than their names tell."""
    same = [other for other in document.cells if other.name == cell.name]
    return f", {'; '.join(f'{name} {what}' for name, what in cell.inputs.items())}" if len(same) > 1 else ""


def distributions_section(document: BenchDocument) -> Section:
    """Percentiles and distributions of the first configurations."""
    blocks: list[Block] = []
    for number, cell in enumerate(document.cells[:MOST]):
        first, *rest = latency_blocks(cell, f"latency-{number}")
        blocks += [Block(words=[how_it_ran(cell)], picture=first.picture, table=first.table, wide=True), *rest]
    left = len(document.cells) - MOST
    words = [f"The first {MOST} configurations; {left} more are in the table above."] * (left > 0)
    methods = list(dict.fromkeys(f"Method: {cell.method}." for cell in document.cells))
    return Section(name="latency", title="Latency distributions", blocks=blocks, words=words, small=methods)


def scaling_section(document: BenchDocument) -> Section:
    """Time a sample over the batch, for configurations that differ in nothing else."""
    groups: dict[tuple[object, ...], dict[int, BenchResult]] = defaultdict(dict)
    for cell in document.cells:
        key = (cell.provider, cell.threads, cell.pinned, cell.precision, _item_shapes(cell))
        groups[key].setdefault(cell.batch, cell)
    blocks = [_scaling(list(group.values()), number) for number, group in enumerate(groups.values()) if len(group) > 1]
    return Section(name="scaling", title="Batch scaling", blocks=blocks[:MOST])


def _item_shapes(cell: BenchResult) -> tuple[tuple[str, str], ...]:
    """The inputs less their first dimension."""
    return tuple((name, what.partition("(")[0] + what.partition(",")[2]) for name, what in sorted(cell.inputs.items()))


def _scaling(cells: Sequence[BenchResult], number: int) -> Block:
    cells = sorted(cells, key=lambda cell: cell.batch)
    labels = [arm.label for arm in cells[0].arms]
    points = [
        Point(
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
        title=f"Time a sample over the batch{f', {what}' * bool(what)}",
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
    table = PageTable(
        caption="Milliseconds a sample", columns=("batch", *[f"#{label}" for label in labels], "verdict"), rows=rows
    )
    return Block(picture=picture, table=table)


def pareto_section(document: BenchDocument) -> Section:
    """Accuracy against latency of the first configuration, where several models have both."""
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
        description="A point for each model with its 95 % intervals; those that no other beats in both are joined.",
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
            "no other is as fast and as good" if point.series in best else "another is at least as fast and as good",
        )
        for point in points
    ]
    table = PageTable(
        caption="Accuracy and latency", columns=("model", "#ms", f"#{what}", "#95 % interval", "front"), rows=rows
    )
    words = ["By medians and shares as measured: where intervals overlap, which of two is better is not shown."]
    blocks = [Block(picture=picture, table=table, wide=True)]
    return Section(name="pareto", title="Accuracy against latency", blocks=blocks, words=words)


def _dot(arm: VariantResult, share: float, ends: tuple[float, float] | None) -> Point:
    low, high = ends or (None, None)
    return Point(
        x=arm.median_ms,
        x_low=arm.median_interval_ms[0],
        x_high=arm.median_interval_ms[1],
        y=share,
        low=low,
        high=high,
        series=arm.label,
        note=f"{arm.label}: {share:.2f} %, {arm.median_ms:.4g} ms",
    )


def front_of(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both: none is at most as slow and at least as good, and better in one of the two.

    Example:
        >>> fast, good, bad = (Point(x=x, y=y, series=s) for x, y, s in ((1, 90, "f"), (2, 95, "g"), (3, 94, "b")))
        >>> [point.series for point in front_of([bad, good, fast])]
        ['f', 'g']
    """
    kept = [
        p
        for p in points
        if not any(o.x <= p.x and o.y >= p.y and (o.x < p.x or o.y > p.y) for o in points if o is not p)
    ]
    return sorted(kept, key=lambda point: point.x)
