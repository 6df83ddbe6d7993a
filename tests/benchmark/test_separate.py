"""Cold start, memory, bursts, streams, throughput and profile: what is measured, not how fast."""

import threading

import numpy as np
import onnx
import pytest
from onnx import parser

from rsi_deploy.benchmark import concurrency, processes
from rsi_deploy.benchmark.profiling import profile_models, read_profile
from rsi_deploy.benchmark.variants import Runtime
from rsi_deploy.core.errors import ModelError, UsageError

WEIGHTS = ", ".join(["0.5"] * 16)
FEEDS = {"x": np.ones((1, 4), np.float32)}
RUNTIME = Runtime(threads=1)


@pytest.fixture
def model(tmp_path):
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {{{WEIGHTS}}}> {{ y = MatMul(x, w) }}"""
    onnx.save(parser.parse_model(text), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_memory_in_a_process_of_its_own(model):
    (found,) = processes.measure_memory([model], ["a"], FEEDS, RUNTIME)
    assert 10e6 < found.import_bytes <= found.loaded_bytes <= found.peak_bytes
    assert (found.fits, found.limit_bytes, found.stopped_in) == (None, None, "done")
    assert found.median_ms > 0
    ballast = np.ones(60_000_000)  # a child's peak is its own, whatever its parent has held
    (again,) = processes.measure_memory([model], ["a"], FEEDS, RUNTIME)
    assert again.peak_bytes < found.peak_bytes + ballast.nbytes / 4


def test_a_ceiling_tells_who_fits(model):
    (small,) = processes.measure_memory([model], ["a"], FEEDS, RUNTIME, limit=20_000_000)
    assert (small.fits, small.stopped_in) == (False, "import")
    assert "above the memory limit" in small.detail
    (large,) = processes.measure_memory([model], ["a"], FEEDS, RUNTIME, limit=2_000_000_000)
    assert (large.fits, large.stopped_in, large.detail) == (True, "done", "")


def test_what_a_worker_cannot_do_is_raised(tmp_path, model):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        processes.measure_memory([tmp_path / "bad.onnx"], ["a"], FEEDS, RUNTIME)
    with pytest.raises(UsageError, match="teapot"):
        processes.cold_starts([model], ["a"], FEEDS, Runtime(provider="teapot"), seconds=0, seed=0)


def test_cold_start_has_four_phases(model, monkeypatch):
    monkeypatch.setattr(processes, "MIN_STARTS", 2)
    first, second = processes.cold_starts([model, model], ["a", "b"], FEEDS, RUNTIME, seconds=0.01, seed=0)
    parts = (first.process_ms, first.import_ms, first.load_ms, first.first_ms)
    assert min(parts) > 0
    assert first.import_ms > first.first_ms
    assert first.total_interval_ms[0] <= first.total_ms <= first.total_interval_ms[1]
    assert second.verdict == "too few blocks to compare (2; 8 are needed)"


def test_bursts_wait_and_take_first_calls_apart(model, monkeypatch):
    naps = []
    monkeypatch.setattr(concurrency.time, "sleep", naps.append)
    first, second = concurrency.measure_bursts(
        [model, model], ["a", "b"], FEEDS, RUNTIME, gap=0.2, seconds=0.01, seed=0
    )
    assert set(naps) == {0.2}
    assert len(naps) == first.bursts + second.bursts
    assert (first.gap_ms, first.calls) == (200.0, 8)
    assert first.speedup is None
    assert second.speedup_interval[0] <= second.speedup <= second.speedup_interval[1]


def test_streams_share_the_session(model):
    found = concurrency.measure_streams(
        [model, model], ["a", "b"], FEEDS, RUNTIME, counts=(1, 3), batch=1, seconds=0.4, seed=0
    )
    assert [(row.label, row.streams) for row in found] == [("a", 1), ("a", 3), ("b", 1), ("b", 3)]
    assert all(row.per_second > 0 and row.windows >= 8 for row in found)


def test_streams_run_at_once_and_their_failures_are_told():
    """Three calls that wait for each other: one after the other they would never end."""
    gate = threading.Barrier(3, timeout=20)
    rate, times = concurrency.together([gate.wait] * 3, 0.0)
    assert rate > 0
    assert len(times) == 3

    def broken():
        raise ValueError("it broke")

    with pytest.raises(ModelError, match="it broke"):
        concurrency.together([broken], 0.01)


def test_throughput_stops_where_larger_batches_gain_nothing(model, monkeypatch):
    rates = {1: 100, 2: 90, 4: 50, 8: 25.5, 16: 12.7, 32: 6.3, 64: 3.1}
    current = [0]

    def feeds_of(batch):
        current[0] = batch
        return {"x": np.ones((batch, 4), np.float32)}

    monkeypatch.setattr(concurrency, "together", lambda *_: (rates[current[0]], np.ones(1)))
    (found,) = concurrency.measure_throughput(
        [model], ["a"], RUNTIME, feeds_of=feeds_of, start=1, seconds=0.001, seed=0
    )
    assert found.batches == (1, 2, 4, 8, 16)
    assert found.per_second[:3] == (100, 180, 200)
    assert "neither batch 8 nor 16" in found.ended


def test_a_fixed_batch_ends_the_throughput(model):
    def feeds_of(batch):
        if batch > 2:
            raise UsageError("the batch is fixed")
        return {"x": np.ones((batch, 4), np.float32)}

    (found,) = concurrency.measure_throughput(
        [model], ["a"], RUNTIME, feeds_of=feeds_of, start=1, seconds=0.001, seed=0
    )
    assert found.batches == (1, 2)
    assert found.ended == "batch 4 cannot run: the batch is fixed"


def event(name, start, ms, op):
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": 1e3 * ms, "args": {"op_name": op}}


def run(start, ms):
    return {"cat": "Session", "name": "model_run", "ts": start, "dur": 1e3 * ms}


def test_profile_counts_the_last_runs_and_finds_fused_names():
    roles = {"fc/right": ("fc", "right"), "fc/left": ("fc", "left"), "relu": ("conv", "dense")}
    events = [run(0, 99), event("fc/right", 1, 99, "MatMul")]  # the warm-up
    for start, ms in ((100, 1), (200, 2), (300, 30)):
        events += [
            run(start, 3 * ms),
            event("fc/right", start + 1, ms, "MatMul"),
            event("fused fc/left", start + 2, ms / 2, "FusedGemm"),
            event("relu_nchwc", start + 3, ms / 4, "Conv"),
            event("relu", start + 4, ms, "Softmax"),
        ]
    profile = read_profile("a", events, 3, roles)
    assert profile.op_ms == {"MatMul": 2.0, "Softmax": 2.0, "FusedGemm": 1.0, "Conv": 0.5}
    assert profile.call_ms == 6.0
    sites = {site.site: site for site in profile.sites}
    assert (sites["fc"].right_ms, sites["fc"].left_ms, sites["fc"].dense_ms) == (2.0, 1.0, None)
    assert (sites["conv"].dense_ms, sites["conv"].total_ms) == (0.5, 0.5), "a Softmax is no Conv, whatever its name"


def test_split_sites_stand_beside_the_dense_ones(tmp_path):
    """A split marked as the passes mark it, and the node it was made of."""
    head = '<ir_version: 10, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y)'
    dense = parser.parse_model(f"{head} <float[4,4] w = {{{WEIGHTS}}}> {{ y = MatMul(x, w) }}")
    dense.graph.node[0].name = "fc"
    halves = ", ".join(["0.5"] * 8)
    split = parser.parse_model(
        f"{head} <float[4,2] r = {{{halves}}}, float[2,4] l = {{{halves}}}> {{ h = MatMul(x, r)  y = MatMul(h, l) }}"
    )
    for node, side in zip(split.graph.node, ("right", "left"), strict=True):
        node.name = f"fc/{side}"
        node.metadata_props.add(key="rsi_deploy.split", value=side)
    for name, model in (("dense", dense), ("split", split)):
        onnx.save(model, tmp_path / f"{name}.onnx")
    files = [tmp_path / "dense.onnx", tmp_path / "split.onnx"]
    first, second = profile_models(files, ["a", "b"], FEEDS, RUNTIME, calls=3)
    (one,), (two,) = first.sites, second.sites
    assert (one.site, two.site) == ("fc", "fc")
    assert one.dense_ms is not None
    assert one.right_ms is None
    assert two.dense_ms is None
    assert two.total_ms == two.right_ms + two.left_ms
    assert first.op_nodes == {"MatMul": 1}
    assert second.op_nodes == {"MatMul": 2}
