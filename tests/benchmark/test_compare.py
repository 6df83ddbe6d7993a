import pytest
from bench_documents import accuracy, arm, cell, document

from rsi_deploy.benchmark.compare import DeviceComparison, compare_documents, device_names
from rsi_deploy.core.errors import UsageError


def measured(scale=1.0, batches=(1, 8), **changes):
    cells = [cell(arm("dense", scale * b * 10.0), arm("small", scale * b * 5.0, speedup=2.0), batch=b) for b in batches]
    return document(*cells, **changes)


def test_one_row_a_model_and_configuration_one_column_a_device():
    found = compare_documents({"server": measured(), "board": measured(20.0, cpu="Arm", cores=2)})
    assert [device.name for device in found.devices] == ["server", "board"]
    assert [device.cpu for device in found.devices] == ["Some CPU", "Arm"]
    assert [(row.configuration, row.arm) for row in found.timings] == [
        ("batch 1", "dense"),
        ("batch 1", "small"),
        ("batch 8", "dense"),
        ("batch 8", "small"),
    ]
    assert [timing.median_ms for timing in found.timings[3].timings] == [40.0, 800.0]
    assert found.timings[3].timings[1].verdict == "2.00x"
    assert found.notes == ()
    assert DeviceComparison.model_validate_json(found.model_dump_json()) == found


def test_what_a_device_lacks_is_left_open():
    found = compare_documents({"a": measured(), "b": measured(batches=(1,)), "c": measured(batches=(8, 4))})
    at = {(row.configuration, row.arm): [timing is not None for timing in row.timings] for row in found.timings}
    assert at["batch 1", "small"] == [True, True, False]
    assert at["batch 8", "small"] == [True, False, True]
    assert at["batch 4", "small"] == [False, False, True]


def test_results_without_anything_in_common_are_refused():
    with pytest.raises(
        UsageError, match=r"no model and configuration in common \(a: dense, small at batch 1; b: .*8\)"
    ):
        compare_documents({"a": measured(batches=(1,)), "b": measured(batches=(8,))})
    with pytest.raises(UsageError, match="takes two results or more, but got a"):
        compare_documents({"a": measured()})


def test_figures_stand_beside_the_times():
    scores = {"dense": accuracy(92.0), "small": accuracy(91.5)}
    found = compare_documents({"a": measured(accuracy=scores), "b": measured()})
    rows = {(row.figure, row.arm): row.values for row in found.figures}
    assert rows["top-1", "small"] == (91.5, None)
    assert rows["file", "dense"] == (1000, 1000)
    assert ("agreement", "small") not in rows, "nobody measured it"


def test_what_makes_columns_differ_is_said():
    other = measured(
        hashes={"small": "another"}, partial=True, load_average=(9.0, 9.0, 9.0), accuracy={"dense": accuracy(1.0)}
    )
    other = other.model_copy(update={"cells": tuple(c.model_copy(update={"onnxruntime": "1.20"}) for c in other.cells)})
    base = measured(accuracy={"dense": accuracy(1.0, fingerprint="e" * 64)})
    notes = compare_documents({"a": base, "b": other}).notes
    for words in (
        "small is not the same file everywhere",
        "onnxruntime differs: a 1.31.1, b 1.20",
        "the evaluation data differ",
        "b was interrupted",
        "b was busy while it measured (load 9.0 on 4 cores)",
    ):
        assert sum(words in note for note in notes) == 1, words


def test_configurations_of_one_name_are_told_apart():
    cells = [cell(arm("m", 1.0), inputs={"ids": f"int64 (1, {length})"}) for length in (64, 128)]
    found = compare_documents({"a": document(*cells), "b": document(*cells)})
    assert [row.configuration for row in found.timings] == [
        "batch 1 (ids int64 (1, 64))",
        "batch 1 (ids int64 (1, 128))",
    ]


def test_names_of_columns():
    assert device_names(["x/pi.json", "x/nano.json"]) == ["pi", "nano"]
    assert device_names(["pi/r.json", "nano/r.json"]) == ["pi/r.json", "nano/r.json"]
