"""What a page can draw, as plain data: `rsi_deploy.report.pages.charts` turns it into pictures, loading a library
only then.

Bars     a length for each label, one or more series         sizes, times, errors
Curves   y over x for each series, with an interval          spectra, batch scaling, distributions
Dots     labelled points with intervals both ways            accuracy against latency
Spans    a median, its interval and percentiles on a line    latency of each arm
Panels   one small curve for each label, on equal axes       spectra
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Scale = Literal["linear", "log"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis says: `zero` keeps 0 in view, `form` is a d3 number format, `ends` and `ticks` stand as given."""

    title: str
    scale: Scale = "linear"
    zero: bool = False
    form: str = "~s"
    ends: tuple[float, float] | None = None
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One length; `note` is what a pointer resting on it reads."""

    label: str
    value: float
    series: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Lying bars, a row for each label in the order given; several series lie side by side, or over one another.

    Attributes:
        bars: the lengths.
        axis: of the lengths.
        series: their names in order; empty for one kind of bar.
        overlaid: whether the later series lie over the first one.
        stacked: whether they lie end to end.
        mark: where a line across stands, and what it says.
    """

    bars: Sequence[Bar]
    axis: Axis
    series: Sequence[str] = ()
    overlaid: bool = False
    stacked: bool = False
    mark: tuple[float, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place on a curve or a dot, with the interval of y (and of x) where there is one."""

    x: float
    y: float
    series: str
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines through points.

    Attributes:
        points: of all the series.
        x, y: the axes.
        series: names in order.
        dots: whether each point is marked.
        steps: whether y holds from one x to the next (a histogram's outline), the area below it filled.
        marks: points in their own right, such as a chosen rank.
    """

    points: Sequence[Point]
    x: Axis
    y: Axis
    series: Sequence[str]
    dots: bool = True
    steps: bool = False
    marks: Sequence[Point] = ()


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Labelled points; those on the front are joined."""

    points: Sequence[Point]
    x: Axis
    y: Axis
    series: Sequence[str]
    front: Sequence[Point] = ()


@dataclass(frozen=True, kw_only=True)
class Span:
    """One line of `Spans`: percentiles by name, and the interval of the median."""

    label: str
    median: float
    interval: tuple[float, float]
    percentiles: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Spans:
    """A line for each arm from its median to its last percentile."""

    spans: Sequence[Span]
    axis: Axis


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of many small curves: its label, its points, and where what is kept ends."""

    label: str
    points: Sequence[tuple[float, float]]
    cut: float


@dataclass(frozen=True, kw_only=True)
class Panels:
    """Small curves side by side, on equal axes, the part up to the cut filled."""

    panels: Sequence[Panel]
    x: Axis
    y: Axis


Plot = Bars | Curves | Dots | Spans | Panels
