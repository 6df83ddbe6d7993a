import importlib.util
import textwrap

import numpy as np
import onnx
import pytest
from onnx import parser

from rsi_deploy.benchmark.mlperf import loadgen
from rsi_deploy.benchmark.mlperf import worker as loadgen_worker
from rsi_deploy.benchmark.mlperf.loadgen import parse_summary, run_loadgen
from rsi_deploy.benchmark.mlperf.worker import LoadGenRequest
from rsi_deploy.core.errors import ModelError, UsageError

needs_loadgen = pytest.mark.skipif(
    importlib.util.find_spec("mlperf_loadgen") is None, reason="pip install mlcommons-loadgen"
)

TAIL = """
================================================
Additional Stats
================================================
"""
SINGLE = (
    textwrap.dedent("""\
    ================================================
    MLPerf Results Summary
    ================================================
    SUT name : PySUT
    Scenario : SingleStream
    Mode     : PerformanceOnly
    90.0th percentile latency (ns) : 3161434
    Result is : VALID
      Min duration satisfied : Yes
      Min queries satisfied : Yes
      Early stopping satisfied: Yes
    Early Stopping Result:
     * Processed at least 64 queries (641).
     * Early stopping 90.0th percentile estimate: 3166051
""")
    + TAIL
    + textwrap.dedent("""\
    QPS w/ loadgen overhead         : 319.54
    QPS w/o loadgen overhead        : 320.21

    Min latency (ns)                : 3020645
    Max latency (ns)                : 5131128
    Mean latency (ns)               : 3122994
    50.00 percentile latency (ns)   : 3096367
    90.00 percentile latency (ns)   : 3161434
    99.00 percentile latency (ns)   : 3374790
""")
)
SERVER = (
    textwrap.dedent("""\
    Scenario : Server
    Mode     : PerformanceOnly
    Completed samples per second    : 313.88
    Result is : INVALID
      Performance constraints satisfied : NO
      Min duration satisfied : Yes
      Early stopping satisfied: NO
    Recommendations:
     * Reduce target QPS to improve latency.
    Early Stopping Result:
     * Run unsuccessful.
     * Processed 1982 queries.
     * Would need to run at least 206053 more queries,
     with the run being successful if every additional
     query were under latency.
""")
    + TAIL
    + "99.00 percentile latency (ns)   : 5263563891\n99.90 percentile latency (ns)   : 5308943047\n"
)
MULTI = (
    """\
Scenario : MultiStream
99.0th percentile latency (ns) : 27175803
Result is : INVALID
  Early stopping satisfied: NO
Early Stopping Result:
 * Only processed 81 queries.
 * Need to process at least 662 queries for early stopping.
"""
    + TAIL
    + "Mean latency (ns)               : 25000000\n"
)


def test_a_valid_summary_is_read():
    found = parse_summary(SINGLE)
    assert (found["valid"], found["reasons"], found["queries"]) == (True, (), 641)
    assert found["headline"] == "90.0th percentile latency: 3.161 ms"
    assert found["per_second"] == 320.21
    assert found["latency_ms"]["90"] == pytest.approx(3.161434)
    assert found["latency_ms"]["max"] == pytest.approx(5.131128)


def test_percentiles_that_the_queries_do_not_support_are_left_out():
    assert "99" not in parse_summary(SINGLE)["latency_ms"]
    assert "99" in parse_summary(SINGLE.replace("(641)", "(1000)"))["latency_ms"]
    assert set(parse_summary(SERVER)["latency_ms"]) == {"99"}


def test_an_invalid_summary_says_why():
    found = parse_summary(SERVER)
    assert not found["valid"]
    assert found["reasons"] == (
        "Performance constraints satisfied : NO",
        "Early stopping satisfied: NO",
        "Reduce target QPS to improve latency.",
        "Run unsuccessful.",
        "Would need to run at least 206053 more queries, with the run being successful if every additional query "
        "were under latency.",
    )
    assert (found["headline"], found["per_second"]) == ("Completed samples per second: 313.9", 313.88)
    few = parse_summary(MULTI)
    assert few["queries"] == 81
    assert "Need to process at least 662 queries for early stopping." in few["reasons"]
    assert few["per_second"] == pytest.approx(8 / 0.025)


def test_a_summary_without_a_verdict_is_refused():
    with pytest.raises(ModelError, match="no verdict"):
        parse_summary(SINGLE.replace("Result is", "Result was"))


def test_what_to_type_when_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(loadgen.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'rsi-deploy\[loadgen\]'"):
        run_loadgen("m.onnx", "SingleStream")


@pytest.mark.parametrize(
    ("scenario", "arguments", "said"),
    [
        ("Singlestream", {}, "SingleStream, MultiStream, Server, Offline, but got 'Singlestream'"),
        ("SingleStream", {"batch": 8}, "one sample: take --batch 1"),
        ("Server", {"batch": 2}, "one sample: take --batch 1"),
        ("MultiStream", {"batch": 3}, "must divide it, but got 3"),
        ("Offline", {"seconds": 0}, "seconds must be a positive number, but got 0"),
        ("Offline", {"target_qps": 5.0}, "--target-qps is for the Server scenario"),
        ("Server", {"target_latency_ms": -1.0}, "--target-latency must be above 0, but got -1"),
        ("SingleStream", {"provider": "cpu:thread=1"}, "'thread' does not exist"),
    ],
)
def test_requests_that_cannot_be_are_refused_before_a_process_starts(monkeypatch, scenario, arguments, said):
    monkeypatch.setattr(loadgen.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(loadgen.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(UsageError, match=said):
        run_loadgen("m.onnx", scenario, **arguments)


def request(scenario, **changes):
    fields = {"model": "m", "scenario": scenario, "folder": "f", "provider": "cpu", "threads": None, "batch": 1}
    fields |= {"seconds": 2.0, "seed": 0, "input_shape": None, "feeds": None, "target_qps": None}
    return LoadGenRequest(**{**fields, "target_latency_ms": None, "allow_fallback": False, **changes})


def test_targets_are_half_the_rate_within_ten_calls_unless_given():
    assert loadgen_worker.targets(request("SingleStream"), 1, 0.01) == (None, None)
    assert loadgen_worker.targets(request("Offline"), 8, 0.01) == (800, None)
    qps, latency = loadgen_worker.targets(request("Server"), 1, 0.01)
    assert 49 < qps < 50
    assert latency == pytest.approx(100)
    assert loadgen_worker.targets(request("Server"), 1, 1e-5)[1] == 10
    assert loadgen_worker.targets(request("Server", target_qps=7.0, target_latency_ms=3.0), 1, 0.01) == (7, 3)


@pytest.fixture
def model(tmp_path):
    text = '<ir_version: 8, opset_import: ["" : 17]>\ng (float[N,4] x) => (float[N,4] y) { y = Softmax(x) }'
    onnx.save(parser.parse_model(text), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@needs_loadgen
@pytest.mark.parametrize(
    ("scenario", "batch"), [("SingleStream", 1), ("MultiStream", 8), ("Server", 1), ("Offline", 8)]
)
def test_every_scenario_runs_and_answers_every_query(model, scenario, batch):
    result = run_loadgen(model, scenario, batch=batch, seconds=0.2, provider="cpu:threads=1")
    assert result.scenario == scenario
    assert f"Scenario : {scenario}" in result.summary
    assert result.valid == ("Result is : VALID" in result.summary)
    assert result.valid or result.reasons
    assert "No errors encountered" in result.summary
    assert result.per_second > 0
    assert result.batch == batch
    assert result.inputs == {"x": f"float32 ({batch}, 4)"}
    assert result.provider_nodes == {"CPUExecutionProvider": 1}
    assert (result.own_p90_ms is not None) == (scenario == "SingleStream")
    assert (result.target_latency_ms is not None) == (scenario == "Server")


@needs_loadgen
def test_given_inputs_are_the_ones_that_run(model):
    result = run_loadgen(model, "SingleStream", seconds=0.1, feeds={"x": np.ones((3, 4), np.float32)})
    assert (result.inputs, result.batch) == ({"x": "float32 (3, 4)"}, 3)


@needs_loadgen
def test_errors_of_the_worker_are_those_of_the_tool(model, tmp_path):
    with pytest.raises(ModelError, match=r"absent\.onnx: no such file"):
        run_loadgen(tmp_path / "absent.onnx", "SingleStream")
    with pytest.raises(UsageError, match="float64"):
        run_loadgen(model, "SingleStream", feeds={"x": np.ones((3, 4))})


@needs_loadgen
def test_a_call_that_fails_midway_ends_the_test_with_its_reason(tmp_path):
    calls = iter(range(100_000))

    def call():
        if next(calls) == 50:
            raise RuntimeError("the device is lost")

    asked = request("SingleStream", seconds=0.05, folder=str(tmp_path))
    with pytest.raises(ModelError, match="failed during the test: the device is lost"):
        loadgen_worker.take_test(asked, call, 1, loadgen_worker.settings(asked, 1, 1e-5, None, None))


def test_a_worker_that_dies_is_told(model, monkeypatch):
    monkeypatch.setattr(loadgen.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(loadgen.sys, "executable", "/bin/false")
    with pytest.raises(ModelError, match=r"m\.onnx: the process of the LoadGen test ended with 1: it wrote nothing"):
        run_loadgen(model, "SingleStream")
