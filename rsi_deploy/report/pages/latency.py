"""A page's blocks on the latency of one configuration: percentiles and distributions, for `export` and for `bench`."""

import math
from collections.abc import Sequence

import numpy as np

from rsi_deploy.benchmark.result import BenchResult, VariantResult
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, direction
from rsi_deploy.report.pages.page import Block, PageTable, Picture, Section, Tone
from rsi_deploy.report.pages.plots import Axis, Curves, Point, Span, Spans

BINS, DRAWN = 40, 95
"""Of a distribution's picture: steps, and the percentile where it ends; the few calls beyond it would press it flat."""

_WIDE = 8
"""Largest over smallest, from which only a logarithm shows both."""

_TONES: dict[int, Tone] = {1: "good", 0: "neutral", -1: "bad"}


def speed_tone(arm: VariantResult) -> Tone:
    """Good where the arm is shown to be faster than the first, bad where slower, neutral where neither is."""
    if arm.speedup_interval is None or arm.blocks < MIN_BLOCKS:
        return "neutral"
    return _TONES[direction(arm.speedup_interval)]


def latency_section(result: BenchResult) -> Section:
    """Every arm's median with its interval, its tail and its distribution."""
    return Section(
        name="latency",
        title="Latency",
        blocks=latency_blocks(result, "latency"),
        words=[how_it_ran(result), "Times hold for this machine; measure again on yours with rsi-deploy bench."],
        small=[f"Method: {result.method}."],
    )


def how_it_ran(result: BenchResult) -> str:
    """Provider, threads and nodes, in a sentence."""
    nodes = "; ".join(
        f"{arm.label}: " + ", ".join(f"{count} nodes on {name}" for name, count in arm.provider_nodes.items())
        for arm in result.arms
    )
    options = "".join(f", {name}={value}" for name, value in result.provider_options.items())
    pinned = f", pinned to cores {', '.join(map(str, result.pinned))}" if result.pinned else ""
    return (
        f"{result.provider}{options}, {result.name}{pinned}, onnxruntime {result.onnxruntime}, {result.seconds:.1f} s "
        f"of measuring{' (partial)' * result.partial}; {nodes}."
    )


def latency_blocks(result: BenchResult, name: str) -> list[Block]:
    """One configuration: medians and percentiles with their table, then the distributions."""
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
    tails = [p for p in ("p90", "p99", "p99.9") if any(p in arm.percentiles_ms for arm in result.arms)]
    rows = [
        (
            arm.label,
            f"{arm.median_ms:.3f}",
            f"{arm.median_interval_ms[0]:.3f} to {arm.median_interval_ms[1]:.3f}",
            *[f"{arm.percentiles_ms[p]:.3f}" if p in arm.percentiles_ms else "too few" for p in tails],
            f"{arm.n:,}",
            arm.verdict,
        )
        for arm in result.arms
    ]
    table = PageTable(
        caption=f"Milliseconds a call, {result.name}",
        columns=("model", "#median", "#95 % interval", *[f"#{p}" for p in tails], "#calls", "verdict"),
        rows=rows,
    )
    distribution = _distribution(result, name)
    return [Block(picture=picture, table=table, wide=True), *([distribution] if distribution else [])]


def _distribution(result: BenchResult, name: str) -> Block | None:
    """Share of the calls in each of a number of equal steps of time, up to the last percentile that is drawn."""
    arms = [arm for arm in result.arms if len(arm.quantiles_ms) == 101]
    if not arms:
        return None
    low, high = min(arm.quantiles_ms[0] for arm in arms), max(arm.quantiles_ms[DRAWN] for arm in arms)
    if not 0 < low < high:
        return None
    wide = high > _WIDE * low
    edges = np.geomspace(low, high, BINS + 1) if wide else np.linspace(low, high, BINS + 1)
    points = []
    for arm in arms:
        below = np.interp(edges, arm.quantiles_ms, np.arange(101))
        shares = [*np.diff(below), 0.0]
        points += [
            Point(x=float(edge), y=float(share), series=arm.label) for edge, share in zip(edges, shares, strict=True)
        ]
    picture = Picture(
        name=f"{name}-distribution",
        title="How the calls are distributed",
        description="For each model the share of its calls that took so long; the slowest 5 % are not drawn.",
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
    table = PageTable(
        caption="Quantiles of all timed calls, ms",
        columns=("model", *[f"#{share} %" for share in shown]),
        rows=[(arm.label, *[f"{arm.quantiles_ms[share]:.4g}" for share in shown]) for arm in arms],
    )
    return Block(picture=picture, table=table)


def _axis(values: Sequence[float], *, zero: bool = True) -> Axis:
    """Of times."""
    wide = min(values) > 0 and max(values) > _WIDE * min(values) and math.isfinite(max(values))
    if wide:
        return Axis(title="ms a call, logarithmic", scale="log", form=".4~g")
    return Axis(title="ms a call", zero=zero, form=".4~g")
