"""The page of a sweep: quality against time, bytes and MACs."""

import hashlib
from typing import Literal

from rsi_deploy.core.text import human_bytes, human_count
from rsi_deploy.report.pages.environment import environment_section
from rsi_deploy.report.pages.html import render
from rsi_deploy.report.pages.page import Block, Page, Picture, Section, Tile
from rsi_deploy.report.pages.plots import Axis, Dots, PlotPoint
from rsi_deploy.report.summary import share
from rsi_deploy.report.sweep_schema import Sweep, SweepPoint
from rsi_deploy.report.table import Table, with_interval

Cost = Literal["time", "bytes", "macs"]
SHARES = {"macs": "MACs", "params": "parameters", "latency": "dense model's time", "size": "dense model's bytes"}
TITLES: dict[Cost, str] = {"time": "share of the dense time", "bytes": "bytes of the model", "macs": "MACs a sample"}
SERIES = ("points", "onnxruntime's own")
COLUMNS = (
    "point",
    "model",
    "#share",
    "#parameters",
    "#MACs",
    "#bytes",
    "#ms",
    "speedup",
    "#quality",
    "#in-sample",
    "on the front of",
)


def sweep_page(sweep: Sweep, document: str) -> str:
    """Return the page of a sweep as HTML; `document` is the content of sweep.json."""
    return render(page_of_sweep(sweep, hashlib.sha256(document.encode()).hexdigest()))


def page_of_sweep(sweep: Sweep, source: str = "") -> Page:
    """Return the page of a sweep; `source` is the sha256 of its document, or ""."""
    made = [point for point in sweep.points if not point.problem]
    problems = [f"point {p.number} ({p.share:.0%}): {p.problem}" for p in sweep.points if p.problem]
    if not sweep.is_done:
        problems.insert(0, f"unfinished: {len(sweep.points)} of {len(sweep.shares)} points; run the command again")
    table = Table(caption="Every point of the sweep", columns=COLUMNS, rows=sweep_rows(sweep))
    sections = [section for cost in TITLES if (section := _section(sweep, cost)) is not None]
    return Page(
        title=f"{sweep.model}, sweep",
        kind=f"Sweep of {sweep.tool}",
        verdict=f"{len(made)} models from {sweep.shares[0]:.0%} to {sweep.shares[-1]:.0%} of the {SHARES[sweep.by]}.",
        facts=[
            ("Request", f"{len(sweep.shares)} shares of the {SHARES[sweep.by]}; {sweep.command}"),
            ("Quality", quality_name(sweep)),
            *([("Times", times)] if (times := times_name(sweep)) else []),
            ("Deliver one", "rsi-deploy export --from-sweep DIR --point N -o BUNDLE"),
            ("Created", sweep.created),
        ],
        tiles=[Tile(label="Points", after=str(len(made)), change=f"of {len(sweep.shares)} requested")],
        remarks=[*problems, *sweep.notes],
        sections=[
            Section(name="points", title="All points", blocks=[Block(table=table, wide=True)]),
            *sections,
            environment_section(sweep.environment),
        ],
        source=source,
    )


def quality_name(sweep: Sweep) -> str:
    """Return what the quality of the points measures."""
    if any(point.top1 is not None for point in sweep.points):
        return "top-1 on the evaluation data, %"
    if any(point.agreement is not None for point in sweep.points):
        return "equal top-1 answers on the check part of the calibration data, %"
    if any(point.cosine is not None for point in sweep.points):
        return "mean cosine on the check part of the calibration data"
    return "negative output error on the check part of the calibration data"


def times_name(sweep: Sweep) -> str:
    """Return how the times of the points were measured; "" if they were not."""
    if all(point.speedup is None for point in sweep.points):
        return ""
    if sweep.side_by_side:
        return "all points and the dense model side by side, in one run"
    return "each point in its own run with the dense model; compare points with care"


def sweep_rows(sweep: Sweep) -> list[tuple[str, ...]]:
    """Return a row for each point and rival, with the columns `COLUMNS`; a rival that a point delivers has one row."""
    fronts: dict[Cost, list[SweepPoint]] = {cost: sweep.front(cost) for cost in TITLES}
    rows = []
    if sweep.dense is not None:
        top1 = "" if sweep.dense_top1 is None else f"{sweep.dense_top1:.4g}"
        size = human_bytes(sweep.dense.bytes)
        rows.append(("dense", "", "100%", "100.0 %", "100.0 %", size, *[""] * 2, top1, "", ""))
    for point in sweep.shown:
        number, name = _label(sweep, point), point.precision or "low rank"
        if point.size is None:
            rows.append((number, "", f"{point.share:.0%}", *[""] * 7, point.problem))
            continue
        on = ", ".join(cost for cost, front in fronts.items() if point in front)
        dense = sweep.dense
        rows.append(
            (
                number,
                name,
                f"{point.share:.0%}",
                share(point.size.params, dense.params if dense else 0),
                share(point.size.macs, dense.macs if dense else 0),
                human_bytes(point.size.bytes),
                "" if point.latency_ms is None else f"{point.latency_ms:.3g}",
                _speedup(point),
                _quality(sweep, point),
                _in_sample(point),
                "broken outputs" if point.is_broken else on,
            )
        )
    return rows


def _label(sweep: Sweep, point: SweepPoint) -> str:
    """Return "3", "rival", or "3, rival" for a point that delivers a rival."""
    parts = [str(point.number)] * bool(point.number) + ["rival"] * sweep.is_rival(point)
    return ", ".join(parts)


def _quality(sweep: Sweep, point: SweepPoint) -> str:
    """Return the quality; "" for a rival without top-1 where the points have one."""
    is_other = point.top1 is None and sweep.dense_top1 is not None
    return "" if point.quality is None or is_other else f"{point.quality:.4g}"


def _in_sample(point: SweepPoint) -> str:
    """Return the quality on samples of the fit part; "" where the quality is top-1 on evaluation data."""
    if point.in_sample is None or point.top1 is not None:
        return ""
    is_error = point.agreement is None and point.cosine is None
    return f"{-point.in_sample if is_error else point.in_sample:.4g}"


def _section(sweep: Sweep, cost: Cost) -> Section | None:
    places = [place for point in sweep.comparable if (place := _place(sweep, point, cost)) is not None]
    if not places:
        return None
    front = [place for point in sweep.front(cost) if (place := _place(sweep, point, cost)) is not None]
    picture = Picture(
        name=f"front-{cost}",
        title=f"Quality over {TITLES[cost]}",
        description=f"A dot for each point: {quality_name(sweep)} over {TITLES[cost]}; the front is joined.",
        plot=Dots(
            points=places,
            x=Axis(title=TITLES[cost], form="~s" if cost != "time" else ".2f"),
            y=Axis(title=quality_name(sweep).partition(" on ")[0], form=".4~g"),
            series=[series for series in SERIES if any(place.series == series for place in places)],
            front=front,
        ),
    )
    return Section(name=f"front-{cost}", title=f"Against {TITLES[cost]}", blocks=[Block(picture=picture)])


def _place(sweep: Sweep, point: SweepPoint, cost: Cost) -> PlotPoint | None:
    if point.size is None or point.quality is None or (cost == "time" and point.speedup is None):
        return None
    x = {"time": 1 / (point.speedup or 1.0), "bytes": float(point.size.bytes), "macs": float(point.size.macs)}[cost]
    ends = (None, None)
    if cost == "time" and point.speedup_interval is not None:
        low, high = point.speedup_interval
        ends = (1 / high, 1 / low)  # type: ignore[assignment]
    price = human_count(point.size.macs) if cost == "macs" else f"{x:.3g}"
    name = f"point {_label(sweep, point)}" if point.number else point.precision
    note = f"{name}: {price}, {point.quality:.4g}"
    return PlotPoint(
        x=x, y=point.quality, series=SERIES[0 if point.number else 1], x_low=ends[0], x_high=ends[1], note=note
    )


def _speedup(point: SweepPoint) -> str:
    if point.speedup is None or point.speedup_interval is None:
        return ""
    return with_interval(f"{point.speedup:.2f}x", point.speedup_interval)
