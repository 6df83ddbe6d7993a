"""The section of a report page on the choice of a precision: all models that were compared."""

from collections.abc import Callable, Sequence

from rsi_deploy.precision.record import PrecisionPoint
from rsi_deploy.report.pages.page import Block, Picture, Section
from rsi_deploy.report.pages.plots import Axis, Dots, PlotPoint
from rsi_deploy.report.schema import Report
from rsi_deploy.report.summary import Measure, human_bytes, point_measure, points_table, precision_lines

OURS, RIVAL = "rsi-deploy", "onnxruntime's own tools"
DENSE = "dense"
ROOM = 0.08
"""Share of an axis that is left free at both ends."""

Place = tuple[float, tuple[float, float] | None]


def precision_section(report: Report) -> Section:
    """Return the table of the models that were compared, and their quality against bytes and against time."""
    record = report.precision
    assert record is not None
    words = [f"{line[0].upper()}{line[1:]}." for line in precision_lines(report)]
    blocks = [Block(table=points_table(report), wide=True)]
    if (measure := point_measure(record)) is not None:
        for name, axis, place in (
            ("bytes", Axis(title="bytes", form="~s"), _bytes),
            ("time", Axis(title="time, dense model = 1", form=".2~f"), _time),
        ):
            plot = _dots(record.points, measure, axis, place)
            if len(plot.points) > 1:
                what = f"A dot for each model: {measure.name} over {name}, numbered as in the table."
                picture = Picture(name=f"precision-{name}", title=f"Quality over {name}", description=what, plot=plot)
                blocks.append(Block(picture=picture))
    if len(blocks) > 1:
        words.append("The pictures number the models as the table does; the delivered one has a ring.")
    return Section(name="precision", title="Choice of precision", blocks=blocks, words=words)


def _bytes(point: PrecisionPoint) -> Place | None:
    return None if point.bytes is None else (float(point.bytes), None)


def _time(point: PrecisionPoint) -> Place | None:
    """Return the time as a share of the dense model's, with its interval; the dense model is at 1."""
    if point.speedup is None:
        return (1.0, None) if _is_dense(point) else None
    ends = point.speedup_interval
    return 1 / point.speedup, None if ends is None else (1 / ends[1], 1 / ends[0])


def _is_dense(point: PrecisionPoint) -> bool:
    return point.scheme == "float32" and point.is_rival


def _dots(
    points: Sequence[PrecisionPoint], measure: Measure, axis: Axis, place: Callable[[PrecisionPoint], Place | None]
) -> Dots:
    """Return the dots of the models that have a quality and a place on the axis."""
    dots, rings = [], []
    for number, point in enumerate(points, 1):
        value = None if point.quality is None else measure.value(point.quality)
        at = place(point)
        if point.quality is None or value is None or at is None:
            continue
        low, high = measure.interval(point.quality) or (None, None)
        x_low, x_high = at[1] or (None, None)
        size = "" if point.bytes is None else f", {human_bytes(point.bytes)}"
        dot = PlotPoint(
            x=at[0],
            y=value,
            series=DENSE if number == 1 else RIVAL if point.is_rival else OURS,
            low=low,
            high=high,
            x_low=x_low,
            x_high=x_high,
            note=f"{number}: {point.name}, {measure.text(point.quality)}{size}",
            label=str(number),
        )
        dots.append(dot)
        if point.is_delivered:
            rings.append(dot)
    better = (
        "lower is better" if measure.field in ("output_error", "divergence", "perplexity_ratio", "perplexity") else ""
    )
    title = ", ".join(filter(None, [measure.name, measure.unit.strip(), better]))
    return Dots(
        points=dots,
        x=_fixed(axis, [end for dot in dots for end in (dot.x, dot.x_low, dot.x_high)]),
        y=_fixed(Axis(title=title, form=".4~g"), [end for dot in dots for end in (dot.y, dot.low, dot.high)]),
        series=[DENSE, OURS, RIVAL],
        rings=rings,
    )


def _fixed(axis: Axis, values: Sequence[float | None]) -> Axis:
    """Return the axis with ends around these values."""
    known = [value for value in values if value is not None] or [0.0]
    low, high = min(known), max(known)
    room = ROOM * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(title=axis.title, form=axis.form, ends=(low - room, high + room))
