"""The picture on the README's first screen, drawn from stored results: `python -m bench.picture`

    left     top-1 against size: ResNet-20 and ResNet-56 under budgets of MACs, and an exact SVD of equal ratios
    right    unchanged answers against time: the twelve models of a sweep of ResNet-56, timed in one run

Nothing is measured here. The same results give the same bytes, so a test compares the stored picture with the results.
Colours follow the reader's light or dark setting, and the picture brings its own background for pages that do not.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rsi_deploy.io.atomic import write_text
from rsi_deploy.report.pages.charts import svg
from rsi_deploy.report.pages.plots import Axis, Curves, Dots, Plot, PlotPoint
from rsi_deploy.report.pages.theme import ALL

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "images" / "front.svg"

PRODUCT = {"ResNet-56": "accuracy/resnet56-2026-11-25.json", "ResNet-20": "accuracy/resnet20-2026-11-25.json"}
WITHOUT_DATA = "accuracy/resnet20-2026-11-22.json"
SWEEP = "sweep/resnet56-2026-11-26b.md"
SVD = "ResNet-20, exact SVD"

WIDTH, HEIGHT, GAP = 860, 286, 20
GROUND = ("#ffffff", "#12171d")
ONE_RUN = re.compile(r"(?P<speed>[\d.]+)x \[(?P<low>[\d.]+), (?P<high>[\d.]+)\]")


def accuracy_points() -> list[PlotPoint]:
    """Top-1 in percent against the share of parameters that is kept; intervals span the draws of calibration data."""
    points = []
    for name, file in PRODUCT.items():
        document = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        (net,) = document["settings"]["nets"].values()
        points.append(PlotPoint(x=100, y=net["dense"], series=name, note=f"{name}, dense: {net['dense']:.2f} %"))
        points += _rows(document, name, "sensitivities")
    points += _rows(json.loads((RESULTS / WITHOUT_DATA).read_text(encoding="utf-8")), SVD, "exact SVD")
    return points


def _rows(document: dict[str, list[dict[str, float]]], series: str, arm: str) -> Iterator[PlotPoint]:
    for row in document["rows"]:
        if row["arm"] == arm:
            size, score = 100 * row["kept_params"], row["score"]
            kept = f"{size:.1f} % of the parameters and {100 * row['kept_macs']:.0f} % of the MACs"
            note = f"{series}: {score:.2f} % with {kept}"
            yield PlotPoint(x=size, y=score, low=row["lowest"], high=row["highest"], series=series, note=note)


def sweep_points() -> list[PlotPoint]:
    """Answers equal to the dense model's, in percent, against the time of a call in percent of the dense model's."""
    points = [PlotPoint(x=100, y=100, series="dense", note="dense model")]
    for line in (RESULTS / SWEEP).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) < 2 or (found := ONE_RUN.fullmatch(cells[-2])) is None:
            continue
        time, low, high = 100 / float(found["speed"]), 100 / float(found["high"]), 100 / float(found["low"])
        note = f"{cells[1]} of the MACs as the budget: {time:.0f} % of the time, {cells[-1]} % equal answers"
        points.append(PlotPoint(x=time, y=float(cells[-1]), x_low=low, x_high=high, series="compressed", note=note))
    return points


def plots() -> list[tuple[str, str, str, Plot]]:
    """Name, title, description and plot of each half."""
    accuracy = Curves(
        points=accuracy_points(),
        x=Axis(title="parameters kept, %", form="d"),
        y=Axis(title="top-1 on CIFAR-10, %", form="d", ends=(0, 100)),
        series=[SVD, *PRODUCT],
    )
    swept = Dots(
        points=sweep_points(),
        x=Axis(title="time of a call, % of the dense model's", form="d"),
        y=Axis(title="answers as the dense model, %", form=".1f", ends=(97.5, 100.2)),
        series=["dense", "compressed"],
    )
    return [
        (
            "size",
            "Accuracy against size",
            "ResNet-56 and ResNet-20 keep their top-1 while parameters go; an exact SVD at equal ratios loses it.",
            accuracy,
        ),
        (
            "time",
            "ResNet-56: unchanged answers against time",
            "Twelve models of one sweep: from 100 % of the time and all answers to 76 % of it and 98 % of them.",
            swept,
        ),
    ]


def picture() -> str:
    """Both halves side by side as one SVG document."""
    width = (WIDTH - 3 * GAP) // 2
    parts = []
    for place, (name, title, description, plot) in enumerate(plots()):
        left = GAP + place * (width + GAP)
        drawn = svg(plot, name=name, title=title, description=description)
        parts.append(f'<text class="head" x="{left + 14}" y="28" fill="{ALL[0].light}">{title}</text>')
        parts.append(
            drawn.replace(
                "<svg ",
                f'<svg x="{left}" y="40" width="{width}" height="{HEIGHT - 48}" preserveAspectRatio="xMidYMin" ',
                1,
            )
        )
    style = "text { font-family: sans-serif } .head { font-size: 15px; font-weight: 600 }"
    dark = f".ground {{ fill: {GROUND[1]} }}" + "".join(
        f'[fill="{colour.light}"] {{ fill: {colour.dark} }} [stroke="{colour.light}"] {{ stroke: {colour.dark} }}'
        for colour in ALL
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f"<style>{style} @media (prefers-color-scheme: dark) {{ {dark} }}</style>"
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{GROUND[0]}"/>{"".join(parts)}</svg>\n'
    )


def main(arguments: Sequence[str]) -> int:
    """Draw the picture."""
    options = argparse.ArgumentParser(prog="python -m bench.picture", description=__doc__)
    options.add_argument("--output", type=Path, default=PICTURE, metavar="FILE", help="default: docs/images/front.svg")
    write_text(options.parse_args(arguments).output, picture())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
