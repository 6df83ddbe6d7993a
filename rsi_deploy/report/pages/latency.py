"""Percentiles and distributions of the latency of one configuration, for the pages of `export` and `bench`."""

import math
from collections.abc import Sequence

import numpy as np

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.report.bench_tables import how_it_ran, latency_table
from rsi_deploy.report.pages.page import Block, Picture, Section
from rsi_deploy.report.pages.plots import Axis, Curves, PlotPoint, Span, Spans
from rsi_deploy.report.table import Table

BINS, DRAWN = 40, 95
"""Number of steps in the picture of a distribution, and the percentile where it ends, so that few slow calls do not
flatten it."""

_LOG_RATIO = 8
"""Ratio of the largest to the smallest time above which the axis is logarithmic."""


def latency_section(result: BenchResult) -> Section:
    """Return the section on one configuration: medians, percentiles and distributions."""
    return Section(
        name="latency",
        title="Latency",
        blocks=latency_blocks(result, "latency"),
        words=[how_it_ran(result), "Times hold for this machine; measure on yours with rsi-deploy bench."],
        small=[f"Method: {result.method}."],
    )


def latency_blocks(result: BenchResult, name: str) -> list[Block]:
    """Return the blocks of one configuration; `name` is the prefix of the names of its pictures."""
    spans = [
        Span(
            label=arm.label,
            median=arm.median_ms,
            interval=arm.median_interval_ms,
            percentiles={p: ms for p, ms in arm.percentiles_ms.items() if p != "p50"},
        )
        for arm in result.arms
    ]
    picture = Picture(
        name=name,
        title=f"Latency, {result.name}",
        description="For each model the median time of a call with its 95 % interval, and the slower percentiles.",
        plot=Spans(spans=spans, axis=_axis([end for s in spans for end in (*s.interval, *s.percentiles.values())])),
    )
    table = latency_table([result], f"Milliseconds a call, {result.name}", name_cells=False)
    distribution = _distribution(result, name)
    return [Block(picture=picture, table=table, wide=True), *([distribution] if distribution else [])]


def _distribution(result: BenchResult, name: str) -> Block | None:
    """Return the block with the share of the calls in each step of time; None without quantiles."""
    arms = [arm for arm in result.arms if len(arm.quantiles_ms) == 101]
    if not arms:
        return None
    low, high = min(arm.quantiles_ms[0] for arm in arms), max(arm.quantiles_ms[DRAWN] for arm in arms)
    if not 0 < low < high:
        return None
    edges = np.geomspace(low, high, BINS + 1) if high > _LOG_RATIO * low else np.linspace(low, high, BINS + 1)
    points = []
    for arm in arms:
        below = np.interp(edges, arm.quantiles_ms, np.arange(101))
        shares = [*np.diff(below), 0.0]
        points += [
            PlotPoint(x=float(edge), y=float(share), series=arm.label)
            for edge, share in zip(edges, shares, strict=True)
        ]
    picture = Picture(
        name=f"{name}-distribution",
        title="Distribution of the calls",
        description="For each model the share of its calls in each step of time, without the slowest 5 %.",
        plot=Curves(
            points=points,
            x=_axis([low, high], zero=False),
            y=Axis(title="% of the calls", zero=True, form="~f"),
            series=[arm.label for arm in arms],
            dots=False,
            steps=True,
        ),
    )
    shown = (0, 25, 50, 75, 90, 99, 100)
    table = Table(
        caption="Quantiles of all timed calls, ms",
        columns=("model", *[f"#{share} %" for share in shown]),
        rows=[(arm.label, *[f"{arm.quantiles_ms[share]:.4g}" for share in shown]) for arm in arms],
    )
    return Block(picture=picture, table=table)


def _axis(values: Sequence[float], *, zero: bool = True) -> Axis:
    """Return an axis for these times."""
    if min(values) > 0 and max(values) > _LOG_RATIO * min(values) and math.isfinite(max(values)):
        return Axis(title="ms a call, logarithmic", scale="log", form=".4~g")
    return Axis(title="ms a call", zero=zero, form=".4~g")
