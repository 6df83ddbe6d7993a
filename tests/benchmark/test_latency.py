import functools
import gc
import re
import time

import numpy as np
import onnx
import pytest
from onnx import parser

from rsi_deploy.benchmark import blocks, latency, variants
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.runtime import placement

WEIGHTS = ", ".join(["0.5"] * 16)


def save(path, *, shape="N,4", steps="y = MatMul(x, w)", name="x"):
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[{shape}] {name}) => (float[N,4] y) <float[4,4] w = {{{WEIGHTS}}}> {{ {steps} }}"""
    onnx.save(parser.parse_model(text), path)
    return path


@pytest.fixture
def models(tmp_path):
    long = "a = MatMul(x, w)  b = Softmax(a)  c = Sin(b)  y = Softmax(c)"
    return [save(tmp_path / "short.onnx"), save(tmp_path / "long.onnx", steps=long)]


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock: a call takes what `times(model name)` says, in ms, and no real time passes."""

    class Clock:
        now_ns = 0
        order: list[str]

        def install(self, times):
            self.order = []
            real_open = variants.open_variants

            def open_variants(*args, **kwargs):
                opened = real_open(*args, **kwargs)
                for arm in opened:
                    arm.call = functools.partial(self.call, arm.label, times)
                return opened

            monkeypatch.setattr(latency, "open_variants", open_variants)
            monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now_ns)
            monkeypatch.setattr(time, "monotonic", lambda: self.now_ns / 1e9)

        def call(self, label, times):
            self.order.append(label)
            self.now_ns += int(1e6 * times(label))

    return Clock()


# The loop, on a clock that was made up.


def test_arms_are_told_apart_by_their_calls(models, clock):
    rng = np.random.default_rng(0)
    clock.install(lambda label: rng.normal(30 if label == "short" else 45, 0.3))
    result = latency.bench(models, seconds=20)
    short, long = result.arms
    assert result.stopped == "precise"
    assert result.notes == ()
    assert (short.speedup, short.speedup_interval) == (None, None)
    assert re.match(r"1\.(49|50|51)x slower", long.verdict)
    assert abs(short.median_ms - 30) < 0.5
    assert short.median_interval_ms[0] <= short.median_ms <= short.median_interval_ms[1]
    assert short.quantiles_ms[90] > short.median_ms
    assert (short.n, short.blocks, set(short.percentiles_ms)) == (long.n, long.blocks, {"p50"})
    reverse = latency.bench(models[::-1], seconds=20)
    assert re.match(r"1\.(49|50|51)x faster", reverse.arms[1].verdict)


def test_equal_arms_get_no_verdict_and_the_time_is_kept(models, clock):
    rng = np.random.default_rng(0)
    clock.install(lambda _: 25 * np.exp(rng.normal(0, 0.3)))
    result = latency.bench(models, seconds=4)
    assert result.arms[1].verdict.startswith("no difference shown")
    assert result.stopped == "time"
    assert 4 <= result.seconds < 4.3


def test_order_is_shuffled_and_every_block_has_every_variant(models, clock):
    clock.install(lambda _: 30 + np.random.default_rng(len(clock.order)).normal(0, 2))
    warm_up = sum(arm.warmup_calls - 1 for arm in latency.bench(models, seconds=6).arms)
    blocks = [tuple(clock.order[i : i + 2]) for i in range(warm_up, len(clock.order), 2)]
    assert {frozenset(block) for block in blocks} == {frozenset({"short", "long"})}
    assert len(set(blocks)) == 2
    first = list(clock.order)
    clock.order.clear()
    latency.bench(models, seconds=6)
    assert clock.order == first


def test_a_long_first_call_is_warm_up(models, clock):
    clock.install(lambda label: 5000 if label not in clock.order[:-1] else 30)
    result = latency.bench(models, seconds=600)
    assert {arm.quantiles_ms[100] for arm in result.arms} == {30}
    assert all(arm.warm for arm in result.arms)


def test_the_first_short_call_after_another_arm_is_not_timed(models, clock):
    clock.install(lambda label: 9 if clock.order[-2:-1] != [label] else 1)  # cold caches after a change of arm
    result = latency.bench(models, seconds=3)
    assert {arm.quantiles_ms[100] for arm in result.arms} == {1}
    assert all(arm.n == 5 * arm.blocks for arm in result.arms)


def test_times_that_never_settle_are_told(models, clock):
    clock.install(lambda _: 30 + len(clock.order) * 3)
    result = latency.bench(models, seconds=3)
    assert any("short: times had not settled" in note for note in result.notes)
    assert any("blocks: the intervals are rough" in note for note in result.notes)


def test_calls_that_wait_are_told(models, clock):
    def waits(label):  # two of three calls of the one are put off
        return 30 + (90 if label == "long" and clock.order.count("long") % 3 else 0)

    clock.install(waits)
    notes = latency.bench(models, seconds=30).notes
    assert any("long: half of its calls take 4.0 times what the fastest do" in note for note in notes)
    assert not any("short: half of its calls" in note for note in notes)
    clock.install(lambda label: 30 + 10 * (clock.order.count(label) % 2))  # a third more is no waiting
    assert not any("half of its calls" in note for note in latency.bench(models, seconds=30).notes)


@pytest.mark.parametrize(("blocks", "kept"), [(4, False), (5, True), (9, True)])
def test_an_interrupted_run_keeps_whole_blocks(models, clock, blocks, kept):
    def times(_):
        if len(clock.order) > 20 + 2 * blocks + 1:  # 10 warm-up calls an arm, then in the middle of a block
            raise KeyboardInterrupt
        return 30

    clock.install(times)
    if not kept:
        with pytest.raises(KeyboardInterrupt):
            latency.bench(models, seconds=600)
    else:
        result = latency.bench(models, seconds=600)
        assert result.partial
        assert result.stopped == "interrupted"
        assert {arm.blocks for arm in result.arms} == {blocks}
        assert any("interrupted" in note for note in result.notes)
    assert gc.isenabled()


# The real thing, briefly.


def test_a_real_run_says_how_it_was_made(models):
    result = latency.bench([*models, models[0]], seconds=0.05, batch=3, threads=1, labels=["a", "b", "again"])
    assert [arm.label for arm in result.arms] == ["a", "b", "again"]
    assert (result.provider, result.batch, result.threads) == ("CPUExecutionProvider", 3, 1)
    assert result.inputs == {"x": "float32 (3, 4)"}
    assert result.onnxruntime
    assert "shuffled" in result.method
    assert [arm.provider_nodes["CPUExecutionProvider"] for arm in result.arms] == [1, 4, 1]
    assert all(arm.median_ms > 0 and arm.warmup_calls > 3 for arm in result.arms)
    assert latency.BenchResult.model_validate_json(result.model_dump_json()) == result
    assert gc.isenabled()


def test_feeds_set_the_batch(models):
    result = latency.bench(models[:1], seconds=0.01, feeds={"x": np.ones((6, 4), np.float32)})
    assert (result.batch, result.inputs) == (6, {"x": "float32 (6, 4)"})


def test_a_fixed_batch_is_told(tmp_path):
    model = save(tmp_path / "m.onnx", shape="2,4")
    assert any("batch is fixed" in note for note in latency.bench([model], seconds=0.01).notes)
    assert not any("batch is fixed" in note for note in latency.bench([model], batch=2, seconds=0.01).notes)


def test_tf32_is_told_on_cuda_alone():
    ran = placement.Placement(provider_nodes={}, memcpy_nodes=0, nodes={})
    arm = variants.Variant(label="a", model="a", call=str, placement=ran, warm=True, visits=[np.ones(1)] * 30)
    for provider, noted in (("CUDAExecutionProvider", True), ("CPUExecutionProvider", False)):
        cell = blocks.Cell(name="", variants=[arm], seconds=1.0, width=0.01)
        assert any("TF32" in note for note in latency._notes(cell, [], 1, provider, "precise", 0.02)) is noted


@pytest.mark.parametrize("changed", [{"name": "z", "steps": "y = MatMul(z, w)"}, {"shape": "N,N,4"}])
def test_arms_with_different_inputs_are_refused(models, tmp_path, changed):
    other = save(tmp_path / "other.onnx", **changed)
    with pytest.raises(UsageError, match=r"other\.onnx takes"):
        latency.bench([models[0], other], seconds=0.01)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"seconds": 0}, "seconds.*got 0"),
        ({"seconds": float("inf")}, "got inf"),
        ({"labels": ["one"]}, "2 models.*one"),
        ({"provider": "teapot"}, "teapot"),
        ({"batch": 0}, "batch.*got 0"),
        ({"input_shape": {"z": (1,)}}, "no input named z"),
        ({"feeds": {"x": np.zeros((1, 4))}}, "float64"),
    ],
)
def test_requests_that_cannot_be_are_refused(models, arguments, named):
    with pytest.raises(UsageError, match=named):
        latency.bench(models, **arguments)


def test_no_models_and_broken_models(models, tmp_path):
    with pytest.raises(UsageError, match="at least one"):
        latency.bench([])
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        latency.bench([models[0], tmp_path / "absent.onnx"])
    broken = save(tmp_path / "broken.onnx", steps="s = Constant <value = int64[1] {7}> ()  y = Reshape(x, s)")
    with pytest.raises(ModelError, match=r"broken\.onnx: the run failed"):
        latency.bench([broken], seconds=0.01)


def test_a_provider_that_runs_nothing_is_refused(models, monkeypatch):
    elsewhere = placement.Placement(provider_nodes={"Other": 2}, memcpy_nodes=0, nodes={})
    monkeypatch.setattr(placement, "node_placement", lambda *_: elsewhere)
    with pytest.raises(UsageError, match="ran no node"):
        latency.bench(models, seconds=0.01)
