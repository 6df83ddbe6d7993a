"""Counts of several replicas, compared with those of one server that received all requests."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")

from rsi_deploy.serving.metrics import Metrics
from rsi_deploy.serving.replica_counts import KEPT_SECONDS, Board, ReplicaCounts, joined_metrics
from rsi_deploy.serving.shadow import Shadow


def compared(shadow, seed, count=6, classes=4):
    """Add some pairs of class scores to a shadow."""
    rng = np.random.default_rng(seed)
    feeds = {"x": np.zeros((count, 1), np.float32)}
    main = {"y": rng.standard_normal((count, classes)).astype(np.float32)}
    other = {"y": main["y"] + rng.standard_normal((count, classes)).astype(np.float32)}
    shadow.compare(feeds, main, other, (0.001 * (seed + 1), 0.002 * (seed + 1)))
    shadow.skipped += seed


def test_joined_shadows_equal_one_that_compared_everything():
    whole, parts = Shadow("1", "2"), [Shadow("1", "2") for _ in range(4)]  # the last one stays empty
    for seed, part in enumerate(parts[:3]):
        compared(part, seed)
        compared(whole, seed)
    joined, oracle = Shadow.joined(parts).summary(), whole.summary()
    assert (joined["samples"], joined["requests"], joined["skipped"]) == (18, 3, 3)
    assert joined["agreement"] == oracle["agreement"] < 100
    assert joined["agreement_interval"] == oracle["agreement_interval"]
    assert joined["divergence"] == pytest.approx(oracle["divergence"])
    assert joined["values"] == [pytest.approx(value) for value in oracle["values"]]
    assert joined["latency"] == {which: pytest.approx(times) for which, times in oracle["latency"].items()}
    assert Shadow.joined(parts[:2]).summary()["divergence"] != pytest.approx(oracle["divergence"])


def test_metrics_of_several_replicas_stay_separate():
    texts = {}
    for place, name in enumerate(("a", "b")):
        metrics = Metrics()
        for _ in range(place + 1):
            metrics.note_request("m", "1", "http", 200, seconds=0.003, waited=0.001)
        metrics.note_state(place, 1, 0)
        texts[name] = metrics.text()
    lines = joined_metrics(texts).decode().splitlines()
    found = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line.startswith("rsi_")}
    for place, name in enumerate(("a", "b")):
        labels = f'model="m",protocol="http",replica="{name}",status="200",version="1"'
        assert found[f"rsi_requests_total{{{labels}}}"] == place + 1
        assert found[f'rsi_waiting_requests{{replica="{name}"}}'] == place
        bucket = f'rsi_request_seconds_bucket{{le="0.005",model="m",replica="{name}",version="1"}}'
        assert found[bucket] == place + 1
    assert len([line for line in lines if line.startswith("# TYPE rsi_requests_total")]) == 1


def test_the_board_forgets_replicas_that_are_silent():
    now = [0.0]
    board = Board(clock=lambda: now[0])

    def put(name, text):
        return asyncio.run(board.exchange(name, ReplicaCounts(metrics=text)))

    assert put("a", b"1").keys() == {"a"}
    now[0] = KEPT_SECONDS / 2
    assert {name: counted.metrics for name, counted in put("b", b"2").items()} == {"a": b"1", "b": b"2"}
    now[0] = KEPT_SECONDS
    assert put("b", b"3").keys() == {"b"}
