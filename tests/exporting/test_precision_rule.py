"""The rule that chooses a model among precisions, on made-up models."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_deploy.benchmark.result import VariantResult
from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.cli.export import export
from rsi_deploy.core.errors import GateError
from rsi_deploy.exporting.lowered.points import (
    CLOSE_LOSS,
    NEAR_BYTES,
    NEAR_LOSS,
    NEAR_RATIO,
    Point,
    Rule,
    refuse_broken,
)
from rsi_deploy.exporting.lowered.step import PrecisionStep
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.quality import QualityBudget
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.precision.schemes import FLOAT32, static

DENSE_BYTES, DENSE_MS = 1000, 10.0
ROOT = Path(__file__).parents[2]
SIZE = RankRequest(calib="c", budget=Budget(max_size=500))
TIME = RankRequest(calib="c", budget=Budget(keep_latency=0.5))
MACS = RankRequest(calib="c", budget=Budget(keep_macs=0.5))
QUALITY = RankRequest(calib="c", quality=QualityBudget(measure="agreement", limit=0.98))
FASTEST = RankRequest(calib="c", quality=QualityBudget(measure="agreement", limit=0.98), fastest=True)


def point(name="p", size=400, loss=0.01, speed=2.0, *, is_rival=False, agreement=99.0, error="", scheme=None):
    timing = None
    if speed is not None:
        timing = VariantResult(
            label=name,
            model="m.onnx",
            n=1,
            blocks=1,
            median_ms=DENSE_MS / speed,
            median_interval_ms=(DENSE_MS / speed, DENSE_MS / speed),
            percentiles_ms={},
            quantiles_ms=(),
            warmup_calls=0,
            warm=True,
            provider_nodes={},
            memcpy_nodes=0,
            speedup=speed,
            speedup_interval=(0.95 * speed, 1.05 * speed),
            verdict="",
        )
    quality = OutputQuality(
        samples=100, output_error=loss, agreement=agreement, agreement_at_least=agreement, data_fingerprint="0"
    )
    return Point(
        name=name,
        scheme=scheme or static("minmax"),
        is_rival=is_rival,
        path=None if error else Path(f"{name}.onnx"),
        bytes=size,
        quality=None if error or loss is None else quality,
        timing=timing,
        error=error,
    )


def rule(request, *, dense_ms=DENSE_MS, allow_slower=False):
    return Rule(request=request, dense_bytes=DENSE_BYTES, dense_ms=dense_ms, allow_slower=allow_slower)


GOOD = point("good")
CASES = {
    "the best outputs within a size": (SIZE, [GOOD, point("worse", loss=0.02, speed=3.0)]),
    "too large, though better": (SIZE, [GOOD, point("large", size=501, loss=0.001)]),
    "not made, though better": (SIZE, [GOOD, point("broken", loss=0.001, error="no")]),
    "not finite": (SIZE, [GOOD, point("nan", loss=None, size=10)]),
    "nearly equal outputs: the faster": (SIZE, [GOOD, point("slow", loss=0.009, speed=1.5)]),
    "nearly equal outputs and times: the smaller": (SIZE, [GOOD, point("large", size=450, loss=0.009)]),
    "slower than the dense one, though better": (SIZE, [GOOD, point("slow", loss=0.001, speed=0.8)]),
    "hardly slower, much smaller": (QUALITY, [point("good", size=300, speed=0.94), point("large", size=990, speed=1)]),
    "the best outputs within a time": (TIME, [GOOD, point("worse", loss=0.02, speed=4.0)]),
    "too slow, though better": (TIME, [GOOD, point("slow", loss=0.001, speed=1.9)]),
    "not measured, though better": (TIME, [GOOD, point("unknown", loss=0.001, speed=None)]),
    "larger is no fault within a time": (TIME, [point("good", size=900), point("small", loss=0.02, size=10)]),
    "the smallest that keeps a quality": (QUALITY, [GOOD, point("large", size=441, loss=0.001, speed=9.0)]),
    "hardly larger than the smallest: the faster": (QUALITY, [GOOD, point("slow", size=365, loss=0.001, speed=1.9)]),
    "smaller, but missing the quality": (QUALITY, [GOOD, point("small", size=100, agreement=97.9)]),
    "the fastest that keeps a quality": (FASTEST, [GOOD, point("small", size=100, loss=0.001, speed=1.9)]),
    "faster, but missing the quality": (FASTEST, [GOOD, point("fast", speed=9.0, agreement=97.9)]),
    "MACs: the fastest of about equal outputs": (MACS, [GOOD, point("slow", loss=0.008, speed=1.5)]),
    "MACs: much worse, though faster": (MACS, [GOOD, point("fast", loss=1.6 * 0.01 + CLOSE_LOSS, speed=9.0)]),
    "MACs: a dense model keeps none": (MACS, [GOOD, point("rival", loss=0.001, speed=9.0, is_rival=True)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turned", [False, True])
def test_the_right_model_is_chosen(case, turned):
    request, points = CASES[case]
    chosen = rule(request).chosen(points[::-1] if turned else points)
    assert chosen.name == "good"


@pytest.mark.parametrize("request_", [SIZE, TIME, QUALITY])
def test_a_rival_is_delivered_where_it_is_better(request_):
    points = [GOOD, point("rival", size=300, loss=0.001, speed=3.0, is_rival=True)]
    assert rule(request_).chosen(points).name == "rival"


def test_a_slower_model_is_delivered_only_on_request_or_without_another():
    slow = point("slow", loss=0.001, speed=0.8)
    assert rule(SIZE, allow_slower=True).chosen([GOOD, slow]) is slow
    assert rule(SIZE).chosen([slow]) is slow
    unsure = point("unsure", loss=0.001, speed=0.97)  # its interval reaches 1
    assert rule(SIZE).chosen([GOOD, unsure]) is unsure


@pytest.mark.parametrize("request_", [SIZE, TIME, MACS, QUALITY])
def test_nothing_is_chosen_where_nothing_keeps_the_limit(request_):
    points = [point(size=900, speed=1.1, agreement=90.0, is_rival=True), point(error="no"), point(loss=None)]
    assert rule(request_).chosen(points) is None
    assert rule(request_).chosen([]) is None


def test_without_a_measurement_no_model_keeps_a_time():
    assert rule(TIME, dense_ms=None).chosen([GOOD]) is None


@pytest.mark.parametrize(
    ("first", "second", "is_longer"), [(1.9, 2.1, True), (1.9, 1.8, True), (1.5, 2.1, False), (2.1, 1.5, False)]
)
def test_a_time_missed_by_little_is_decided_by_a_longer_measurement(first, second, is_longer):
    def measured(points, runs=1):
        speed = first if runs == 1 else second
        return [point(p.name, speed=speed) for p in points], SimpleNamespace(arms=[SimpleNamespace(median_ms=DENSE_MS)])

    dense = SimpleNamespace(size=SimpleNamespace(bytes=DENSE_BYTES), reference=Path("dense.onnx"))
    maker = SimpleNamespace(measured=measured, request=TIME, dense=dense, precision="int8")
    step = PrecisionStep(maker=maker, clock=None, config=SimpleNamespace(allow_slower=False, allow_larger=False))
    (found,), _, ruled = step._measured([GOOD])
    assert found.speedup == (second if is_longer else first)
    assert ruled.keeps(found) is (found.speedup >= 2), "without slack"


@pytest.mark.parametrize(("speed", "is_longer"), [(1.95, True), (1.85, False), (2.1, False)])
def test_a_better_model_that_may_keep_the_time_is_measured_for_longer(speed, is_longer):
    runs_made = []

    def measured(points, runs=1):
        runs_made.append(runs)
        made = [point("bad", loss=0.5, speed=3.0), point("better", loss=0.01, speed=speed if runs == 1 else 2.05)]
        return made, SimpleNamespace(arms=[SimpleNamespace(median_ms=DENSE_MS)])

    dense = SimpleNamespace(size=SimpleNamespace(bytes=DENSE_BYTES), reference=Path("dense.onnx"))
    maker = SimpleNamespace(measured=measured, request=TIME, dense=dense, precision="int8")
    step = PrecisionStep(maker=maker, clock=None, config=SimpleNamespace(allow_slower=False, allow_larger=False))
    found, _, ruled = step._measured([GOOD])
    assert len(runs_made) == 1 + is_longer
    assert ruled.chosen(found).name == ("bad" if speed == 1.85 else "better")


def test_the_dense_model_keeps_every_quality():
    dense = Point(name="dense", scheme=FLOAT32, is_rival=True, path=Path("d.onnx"), bytes=DENSE_BYTES)
    assert dense.loss == 0
    assert rule(QUALITY).chosen([dense, point(agreement=90.0)]) is dense


def test_the_record_says_what_was_delivered_and_what_kept_the_limit():
    large = point("large", size=600, is_rival=True)
    records = [p.record(GOOD, rule(SIZE)) for p in (GOOD, large)]
    assert [r.is_delivered for r in records] == [True, False]
    assert [r.keeps_limit for r in records] == [True, False]
    assert [r.is_rival for r in records] == [False, True]
    assert (records[0].bytes, records[0].speedup, records[0].scheme) == (400, 2.0, "static int8 (minmax)")


POINTS = st.lists(
    st.builds(
        point,
        size=st.integers(100, 900),
        loss=st.one_of(st.just(0.0), st.floats(1e-4, 1.0)),
        speed=st.floats(0.3, 6.0),
        is_rival=st.booleans(),
        error=st.sampled_from(["", "", "", "no"]),
    ),
    max_size=8,
)


def dominating(points, chosen, ruled):
    """The rivals that keep the limit, are no larger and no slower, and have clearly better outputs."""
    return [
        rival
        for rival in points
        if rival.is_rival
        and ruled.keeps(rival)
        and rival.bytes <= chosen.bytes
        and rival.speedup >= chosen.speedup
        and NEAR_RATIO * rival.loss + NEAR_LOSS < chosen.loss
    ]


@settings(max_examples=100, deadline=None)
@given(POINTS, st.sampled_from([SIZE, TIME]), st.booleans())
def test_no_rival_dominates_what_is_chosen(points, request_, allow_slower):
    ruled = rule(request_, allow_slower=allow_slower)
    chosen = ruled.chosen(points)
    able = [p for p in points if ruled.keeps(p)]
    assert (chosen is None) == (not able)
    if chosen is not None:
        assert ruled.keeps(chosen)
        assert dominating(points, chosen, ruled) == []


def test_a_dominated_choice_is_seen():
    rival = point("rival", size=300, loss=0.001, speed=3.0, is_rival=True)
    assert dominating([GOOD, rival], GOOD, rule(SIZE)) == [rival]


@settings(max_examples=100, deadline=None)
@given(POINTS, st.sampled_from([SIZE, TIME, MACS, QUALITY, FASTEST]))
def test_the_order_of_the_models_decides_nothing(points, request_):
    facts = {
        None if chosen is None else (chosen.bytes, chosen.speedup)
        for order in itertools.islice(itertools.permutations(points), 24)
        for chosen in [rule(request_).chosen(order)]
    }
    assert len(facts) == 1


def test_help_and_guides_say_which_model_a_quality_gets():
    """As the rule does: neither the smallest in any case, nor the fastest of all."""
    assert pytest.approx(1.1) == NEAR_BYTES, "a tenth larger, as the texts say"
    guides = [(ROOT / "docs" / "guides" / f"{name}.md").read_text(encoding="utf-8") for name in ("budget", "precision")]
    for text in (export.help, *guides):
        assert re.search(r"smallest.{,200}or a faster one (that is )?at most a tenth larger", " ".join(text.split()))


def test_a_model_larger_than_the_users_needs_a_word():
    large = point("large", size=DENSE_BYTES + 1)
    assert rule(MACS).chosen([large]) is None
    assert (
        Rule(request=MACS, dense_bytes=DENSE_BYTES, dense_ms=None, allow_slower=False, allow_larger=True).chosen(
            [large]
        )
        is large
    )


def test_a_broken_model_is_refused_and_one_that_holds_up_is_named():
    broken, whole = point("broken", size=100, agreement=20.0), point("whole", size=300, agreement=90.0)
    with pytest.raises(GateError, match=r"--max-size.*broken.*whole \(300 bytes\).*--allow-broken"):
        refuse_broken(broken, SIZE.budget, [broken, whole])
    with pytest.raises(GateError, match="--allow-broken"):
        refuse_broken(point("nan", loss=None), SIZE.budget, [])
    refuse_broken(whole, SIZE.budget, [broken, whole])
