"""The drawing of `rsi_deploy.report.pages.plots` as SVG, with Vega-Lite and without a browser or a network.

    plot --> Vega-Lite specification --> vl_convert (Vega in an embedded engine) --> SVG --> rsi_deploy.report.pages.svg

Specifications are plain Vega-Lite JSON: building them with Altair takes three times as long as drawing them. Import
this module only to draw: the engine takes 84 MB of disk, 100 MB of memory and a second to start.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import vl_convert

from rsi_deploy.core.text import plain, shortened
from rsi_deploy.report.pages.plots import Axis, Bar, Bars, Curves, Dots, Panels, Plot, PlotPoint, Spans
from rsi_deploy.report.pages.svg import tidied
from rsi_deploy.report.pages.theme import GRID, MUTED, SERIES, TEXT, WARN

VEGA_LITE = "6.4"
LABEL = 27  # most characters of the label of a row
ROW = 19  # height of a row
PANEL_AXIS, PANEL_GAP = 64, 14  # width of the vertical axis, and of the gap between two panels

FONT = 11  # of the label of a dot
CHARACTER, LINE = 0.6 * FONT, 1.1 * FONT
"""Width and height of a character in pixels, about."""
DOT, RING, WHISKER = 11.0, 20.0, 3.0
"""Widths of a dot, of a ring around it, and of the line of an interval, in pixels."""
GAPS = (2.0, 8.0, 16.0, 26.0)
"""Distances between a dot and its label that are tried, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The sizes of a picture, in pixels.

    Attributes:
        width: width of the whole picture.
        height: height of a picture with two axes.
        area: width and height of the area between the axes, about.
        columns: most panels side by side.
    """

    width: int
    height: int
    area: tuple[float, float]
    columns: int


NARROW = Canvas(width=400, height=230, area=(330.0, 180.0), columns=3)
"""For phones, and beside a table; pages scale it up to 1.2 times this."""
WIDE = Canvas(width=1046, height=330, area=(960.0, 280.0), columns=7)
"""For the whole content of a page on a desktop."""

DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Places of a label beside its dot, sideways and upwards, the best first."""

Json = dict[str, Any]
Box = tuple[float, float, float, float]  # left, right, bottom, top

_PLAIN: Json = {"labelColor": TEXT.light, "labelFontSize": 12}
_CONFIG: Json = {
    "font": "sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": _PLAIN
    | {
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titleColor": MUTED.light,
        "titlePadding": 8,
        "gridColor": GRID.light,
        "domainColor": GRID.light,
        "tickColor": GRID.light,
        "labelLimit": 200,
        "labelOverlap": True,
    },
    "legend": _PLAIN | {"orient": "top", "title": None, "labelLimit": 330, "symbolSize": 90, "symbolOpacity": 1},
}


def svg(plot: Plot, *, name: str, title: str, description: str, canvas: Canvas = NARROW) -> str:
    """Return a picture as one `<svg>` element for a page.

    Args:
        plot: the plot.
        name: prefix of all ids.
        title: title in a few words.
        description: description for screen readers.
        canvas: its sizes.
    """
    kinds = {Bars: _bars, Curves: _curves, Dots: _dots, Spans: _spans, Panels: _panels}
    specification: Json = {
        # Vega measures text in a narrower font than some devices have: leave room for a tenth more.
        "padding": {"left": 14, "right": 10, "top": 2, "bottom": 2},
        "config": _CONFIG,
        **kinds[type(plot)](plot, canvas),  # type: ignore[operator]
    }
    if not isinstance(plot, Panels):  # the width of `Panels` is that of each panel
        fit = "fit-x" if isinstance(plot, Bars | Spans) else "fit"
        specification |= {"width": canvas.width, "autosize": {"type": fit, "contains": "padding"}}
    drawn = vl_convert.vegalite_to_svg(specification, vl_version=VEGA_LITE)
    return tidied(drawn, name, plain(title), plain(description), is_wide=canvas is WIDE)


def _bars(plot: Bars, _: Canvas) -> Json:
    labels = _labels(list(dict.fromkeys(bar.label for bar in plot.bars)))
    order = [plain(name) for name in plot.series]
    encoding = {
        "x": _at("value", plot.axis) | {"stack": "zero" if plot.stacked else None},
        "y": _rows(labels),
        "color": _colour(order) if order else {"value": SERIES[1].light},
        "order": {"field": "number"},
        "description": _NOTE,
    }

    def layer(bars: Sequence[Bar], band: float, **more: Json) -> Json:
        values = [_bar(bar, labels[bar.label], number) for number, bar in enumerate(bars)]
        return _layer(values, {"type": "bar", "height": {"band": band}}, encoding | more)

    if plot.overlaid:
        bands = zip(plot.series, (0.8, 0.4, 0.2), strict=False)
        layers = [layer([bar for bar in plot.bars if bar.series == name], band) for name, band in bands]
    elif len(order) > 1 and not plot.stacked:
        layers = [layer(plot.bars, 1, yOffset={"field": "series", "sort": order})]
    else:
        layers = [layer(plot.bars, 0.8)]
    if plot.mark is not None:
        values = [{"at": plot.mark[0], "says": plain(plot.mark[1])}]
        x = {"field": "at", "type": "quantitative"}
        text = {"type": "text", "color": WARN.light, "align": "right", "baseline": "bottom", "dx": 2, "dy": -4}
        layers += [
            _layer(values, _CUT, {"x": x}),
            _layer(values, text | {"fontSize": 12}, {"x": x, "y": {"value": 0}, "text": {"field": "says"}}),
        ]
    alone = len(order) < 2 or plot.overlaid or plot.stacked
    return {"layer": layers, "height": {"step": ROW if alone else 11}}  # a bar in a group is thinner


def _curves(plot: Curves, canvas: Canvas) -> Json:
    values, colour = _points(plot.points), _colour(plot.series)
    place = {"x": _at("x", plot.x), "y": _at("y", plot.y) | {"stack": None}}
    shape = "step-after" if plot.steps else "linear"
    layers = []
    if plot.steps:
        layers.append(
            _layer(values, {"type": "area", "interpolate": shape, "opacity": 0.25}, place | {"color": colour})
        )
    line = {"type": "line", "interpolate": shape, "strokeWidth": 1.8}
    layers.append(_layer(values, line, place | {"color": colour}))
    if any(point.low is not None for point in plot.points):
        layers.append(_layer(values, _WHISKER, {"x": place["x"], "color": colour} | _between("y", "low", "high")))
    if plot.dots:
        seen = {"color": colour, "shape": _shape(plot.series), "description": _NOTE}
        layers.append(_layer(values, {"type": "point", "filled": True, "size": 38, "opacity": 1}, place | seen))
    if plot.marks:
        ring = {"type": "point", "size": 80, "strokeWidth": 2, "opacity": 1}
        layers.append(_layer(_points(plot.marks), ring, place | {"color": colour, "description": _NOTE}))
    return {"layer": layers, "height": canvas.height}


def _dots(plot: Dots, canvas: Canvas) -> Json:
    values, colour = _points(plot.points), _colour(plot.series)
    x, y = _at("x", plot.x), _at("y", plot.y)
    line = {"type": "line", "interpolate": "step-after", "strokeDash": [4, 3], "color": MUTED.light}
    dot = {"type": "point", "filled": True, "size": 90, "opacity": 1}
    seen = {"color": colour, "shape": _shape(plot.series), "description": _NOTE}
    layers = [
        *([_layer(_points(plot.front), line, {"x": x, "y": y})] if len(plot.front) > 1 else []),
        _layer(values, _WHISKER, {"x": x, "color": colour} | _between("y", "low", "high")),
        _layer(values, _WHISKER, {"y": y, "color": colour} | _between("x", "x_low", "x_high")),
        _layer(values, dot, {"x": x, "y": y} | seen),
    ]
    if plot.rings:
        ring = {"type": "point", "size": 260, "strokeWidth": 2, "opacity": 1, "color": TEXT.light}
        layers.append(_layer(_points(plot.rings), ring, {"x": x, "y": y}))
    if labels := placed_labels(plot.points, plot.x, plot.y, plot.rings, canvas.area):
        text = {"type": "text", "color": TEXT.light, "fontSize": FONT}
        layers.append(_layer(labels, text, {"x": x, "y": y, "text": {"field": "label"}}))
    return {"layer": layers, "height": canvas.height}


def _spans(plot: Spans, _: Canvas) -> Json:
    labels = _labels([span.label for span in plot.spans])
    lines, ticks = [], []
    for span in plot.spans:
        row, (low, high) = labels[span.label], span.interval
        last = max([span.median, high, *span.percentiles.values()])
        note = plain(f"{span.label}: median {span.median:.4g}, 95 % [{low:.4g}, {high:.4g}]")
        lines.append({"row": row, "from": span.median, "to": last, "low": low, "high": high, "note": note})
        for number, (name, value) in enumerate(span.percentiles.items()):
            note = plain(f"{span.label}: {name} {value:.4g}")
            ticks.append({"row": row, "from": value, "name": name, "note": note, "up": number % 2})
    x, y, blue = _at("from", plot.axis), _rows(labels), SERIES[1].light
    line = {"type": "rule", "color": MUTED.light, "strokeWidth": 2}
    box = {"type": "bar", "color": blue, "height": 12, "opacity": 0.45}
    dot = {"type": "point", "color": blue, "filled": True, "size": 80, "opacity": 1}
    tick = {"type": "tick", "color": TEXT.light, "thickness": 2, "height": 12}
    label = {"type": "text", "color": MUTED.light, "fontSize": 11}
    says = {"x": x, "y": y, "text": {"field": "name"}}
    above, below = ([t for t in ticks if t["up"] == up] for up in (0, 1))  # so that near labels do not overlap
    layers = [
        _layer(lines, line, {"x": x, "x2": {"field": "to"}, "y": y}),
        _layer(lines, box, {"y": y} | _between("x", "low", "high")),
        _layer(lines, dot, {"x": x, "y": y, "description": _NOTE}),
        _layer(ticks, tick, {"x": x, "y": y, "description": _NOTE}),
        _layer(above, label | {"dy": -13}, says),
        _layer(below, label | {"dy": 14}, says),
    ]
    return {"layer": layers, "height": {"step": 44}}


def _panels(plot: Panels, canvas: Canvas) -> Json:
    labels = _labels([panel.label for panel in plot.panels], 16)
    floor = plot.y.ends[0] if plot.y.ends else 0
    values: list[Json] = []
    for panel in plot.panels:
        row = {"panel": labels[panel.label]}
        values += [row | {"x": x, "y": y, "kept": x <= panel.cut, "floor": floor} for x, y in panel.points]
        values.append(row | {"cut": panel.cut, "note": plain(panel.label)})
    x, y = _at("x", plot.x, ticks=2, flush=True), _at("y", plot.y, ticks=2) | {"stack": None}
    blue = SERIES[1].light
    known = [{"filter": "isValid(datum.x)"}]
    layers = [
        {
            "transform": [*known, {"filter": "datum.kept"}],
            "mark": {"type": "area", "color": blue, "opacity": 0.22, "aria": False},
            "encoding": {"x": x, "y": y, "y2": {"field": "floor"}},
        },
        {
            "transform": known,
            "mark": {"type": "line", "color": blue, "strokeWidth": 1.8, "aria": False},
            "encoding": {"x": x, "y": y},
        },
        {
            "transform": [{"filter": "isValid(datum.cut)"}],
            "mark": _CUT,
            "encoding": {"x": {"field": "cut", "type": "quantitative"}, "description": _NOTE},
        },
    ]
    columns = min(canvas.columns, len(plot.panels))
    width = (canvas.width - PANEL_AXIS) // columns - PANEL_GAP
    header = {"labelExpr": _AFTER_NUMBER, "labelFontSize": 11, "labelColor": TEXT.light, "labelPadding": 3}
    return {
        "data": {"values": values},
        "facet": {"field": "panel", "type": "nominal", "header": header | {"title": None}},
        "columns": columns,
        "spacing": {"row": 12, "column": PANEL_GAP},
        "spec": {"layer": layers, "width": width, "height": min(round(0.65 * width), 130)},
    }


_NOTE: Json = {"field": "note", "type": "nominal"}
_WHISKER: Json = {"type": "rule", "strokeWidth": 1.5}
_CUT: Json = {"type": "rule", "color": WARN.light, "strokeDash": [4, 3], "strokeWidth": 1.5}
_AFTER_NUMBER = "slice(datum.value, 5)"


def _layer(values: Sequence[Mapping[str, Any]], mark: Json, encoding: Json) -> Json:
    """Return a layer; marks without a note are silent at the pointer."""
    silent = {} if "description" in encoding else {"aria": False}
    return {"data": {"values": list(values)}, "mark": mark | silent, "encoding": encoding}


def _between(axis: str, low: str, high: str) -> Json:
    return {axis: {"field": low, "type": "quantitative"}, f"{axis}2": {"field": high}}


def _bar(bar: Bar, row: str, number: int) -> Json:
    note = bar.note or ": ".join(filter(None, [bar.label, bar.series, f"{bar.value:.4g}"]))
    return {"row": row, "value": bar.value, "series": plain(bar.series), "note": plain(note), "number": number}


def _points(points: Sequence[PlotPoint]) -> list[Json]:
    fields = ("x", "y", "low", "high", "x_low", "x_high")
    return [
        {name: getattr(point, name) for name in fields if getattr(point, name) is not None}
        | {"series": plain(point.series), "note": plain(point.note)}
        for point in points
    ]


def _labels(names: Sequence[str], most: int = LABEL) -> dict[str, str]:
    """Return a unique key for each row: its number, and its shortened label without the prefix that all names share."""
    texts = [plain(name) for name in names]
    begins = os.path.commonprefix(texts) if len(texts) > 2 else ""  # noqa: RUF071 - names, no paths
    begins = begins[: begins.rfind(".") + 1]
    if len(begins) > 3 and max(map(len, texts)) > most:
        texts = [f"\u2026{text[len(begins) :]}" for text in texts]
    return {
        name: f"{number:05d}{shortened(text, most)}"
        for number, (name, text) in enumerate(zip(names, texts, strict=True))
    }


def _rows(labels: Mapping[str, str]) -> Json:
    axis = {"labelExpr": _AFTER_NUMBER, "ticks": False, "domain": False, "labelPadding": 6}
    return {"field": "row", "type": "nominal", "sort": list(labels.values()), "title": None, "axis": axis}


def _at(field: str, axis: Axis, *, ticks: int = 5, flush: bool = False) -> Json:
    """Return the encoding of a position on an axis."""
    scale: Json = {"type": "log"} if axis.scale == "log" else {"zero": axis.zero}
    if axis.ends:
        scale |= {"domain": list(axis.ends), "nice": False}
    else:
        scale |= {"nice": axis.scale != "log"} | ({} if axis.zero else {"padding": 14})
    look = {"format": axis.form, "tickCount": ticks, "labelFlush": flush}
    look |= {"values": list(axis.ticks)} if axis.ticks else {}
    return {"field": field, "type": "quantitative", "title": plain(axis.title), "scale": scale, "axis": look}


def _colour(series: Sequence[str]) -> Json:
    names = [plain(name) for name in series]
    colours = [SERIES[index % len(SERIES)].light for index in range(len(names))]
    scale: Json = {"domain": names, "range": colours}
    longest = max(map(len, names), default=0)
    legend = {"columns": 4 if longest < 12 else 2 if longest < 24 else 1} if len(names) > 1 else None
    return {"field": "series", "type": "nominal", "scale": scale} | {"legend": legend}


def _shape(series: Sequence[str]) -> Json:
    """Return the encoding by shape, which repeats that by colour for people who do not see the difference."""
    names = [plain(name) for name in series]
    shapes = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
    picked = [shapes[index % len(shapes)] for index in range(len(names))]
    return {"field": "series", "type": "nominal", "scale": {"domain": names, "range": picked}, "legend": None}


# -- labels of dots


def placed_labels(
    points: Sequence[PlotPoint],
    x: Axis,
    y: Axis,
    rings: Sequence[PlotPoint] = (),
    area: tuple[float, float] = NARROW.area,
) -> list[dict[str, Any]]:
    """Return text and place of the labels: `label`, and `x` and `y` of its centre in units of the axes.

    Args:
        points: the dots; not all need labels.
        x: the horizontal axis.
        y: the vertical axis.
        rings: those of the dots that have a ring.
        area: width and height of the area between the axes, in pixels.

    Raises:
        ValueError: labels on an axis without fixed ends, or with a logarithmic one.
    """
    if not any(point.label for point in points):
        return []
    if x.ends is None or y.ends is None or "log" in (x.scale, y.scale):
        raise ValueError("dots with labels need linear axes with fixed ends")
    (left, right), (low, high) = x.ends, y.ends
    across, up = area[0] / ((right - left) or 1.0), area[1] / ((high - low) or 1.0)
    taken = []
    for point in points:
        size = RING if point in rings else DOT
        taken.append(_box((point.x - left) * across, (point.y - low) * up, size, size))
        if point.low is not None and point.high is not None:
            centre = ((point.x - left) * across, ((point.low + point.high) / 2 - low) * up)
            taken.append(_box(*centre, WHISKER, (point.high - point.low) * up))
        if point.x_low is not None and point.x_high is not None:
            centre = (((point.x_low + point.x_high) / 2 - left) * across, (point.y - low) * up)
            taken.append(_box(*centre, (point.x_high - point.x_low) * across, WHISKER))
    placed = []
    for point in filter(lambda point: point.label, points):
        dot = ((point.x - left) * across, (point.y - low) * up)
        centre, box = _best(dot, RING if point in rings else DOT, len(point.label) * CHARACTER, taken, area)
        taken.append(box)
        placed.append({"label": plain(point.label), "x": left + centre[0] / across, "y": low + centre[1] / up})
    return placed


def _best(
    dot: tuple[float, float], size: float, width: float, taken: Sequence[Box], area: tuple[float, float]
) -> tuple[tuple[float, float], Box]:
    """Return the nearest place that overlaps least, and its box."""
    places = []
    for number, (gap, (sideways, upwards)) in enumerate(product(GAPS, DIRECTIONS)):
        centre = (
            dot[0] + sideways * (size / 2 + gap + width / 2),
            dot[1] + upwards * (size / 2 + gap + LINE / 2),
        )
        box = _box(*centre, width, LINE)
        covered = sum(_overlap(box, other) for other in taken) + _outside(box, area)
        places.append((covered, number, centre, box))
    _, _, centre, box = min(places)
    return centre, box


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, x + width / 2, y - height / 2, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    """Return the area that two boxes share."""
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[2], b[2]))


def _outside(box: Box, area: tuple[float, float]) -> float:
    """Return how much of a box is outside the area between the axes."""
    return _overlap(box, box) - _overlap(box, (0.0, area[0], 0.0, area[1]))
