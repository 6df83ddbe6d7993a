import re

import pytest
from bench_documents import arm, cell, document
from full_document import LABELS, full_document, loadgen
from pages import assert_self_contained

from rsi_deploy.report.pages.bench import bench_page

HOSTILE = ("<script>alert(1)</script>", "\"'><img src=x>", "\u202egnirts & nul\x00")
SECTIONS = {
    "pareto": "accuracy",
    "profile": "profile",
    "memory": "memory",
    "cold-start": "cold_start",
    "bursts": "bursts",
    "throughput": "throughput",
    "streams": "streams",
    "loadgen": "loadgen",
}


@pytest.fixture(scope="module")
def full():
    return full_document()


@pytest.fixture(scope="module")
def text(full):
    return bench_page(full)


@pytest.fixture(scope="module")
def page(text):
    return assert_self_contained(text)


def test_every_section_is_there(page):
    assert {"verdicts", "scaling", "latency", "accuracy", "files", "environment", *SECTIONS} <= set(page.ids())
    assert "None" not in page.words


def test_the_verdict_comes_first(full, text, page):
    assert full.cells[0].arms[2].verdict in text[: text.index("</header>")]
    assert "In the other configurations: 4 faster, 2 slower." in page.words
    before = text[: text.index('id="verdicts"')]
    assert "rank 50% is slower at batch 1, 2 threads: 1.40x slower [1.36, 1.44]." in before
    assert "INVALID according to LoadGen: dense, SingleStream." in before
    assert "a note of the run" in before
    assert before.count("a note of this cell") == 1  # a note of four cells is shown once


def test_its_numbers_are_those_of_the_document(full, page):
    verdicts = [(c.name, a) for c in full.cells for a in c.arms]
    assert [row[:3] for row in page.table("Medians")] == [[n, a.label, f"{a.median_ms:.3f}"] for n, a in verdicts]
    assert [row[-1] for row in page.table("Medians")] == [a.verdict if a.speedup else "" for _, a in verdicts]
    scaling = page.table("Milliseconds a sample")
    assert [row[0] for row in scaling] == ["1", "4", "16"]
    assert scaling[1][1] == f"{full.cells[1].arms[0].median_ms / 4:.4g}"
    ops = {row[0]: row[1:] for row in page.table("Milliseconds a call (number")}
    assert ops["Conv"] == ["3 (20)", "2.1 (20)", "1.35 (20)"]
    assert ops["ReorderInput"][0] == "0 (0)"
    assert page.table("Milliseconds a call of each split")[0] == [
        "layer0.conv",
        "0.3",
        "0.205 (0.105 + 0.1)",
        "0.1675 (0.0675 + 0.1)",
    ]
    assert [row[-1] for row in page.table("Resident memory")] == ["does not fit: ended in run", "fits", "fits"]
    assert [row[1] for row in page.table("LoadGen's own")] == ["INVALID", "VALID", "VALID"]
    assert [row[1] for row in page.table("Accuracy and latency")] == ["4.000", "2.800", "1.800"]


def test_a_distribution_holds_all_of_its_calls(full):
    from rsi_deploy.report.pages.latency import latency_blocks

    _, block = latency_blocks(full.cells[0], "x")
    for label in LABELS:
        share = sum(point.y for point in block.picture.plot.points if point.series == label)
        assert 94.9 <= share <= 100  # all but the slowest 5 % of the slowest model


def test_a_model_that_another_beats_is_not_on_the_front(full):
    worse = full.accuracy["dense"].model_copy(update={"top1": 80.0})
    rows = assert_self_contained(bench_page(full_document(accuracy=full.accuracy | {"dense": worse}))).table(
        "Accuracy and"
    )
    assert [row[-1] for row in rows] == [
        "another model is at least as fast and as good",
        *["on the front"] * 2,
    ]


@pytest.mark.parametrize("name", SECTIONS)
def test_what_was_not_measured_is_left_out(full, name):
    field = SECTIONS[name]
    page = assert_self_contained(bench_page(full_document(**{field: type(getattr(full, field))()})))
    assert name not in page.ids()
    assert set(SECTIONS) - {name} <= set(page.ids())


def test_a_document_with_as_little_as_possible():
    page = assert_self_contained(bench_page(document(cell(arm("alone", 2.5)))))
    assert "2.5 ms a call, batch 1." in page.words
    assert not {"pareto", "scaling", *SECTIONS} & set(page.ids())
    nothing = document(cell(arm("a", 1.0))).model_copy(update={"cells": ()})
    page = assert_self_contained(bench_page(nothing))
    assert "No latency was measured." in page.words
    assert "latency not measured" in page.words


def test_a_partial_run_and_a_busy_machine_are_remarked():
    page = assert_self_contained(bench_page(document(cell(arm("a", 1.0)), partial=True, load_average=(9.0, 1.0, 1.0))))
    assert "This run is partial" in page.words
    assert "load 9.0 on 4 cores" in page.words


def test_hostile_labels_stay_text():
    text = bench_page(full_document(HOSTILE, notes=HOSTILE, command=HOSTILE[0]))
    page = assert_self_contained(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
    assert [row[0] for row in page.table("Files")][:2] == list(HOSTILE[:2])


def test_cells_of_the_same_name_show_their_inputs():
    shapes = [{"x": "int64 (1, 16)"}, {"x": "int64 (1, 128)"}]
    page = assert_self_contained(bench_page(document(*(cell(arm("a", 1.0), inputs=inputs) for inputs in shapes))))
    assert [row[0] for row in page.table("Medians")] == ["batch 1, x int64 (1, 16)", "batch 1, x int64 (1, 128)"]
    assert "scaling" not in page.ids()  # cells with other shapes do not share a curve


def test_many_cells_and_models_stay_small():
    labels = [f"model {i}" for i in range(12)]
    cells = [cell(*(arm(label, 1.0 + i, speedup=1.0) for i, label in enumerate(labels)), batch=b) for b in range(1, 41)]
    text = bench_page(document(*cells))
    assert len(text.encode()) < 1_000_000
    page = assert_self_contained(text)
    assert len(page.table("Medians")) == 480
    assert "34 more are in the table above" in page.words


def test_loadgen_of_several_scenarios(full):
    several = (loadgen("dense", valid=True), loadgen("dense", valid=True).model_copy(update={"scenario": "Offline"}))
    page = assert_self_contained(bench_page(full_document(loadgen={"dense": several})))
    assert [row[0] for row in page.table("LoadGen's own")] == ["dense, SingleStream", "dense, Offline"]
    assert "INVALID according" not in page.words


def test_paths_are_shown_without_the_folder_they_share():
    labels = ("/some/folder/a/model.onnx", "/some/folder/b/model.onnx", "/some/folder/b/other.onnx")
    page = assert_self_contained(bench_page(full_document(labels)))
    assert [row[0] for row in page.table("Files")] == ["a/model.onnx", "b/model.onnx", "b/other.onnx"]
    assert "a/model.onnx against b/model.onnx against b/other.onnx" in page.words
    assert [row[0] for row in page.table("Accuracy and")] == ["a/model.onnx", "b/model.onnx", "b/other.onnx"]
