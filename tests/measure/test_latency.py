import gc
import re

import numpy as np
import onnx
import pytest
from onnx import parser

from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.measure import latency, providers

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
            session_run = providers.make_session

            def make_session(model, *args, **kwargs):
                session = session_run(model, *args, **kwargs)
                if "profile_prefix" in kwargs:
                    return session  # the run that proves the placement is not timed
                real_run = session.run

                def run(*args, **kwargs):
                    label = latency.Path(str(model)).stem
                    self.order.append(label)
                    self.now_ns += int(1e6 * times(label))
                    return real_run(*args, **kwargs)

                session.run = run
                return session

            monkeypatch.setattr(latency.providers, "make_session", make_session)
            monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: self.now_ns)
            monkeypatch.setattr(latency.time, "monotonic", lambda: self.now_ns / 1e9)

    return Clock()


def synthetic(ratio, blocks=60, noise=0.05, seed=0):
    """Two arms, the second `ratio` times as fast, under a load that drifts for both alike: `(2, blocks)` ms."""
    rng = np.random.default_rng(seed)
    load = np.exp(np.cumsum(rng.normal(0, 0.05, blocks)))
    return np.stack([load, load / ratio]) * np.exp(rng.normal(0, noise, (2, blocks)))


def word(blocks, seed=0):
    speedup, interval = latency.compare(*blocks, seed)
    return latency.verdict(speedup, interval, blocks.shape[1])


# Statistics, on times that were made up.


def test_each_verdict_can_be_given():
    assert re.fullmatch(r"1\.[89]\dx faster \[1\.\d\d, [12]\.\d\d\]", word(synthetic(1.85, noise=0.01)))
    assert re.fullmatch(r"1\.2\dx slower \[1\.\d\d, 1\.\d\d\]", word(synthetic(1 / 1.25, noise=0.01)))
    assert re.fullmatch(r"no difference shown \[0\.\d\d, 1\.\d\d\]", word(synthetic(1.0)))
    assert word(synthetic(3.0)[:, :5]) == "too few blocks to compare (5; 6 are needed)"


def test_a_true_difference_is_found_and_its_size_is_inside():
    for seed in range(20):
        speedup, (low, high) = latency.compare(*synthetic(1.3, seed=seed, noise=0.02), seed)
        assert low <= speedup <= high
        assert 1.2 < low < high < 1.4


def test_equal_arms_are_rarely_told_apart():
    claims = sum(not word(synthetic(1.0, seed=seed), seed).startswith("no difference") for seed in range(100))
    assert claims <= 12  # 5 expected; the control: arms that differ by 10 % are told apart most of the time
    assert sum("faster" in word(synthetic(1.1, seed=seed), seed) for seed in range(20)) >= 15


def test_pairing_blocks_removes_the_load_that_arms_share():
    """Control: the same times with one arm's blocks shuffled, so that they are paired no more."""
    blocks = synthetic(1.1, noise=0.01)
    _, (low, high) = latency.compare(*blocks, 0)
    shuffled = np.random.default_rng(0).permutation(blocks[1])
    _, (loose_low, loose_high) = latency.compare(blocks[0], shuffled, 0)
    assert high - low < 0.5 * (loose_high - loose_low)


def test_speedup_turns_over_with_the_arms():
    blocks = synthetic(1.5)
    forth, (low, high) = latency.compare(*blocks, 0)
    back, (back_low, back_high) = latency.compare(*blocks[::-1], 0)
    np.testing.assert_allclose([forth, low, high], [1 / back, 1 / back_high, 1 / back_low], rtol=1e-6)


def test_a_claim_never_prints_an_end_of_one():
    assert latency.verdict(1.01, (1.001, 1.02), 50) == "1.0100x faster [1.0010, 1.0200]"
    assert latency.verdict(0.99, (0.98, 0.999), 50) == "1.0101x slower [1.0010, 1.0204]"
    assert latency.verdict(1.01, (1.0, 1.02), 50).startswith("no difference")


def test_the_same_seed_gives_the_same_interval():
    blocks = synthetic(1.2)
    assert latency.compare(*blocks, 3) == latency.compare(*blocks, 3) != latency.compare(*blocks, 4)


def test_unpaired_blocks_are_refused():
    for first, arm in ((np.ones(3), np.ones(4)), (np.ones(0), np.ones(0)), (np.ones((2, 2)), np.ones((2, 2)))):
        with pytest.raises(ValueError, match="paired"):
            latency.compare(first, arm, 0)


def test_settled_times():
    assert latency.is_settled([9.0, 5.0] + [1.0] * 10)
    assert not latency.is_settled([1.0] * 9)
    assert not latency.is_settled([2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1])


def test_precise_times():
    assert latency.is_precise(synthetic(2.0, noise=0.01, blocks=200), 0)
    assert not latency.is_precise(synthetic(2.0, noise=0.3, blocks=20), 0)
    one_arm = np.random.default_rng(0).normal(1, 0.2, (1, 20))
    assert not latency.is_precise(one_arm, 0)
    assert latency.is_precise(one_arm * 0 + 1, 0)


def test_short_calls_fill_a_visit():
    assert [latency.calls_per_visit(ms) for ms in (0.0, 0.01, 1.0, 3.0, 19.0, 20.0, 900.0)] == [50, 50, 5, 2, 1, 1, 1]


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
    assert short.p90_ms > short.median_ms
    assert (short.n, short.blocks, short.p99_ms) == (long.n, long.blocks, None)
    reverse = latency.bench(models[::-1], seconds=20)
    assert re.match(r"1\.(49|50|51)x faster", reverse.arms[1].verdict)


def test_equal_arms_get_no_verdict_and_the_time_is_kept(models, clock):
    rng = np.random.default_rng(0)
    clock.install(lambda _: 25 * np.exp(rng.normal(0, 0.3)))
    result = latency.bench(models, seconds=4)
    assert result.arms[1].verdict.startswith("no difference shown")
    assert result.stopped == "time"
    assert 4 <= result.seconds < 4.3


def test_order_is_shuffled_and_every_block_has_every_arm(models, clock):
    clock.install(lambda _: 30 + np.random.default_rng(len(clock.order)).normal(0, 2))
    warm_up = sum(arm.warmup_calls for arm in latency.bench(models, seconds=6).arms)
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
    assert {arm.p90_ms for arm in result.arms} == {30}
    assert all(arm.warm for arm in result.arms)


def test_the_first_short_call_after_another_arm_is_not_timed(models, clock):
    clock.install(lambda label: 9 if clock.order[-2:-1] != [label] else 1)  # cold caches after a change of arm
    result = latency.bench(models, seconds=3)
    assert {arm.p90_ms for arm in result.arms} == {1}
    assert all(arm.n == 5 * arm.blocks for arm in result.arms)


def test_times_that_never_settle_are_told(models, clock):
    clock.install(lambda _: 30 + len(clock.order) * 3)
    result = latency.bench(models, seconds=3)
    assert any("short: times had not settled" in note for note in result.notes)
    assert any("blocks: the intervals are rough" in note for note in result.notes)


@pytest.mark.parametrize(("blocks", "kept"), [(4, False), (5, True), (9, True)])
def test_an_interrupted_run_keeps_whole_blocks(models, clock, blocks, kept):
    def times(_):
        if len(clock.order) > 22 + 2 * blocks + 1:  # 11 warm-up calls an arm, then in the middle of a block
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
    placement = providers.Placement(provider_nodes={}, memcpy_nodes=0, nodes={})
    arm = latency._Arm(
        label="a", model="a", call=str, placement=placement, warmup_calls=3, call_ms=1, warm=True, visits=[np.ones(1)]
    )
    for provider, told in (("CUDAExecutionProvider", True), ("CPUExecutionProvider", False)):
        assert any("TF32" in note for note in latency._notes([arm], [], 1, provider, "time")) is told


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
    elsewhere = providers.Placement(provider_nodes={"Other": 2}, memcpy_nodes=0, nodes={})
    monkeypatch.setattr(providers, "node_placement", lambda *_: elsewhere)
    with pytest.raises(UsageError, match="ran no node"):
        latency.bench(models, seconds=0.01)
