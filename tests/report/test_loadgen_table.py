import io

import pytest
from rich.console import Console

from rsi_deploy.benchmark.mlperf.loadgen import LoadGenResult
from rsi_deploy.report.tables.loadgen import print_loadgen

RESULT = LoadGenResult(
    model="m.onnx",
    scenario="SingleStream",
    valid=True,
    reasons=(),
    headline="90.0th percentile latency: 1.05 ms",
    latency_ms={"min": 0.9, "50": 1.0, "90": 1.05, "max": 3.0},
    per_second=990.0,
    queries=500,
    own_p90_ms=1.0,
    batch=1,
    call_ms=1.0,
    target_qps=None,
    target_latency_ms=None,
    inputs={"x": "float32 (1, 4)"},
    provider="CPUExecutionProvider",
    provider_nodes={"CPUExecutionProvider": 3},
    how="bound",
    seconds=1.0,
    loadgen="6",
    summary="",
)


def shown(**changes):
    out = io.StringIO()
    print_loadgen(Console(file=out, width=160), "net [a]", RESULT.model_copy(update=changes))
    return out.getvalue()


def test_the_verdict_comes_first():
    text = shown()
    assert text.startswith("net [a]: LoadGen SingleStream: VALID, 90.0th percentile latency: 1.05 ms")
    assert "LoadGen's is +5.0%" in text
    assert "3 nodes on CPUExecutionProvider" in text


def test_an_invalid_run_shows_why():
    text = shown(valid=False, reasons=("Early stopping satisfied: NO",))
    assert "INVALID" in text
    assert "Early stopping satisfied: NO" in text


@pytest.mark.parametrize("changes", [{"latency_ms": {}, "own_p90_ms": None, "scenario": "Offline"}])
def test_missing_figures_are_not_shown(changes):
    text = shown(**changes)
    assert "p90" not in text
    assert "990 samples a second" in text


def test_the_targets_of_a_server_are_shown():
    assert "40 queries a second, 99 % of them within 25 ms" in shown(target_qps=40.0, target_latency_ms=25.0)
