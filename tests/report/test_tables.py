"""The tables of accuracy, gates and devices on the terminal."""

import io

from bench_documents import accuracy, arm, cell, document
from rich.console import Console

from rsi_deploy.benchmark.ci_gate import check_gates
from rsi_deploy.benchmark.compare import compare_documents
from rsi_deploy.evaluation.accumulator import ValueDistance
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.report.tables.accuracy import print_accuracies
from rsi_deploy.report.tables.comparison import print_comparison, print_gates


def shown(print_, *args, **options):
    file = io.StringIO()
    print_(Console(file=file, width=160, highlight=False), *args, **options)
    return file.getvalue()


def test_class_scores_show_only_what_was_measured():
    alone = shown(print_accuracies, [("dense.onnx", accuracy(92.0))])
    assert "92.00 % [91.00, 93.00]" in alone
    assert "2,000 samples, cpu" in alone
    assert "same answer" not in alone
    assert "KL" not in alone
    both = shown(print_accuracies, [("dense", accuracy(92.0)), ("small", accuracy(91.0, lost=20))], reference="dense")
    assert "small: 20 fewer right of 2,000: less accurate (p < 0.0001); top-1 -1.00 points [" in both
    assert "compared with dense" in both
    assert "interrupted" in shown(print_accuracies, [("m", accuracy(92.0, partial=True))])


def test_values_show_cosine_and_distance():
    found = accuracy(None).model_copy(
        update={
            "kind": "values",
            "values": (
                ValueDistance(
                    output="hidden[0]",
                    cosine=0.98,
                    cosine_interval=(0.97, 0.99),
                    distance=0.2,
                    distance_interval=(0.1, 0.3),
                ),
            ),
        }
    )
    assert isinstance(found, AccuracyResult)
    text = shown(print_accuracies, [("m", found)], reference="dense")
    assert "hidden[0]" in text, "brackets are not markup"
    assert "0.9800 [0.9700, 0.9900]" in text
    assert "top-1" not in text


def test_each_gate_has_a_line():
    base = document(cell(arm("m", 10.0)), accuracy={"m": accuracy(92.0)})
    now = document(cell(arm("m", 12.0)), accuracy={"m": accuracy(92.0)})
    text = shown(print_gates, check_gates(now, base, max_slowdown=5.0, max_drop=0.5))
    assert "   failed  slowdown  m, batch 1: 20.0 % slower" in text
    assert "    holds  drop      m: top-1 92.00 %" in text


def test_devices_are_columns():
    small = document(cell(arm("dense", 10.0), arm("small", 5.0, speedup=2.0)), accuracy={"small": accuracy(91.0)})
    board = document(cell(arm("dense", 100.0)), cpu="Arm", partial=True)
    text = shown(print_comparison, compare_documents({"server": small, "board": board}))
    for words in (
        "board: Arm, 4 cores, cpu, onnxruntime 1.31.1, 2026-01-01, cut short",
        "server: median ms [95 %]",
        "100.000 [99.000, 101.000]",
        "2.00x",
        "not measured",
        "91.00 %",
        "1.00 kB",
        "note: board was interrupted",
    ):
        assert words in text, words
