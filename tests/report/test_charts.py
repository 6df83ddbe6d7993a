import re
from xml.etree import ElementTree

import pytest

from rsi_deploy.report.pages.charts import svg
from rsi_deploy.report.pages.plots import Axis, Bar, Bars, Curves, Dots, Panel, Panels, PlotPoint, Span, Spans
from rsi_deploy.report.pages.theme import ALL, GRID, MUTED, SERIES, TEXT, WARN

LINEAR = Axis(title="x", zero=True)
POINTS = [PlotPoint(x=x, y=1 / x, low=0.9 / x, high=1.1 / x, series=s) for x in (1, 2, 4) for s in ("a", "b")]
PLOTS = {
    "bars": Bars(bars=[Bar(label="one", value=1), Bar(label="two", value=2)], axis=LINEAR, mark=(1.5, "here")),
    "groups": Bars(bars=[Bar(label="l", value=v, series=s) for s, v in (("a", 1), ("b", 2))], axis=LINEAR, series="ab"),
    "overlaid": Bars(
        bars=[Bar(label="l", value=v, series=s) for s, v in (("a", 2), ("b", 1))],
        axis=LINEAR,
        series="ab",
        overlaid=True,
    ),
    "curves": Curves(points=POINTS, x=Axis(title="x", scale="log"), y=LINEAR, series="ab", marks=POINTS[:1]),
    "steps": Curves(points=POINTS, x=LINEAR, y=LINEAR, series="ab", dots=False, steps=True),
    "dots": Dots(points=POINTS[:2], x=LINEAR, y=LINEAR, series="ab", front=POINTS[::2]),
    "labels": Dots(
        points=[PlotPoint(x=x, y=x, series="a", label=str(x)) for x in (1, 2, 4)],
        x=Axis(title="x", ends=(0, 5)),
        y=Axis(title="y", ends=(0, 5)),
        series="ab",
        rings=[PlotPoint(x=2, y=2, series="a")],
    ),
    "spans": Spans(spans=[Span(label="l", median=1, interval=(0.9, 1.1), percentiles={"p90": 2})], axis=LINEAR),
    "panels": Panels(
        panels=[Panel(label=f"p{i}", points=[(1, 1), (50, 0.5), (100, 0.1)], cut=50) for i in range(4)],
        x=Axis(title="x", ends=(0, 100)),
        y=Axis(title="", scale="log", ends=(0.1, 1)),
    ),
}


def drawn(plot, title="A title"):
    return svg(plot, name="here", title=title, description="What it shows.")


def texts(picture):
    return ["".join(e.itertext()) for e in ElementTree.fromstring(picture).iter("text")]


@pytest.mark.parametrize("kind", PLOTS)
def test_a_picture_fits_every_page(kind):
    picture = drawn(PLOTS[kind])
    root = ElementTree.fromstring(picture)
    assert root.attrib.keys() == {"viewBox", "role", "aria-labelledby", "class"}  # no size of its own
    assert [root.find("title").text, root.find("desc").text] == ["A title", "What it shows."]
    assert root.get("aria-labelledby") == "here-title here-desc"
    assert 300 <= float(root.get("viewBox").split()[2]) <= 460
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert all(name.startswith("here-") for name in ids)
    assert set(re.findall(r"url\(#([^)]*)\)", picture)) <= set(ids)
    assert "http" not in picture


@pytest.mark.parametrize("kind", PLOTS)
def test_every_colour_has_its_value_in_the_dark(kind):
    used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-fA-F]+)"', drawn(PLOTS[kind])))
    assert used
    assert used <= {colour.light for colour in ALL}


def test_the_same_plot_gives_the_same_picture():
    assert all(drawn(plot) == drawn(plot) for plot in PLOTS.values())


def test_bars_are_as_long_as_their_values():
    picture = drawn(PLOTS["bars"])
    lengths = re.findall(rf'<path d="M0,[\d.]+h([\d.]+)[^"]*" fill="{SERIES[1].light}"><title>(\w+): ', picture)
    (one, _), (two, _) = sorted(((float(a), b) for a, b in lengths), key=lambda pair: pair[1])
    assert two == pytest.approx(2 * one, rel=1e-3)
    assert {"one", "two", "here"} <= set(texts(picture))


def test_groups_and_layers_have_a_bar_for_each_series():
    for kind in ("groups", "overlaid"):
        picture = drawn(PLOTS[kind])
        for colour in SERIES[:2]:
            assert len(re.findall(rf'fill="{colour.light}"><title>l: ', picture)) == 1
        assert {"a", "b", "l"} <= set(texts(picture))


def test_stacked_bars_end_where_the_next_begins():
    bars = [Bar(label="l", value=1.0, series="a"), Bar(label="l", value=3.0, series="b")]
    picture = drawn(Bars(bars=bars, axis=LINEAR, series="ab", stacked=True))
    (a,), (b,) = (
        re.findall(rf'<path d="M([\d.]+),[\d.]+h([\d.]+)[^"]*" fill="{colour.light}"><title>', picture)
        for colour in SERIES[:2]
    )
    assert float(a[0]) == 0
    assert float(b[0]) == pytest.approx(float(a[1]), abs=0.01)
    assert float(b[1]) == pytest.approx(3 * float(a[1]), rel=1e-3)


def test_rows_of_equal_names_stay_apart():
    long = "a" * 60
    names = [f"{long}{i}{long}" for i in range(3)]  # equal once they are shortened
    picture = drawn(Bars(bars=[Bar(label=name, value=1) for name in names], axis=LINEAR))
    assert sum("..." in text for text in texts(picture)) == 3


def test_what_all_names_begin_with_is_left_out():
    names = [f"model.encoder.layers.{i}.attention.query" for i in range(3)]
    picture = drawn(Bars(bars=[Bar(label=name, value=1) for name in names], axis=LINEAR))
    assert {f"\u2026{i}.attention.query" for i in range(3)} <= set(texts(picture))
    assert f"<title>{names[0]}: 1</title>" in picture


def test_names_are_text():
    picture = drawn(Bars(bars=[Bar(label="<b>&\"'\x00", value=1)], axis=LINEAR), title="</title><script>")
    ElementTree.fromstring(picture)
    assert "<script" not in picture
    assert "<b>&\"'\\x00" in texts(picture)


# -- the palette


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("ground", "shade"), [("#ffffff", "light"), ("#1b222a", "dark")])
def test_contrast(ground, shade):
    for colour in (TEXT, MUTED, WARN):
        assert contrast(getattr(colour, shade), ground) >= 4.5, colour  # WCAG 2.2, text
    for colour in SERIES:
        assert contrast(getattr(colour, shade), ground) >= 3, colour  # graphics
    assert contrast(getattr(GRID, shade), ground) < 2  # a grid stays behind
