"""What reports show of a choice of precision: on the terminal, on the card and on the page."""

import html
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from nets import mlp_onnx
from pages import PageReader, assert_self_contained
from precision_records import ERROR, record
from rich.console import Console

from rsi_deploy import export
from rsi_deploy.report.card import model_card
from rsi_deploy.report.pages.charts import CHARACTER, LINE, NARROW, placed_labels
from rsi_deploy.report.pages.plots import Axis, PlotPoint
from rsi_deploy.report.pages.precision import precision_section
from rsi_deploy.report.pages.report import report_page
from rsi_deploy.report.schema import read_report
from rsi_deploy.report.summary import point_measure, points_table, precision_lines, site_table
from rsi_deploy.report.tables.report import print_report

KINDS = {
    "agreement": ("agreement", "98.7 %"),
    "cosine": ("mean cosine", "0.9870"),
    "output_error": ("output error", "9."),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("precision")
    export(str(mlp_onnx(root / "m.onnx")), root / "b", rank=6, measure=False, allow_larger=True)
    return root / "b" / "model.onnx"


@pytest.fixture(scope="module")
def plain(model):
    return read_report(model.parent)


def with_choice(plain, **options):
    return plain.model_copy(update={"precision": record(**options)})


def test_a_report_with_a_choice_is_read_as_it_was_written(plain):
    report = with_choice(plain, more_bits={"fc1": 4})
    assert type(report).model_validate_json(report.model_dump_json()) == report
    assert report.bits == {"fc1": 4}
    assert plain.bits == {}


def terminal(report):
    file = io.StringIO()
    print_report(Console(file=file, width=170, highlight=False), report)
    return file.getvalue()


@pytest.mark.parametrize("is_given", [False, True])
def test_errors_of_the_outputs_name_their_inputs(plain, model, is_given):
    report = plain.model_copy(update={"probe_given": is_given, "accuracy": None, "calibration": None})
    right, wrong = "on the inputs of --feeds", "on random inputs"
    if not is_given:
        right, wrong = wrong, right
    for text in (terminal(report), html.unescape(report_page(report, "{}")), model_card(report, model)):
        assert right in text
        assert wrong not in text


def shown(report, model):
    page = report_page(report, report.model_dump_json())
    return {"terminal": terminal(report), "card": model_card(report, model), "page": PageReader(page).words}


def test_without_a_choice_nothing_is_shown(plain, model):
    assert plain.precision is None
    assert not points_table(plain).rows
    assert precision_lines(plain) == []
    for text in shown(plain, model).values():
        assert "Models that were compared" not in text
        assert "--precision" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_has_a_row(plain, kind):
    report = with_choice(plain, kind=kind)
    table = points_table(report)
    assert len(table.rows) == len(report.precision.points)
    for number, (point, row) in enumerate(zip(report.precision.points, table.rows, strict=True), 1):
        cells = dict(zip((head for head, _ in table.heads), row, strict=True))
        assert cells["model"] == f"{number}. {point.name}"
        assert (cells["result"] == "delivered") == point.is_delivered
        assert bool(cells["bytes"]) == bool(cells[KINDS[kind][0]]) == (point.bytes is not None)
        assert bool(cells["speed-up"]) == (point.speedup is not None)
    delivered = table.rows[7]
    assert list(delivered[1:3]) == ["700.00 kB", "20.4 %"]
    assert delivered[3].startswith(KINDS[kind][1])
    assert delivered[4] == "3.20x [3.10, 3.33]"
    assert table.rows[3][-1] == ERROR
    assert table.rows[2][-1] == "misses the limit"


def test_the_three_renderings_have_the_same_rows(plain, model):
    report = with_choice(plain)
    found = shown(report, model)
    for point in report.precision.points:
        for text in found.values():
            assert point.name in text
    for text in found.values():
        assert "4.70x [4.56, 4.89]" in text
        assert report.precision.rule in text
        assert "onnxruntime's own tools quantize it" not in text, "no rival is delivered"


def test_a_delivered_rival_is_named(plain, model):
    report = with_choice(plain, delivered=1)
    for text in shown(report, model).values():
        assert "onnxruntime's static int8 (minmax), is the dense model as onnxruntime's own tools quantize it" in text
    dense = precision_lines(with_choice(plain, delivered=0))
    assert any("as it is" in line for line in dense)
    assert not any("quantize" in line for line in dense)


def test_without_times_or_quality_their_columns_are_left_out(plain):
    columns = points_table(with_choice(plain, timed=False)).columns
    assert "#speed-up" not in columns
    assert "#agreement" in columns
    points = tuple(point.model_copy(update={"quality": None}) for point in record().points)
    nothing = plain.model_copy(update={"precision": record().model_copy(update={"points": points})})
    assert point_measure(nothing.precision) is None
    assert len(precision_section(nothing).blocks) == 1, "a table, and no picture"
    report_page(nothing, "")


def test_sites_show_their_bits(plain, model):
    bits = {plain.sites[0].name: 4, plain.sites[1].name: 8}
    table = site_table(plain.sites, bits)
    place = list(table.columns).index("#bits")
    assert [row[place] for row in table.rows] == ["4", "8", ""]
    assert "#bits" not in site_table(plain.sites).columns
    by_node = site_table(plain.sites, {plain.sites[2].nodes[0]: 4})
    assert [row[place] for row in by_node.rows] == ["", "", "4"]
    report = with_choice(plain, more_bits=bits)
    text = shown(report, model)
    assert all("1 in 4 bits, 1 in 8 bits" in shown_text for shown_text in text.values())
    page = PageReader(report_page(report, ""))
    assert any("bits" in rows[0] for caption, rows in page.tables.items() if caption.startswith("Every site"))


# -- pictures


def pictures(page):
    return {
        found[1]: ElementTree.fromstring(found[0])
        for found in re.finditer(r'<svg [^>]*aria-labelledby="precision-(\w+)-title.*?</svg>', page, re.DOTALL)
    }


def test_the_page_draws_every_model_and_rings_the_delivered_one(plain):
    report = with_choice(plain)
    page = report_page(report, "")
    assert_self_contained(page)
    found = pictures(page)
    assert found.keys() == {"bytes", "time"}
    for name, picture in found.items():
        labels = ["".join(text.itertext()) for text in picture.iter("text")]
        made = {str(n) for n, point in enumerate(report.precision.points, 1) if point.quality is not None}
        assert made <= set(labels), name
        assert "4" not in labels, "a model that could not be made has no dot"
        assert {"dense", "rsi-deploy", "onnxruntime's own tools"} <= set(labels)
        notes = [title.text for title in picture.iter("title") if re.match(r"\d+: ", title.text or "")]
        assert len(notes) == len(made)
    assert pictures(report_page(with_choice(plain, timed=False), "")).keys() == {"bytes"}


def test_one_dot_has_a_ring(plain):
    for delivered in (0, 1, 7):
        report = with_choice(plain, delivered=delivered)
        for block in precision_section(report).blocks[1:]:
            (ring,) = block.picture.plot.rings
            assert ring.label == str(delivered + 1)
            assert ring in block.picture.plot.points


X, Y = Axis(title="x", ends=(0.0, 1.0)), Axis(title="y", ends=(90.0, 100.0))


def overlaps(labels):
    """Return the pairs of labels, by number, whose boxes share an area."""
    boxes = [
        (at["x"] * NARROW.area[0], (at["y"] - 90) / 10 * NARROW.area[1], len(at["label"]) * CHARACTER) for at in labels
    ]
    return [
        (i, j)
        for i, (x, y, width) in enumerate(boxes)
        for j, (other_x, other_y, other) in enumerate(boxes[:i])
        if abs(x - other_x) < (width + other) / 2 - 0.01 and abs(y - other_y) < LINE - 0.01
    ]


@pytest.mark.parametrize("spread", [1.0, 0.2, 0.05, 0.0])
@pytest.mark.parametrize("seed", range(5))
def test_ten_labels_do_not_overlap(spread, seed):
    rng = np.random.default_rng(seed)
    places = 0.5 + spread * (rng.random((10, 2)) - 0.5)
    points = [
        PlotPoint(
            x=float(x), y=float(90 + 10 * y), series="s", low=float(89 + 10 * y), high=float(91 + 10 * y), label=str(n)
        )
        for n, (x, y) in enumerate(places, 1)
    ]
    labels = placed_labels(points, X, Y, points[:1])
    assert [at["label"] for at in labels] == [str(n) for n in range(1, 11)]
    assert overlaps(labels) == []
    assert all(0 <= at["x"] <= 1 and 90 <= at["y"] <= 100 for at in labels)
    if spread < 0.1:
        assert overlaps([{"label": p.label, "x": p.x + 0.03, "y": p.y} for p in points]), "each right of its dot"


def test_dots_without_labels_get_none():
    assert placed_labels([PlotPoint(x=0, y=1, series="s")], Axis(title="x"), Axis(title="y")) == []
    with pytest.raises(ValueError, match="fixed ends"):
        placed_labels([PlotPoint(x=0, y=1, series="s", label="1")], Axis(title="x"), Y)
