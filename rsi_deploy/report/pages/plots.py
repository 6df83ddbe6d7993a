"""Plots as plain data. `rsi_deploy.report.pages.charts` draws them, and loads the drawing library only then.

Bars     a length for each label, one or more series         sizes, times, errors
Curves   y over x for each series, with an interval          spectra, batch scaling, distributions
Dots     labelled points with intervals both ways            accuracy against latency
Spans    a median, its interval and percentiles on a line    latency of each model
Panels   one small curve for each label, on equal axes       spectra
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Scale = Literal["linear", "log"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis.

    Attributes:
        title: its title, with the unit.
        scale: linear or logarithmic.
        zero: whether to include 0.
        form: number format of d3.
        ends: fixed ends; None chooses them from the data.
        ticks: fixed ticks; empty chooses them.
    """

    title: str
    scale: Scale = "linear"
    zero: bool = False
    form: str = "~s"
    ends: tuple[float, float] | None = None
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar; `note` is shown at the pointer."""

    label: str
    value: float
    series: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Horizontal bars, a row for each label in their order; series are side by side, overlaid or stacked.

    Attributes:
        bars: the bars.
        axis: axis of their values.
        series: names of the series in order; empty for one series.
        overlaid: whether later series are drawn over the first one.
        stacked: whether series are drawn end to end.
        mark: value and label of a line across all bars.
    """

    bars: Sequence[Bar]
    axis: Axis
    series: Sequence[str] = ()
    overlaid: bool = False
    stacked: bool = False
    mark: tuple[float, str] | None = None


@dataclass(frozen=True, kw_only=True)
class PlotPoint:
    """A point of a curve, or a dot, with intervals of y (`low`, `high`) and x.

    `note` is shown at the pointer; `label` is written beside a dot.
    """

    x: float
    y: float
    series: str
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    note: str = ""
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines through points.

    Attributes:
        points: points of all series.
        x, y: the axes.
        series: names of the series in order.
        dots: whether each point is marked.
        steps: whether y is constant from one x to the next (the outline of a histogram), with the area below filled.
        marks: additional marked points, such as a chosen rank.
    """

    points: Sequence[PlotPoint]
    x: Axis
    y: Axis
    series: Sequence[str]
    dots: bool = True
    steps: bool = False
    marks: Sequence[PlotPoint] = ()


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Dots; those on the front are joined, and those in `rings` have a ring around them.

    Labels do not overlap where there is room; dots with labels need axes with fixed ends.
    """

    points: Sequence[PlotPoint]
    x: Axis
    y: Axis
    series: Sequence[str]
    front: Sequence[PlotPoint] = ()
    rings: Sequence[PlotPoint] = ()


@dataclass(frozen=True, kw_only=True)
class Span:
    """One line of `Spans`: a median with its interval, and percentiles by name."""

    label: str
    median: float
    interval: tuple[float, float]
    percentiles: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Spans:
    """A line for each model from its median to its last percentile."""

    spans: Sequence[Span]
    axis: Axis


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A small curve; `cut` is the x up to which it is filled."""

    label: str
    points: Sequence[tuple[float, float]]
    cut: float


@dataclass(frozen=True, kw_only=True)
class Panels:
    """Small curves side by side on equal axes."""

    panels: Sequence[Panel]
    x: Axis
    y: Axis


Plot = Bars | Curves | Dots | Spans | Panels
