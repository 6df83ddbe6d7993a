"""A killed replica, and a removed node of a two-node cluster on this machine, both under load.

Every request gets an answer or an error. Skipped if ray is not installed.
"""

import http.client
import json
import os
import threading
import time

import numpy as np
import psutil
import pytest
from processes import free_port
from served import MAIN, Server, alone, body, slow

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")
pytestmark = pytest.mark.ray

CLIENTS = 4
ANSWERED_WITHIN = 150  # s; a longer wait counts as silence
ROW = np.random.default_rng(0).standard_normal((1, 512)).astype(np.float32)


@pytest.fixture
def cluster():
    """A head and a second node with one CPU each, so that two replicas of one CPU run on different nodes."""
    utils = pytest.importorskip("ray.cluster_utils", reason="no ray here: pip install 'rsi-deploy[ray]'")
    kept = {name: os.environ.get(name) for name in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_AUTH_MODE")}
    os.environ |= {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_AUTH_MODE": "disabled"}
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    try:
        yield made
    finally:
        made.shutdown()
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@pytest.fixture
def served(cluster, tmp_path):
    """The command on that cluster, and its model's output for `ROW`."""
    model = slow(tmp_path / "m.onnx", width=512, layers=40)
    words = ("--engine", "ray", "--ray", cluster.address, "--replicas", "2", "--max-batch", "1")
    ports = (free_port(), None)
    with Server(model, *words, code=MAIN, log=tmp_path / "log", ends_within=90, ports=ports) as started:
        yield started, alone(model, {"x": ROW})["y"].ravel()


class Load:
    """Clients that send requests without pause and record each outcome: right, wrong, refused, broken or silence."""

    def __init__(self, server, want):
        self._server, self._want, self._stop, self._lock = server, want, threading.Event(), threading.Lock()
        self.heard = []
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(ANSWERED_WITHIN + 10)
        assert not any(thread.is_alive() for thread in self._threads), "a client got no answer"

    def after(self, count, what="right", seconds=120):
        """Wait for `count` more answers of a kind."""
        wanted = self.heard.count(what) + count
        end = time.monotonic() + seconds
        while self.heard.count(what) < wanted:
            assert time.monotonic() < end, self.heard[-50:]
            time.sleep(0.02)

    def _ask(self):
        while not self._stop.is_set():
            heard = self._one()
            with self._lock:
                self.heard.append(heard)

    def _one(self):
        try:
            status, _, text = self._server.ask("POST", "/v2/models/m/infer", body({"x": ROW}), timeout=ANSWERED_WITHIN)
        except TimeoutError:
            return "silence"
        except (OSError, http.client.HTTPException):
            return "broken"  # the connection was reset: its proxy was on the removed node
        if status != 200:
            return "refused" if text else "silence"
        return judged(json.loads(text)["outputs"][0]["data"], self._want)


def judged(found, want):
    return "right" if np.allclose(found, want, rtol=0, atol=1e-4 * np.abs(want).max()) else "wrong"


def replicas():
    """Return the processes of Ray with a replica of the service."""
    return [p for p in psutil.process_iter() if "ServeReplica:rsi-deploy:Replica" in " ".join(cmdline(p))]


def cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_replica_is_killed_and_a_node_is_removed(cluster, served):
    server, want = served
    assert judged(want[::-1], want) == "wrong"
    assert len(replicas()) == 2
    with Load(server, want) as load:
        load.after(20)
        before = len(load.heard)
        killed = replicas()[0]
        killed.kill()
        load.after(20)
        until = time.monotonic() + 120
        while len(replicas()) < 2:  # Ray starts another one
            assert time.monotonic() < until
            time.sleep(0.2)
        load.after(20)
        lost = {"replica": [heard for heard in load.heard[before:] if heard != "right"]}
        before = len(load.heard)
        cluster.remove_node(cluster.second, allow_graceful=False)
        load.after(40)
    lost["node"] = [heard for heard in load.heard[before:] if heard != "right"]
    for what, heard in lost.items():
        assert set(heard) <= {"refused", "broken"}, (what, heard)
        # At most the requests in flight fail: each client has one, on the replica that dies or on the node's proxy,
        # which may die later and breaks its connections.
        assert heard.count("refused") <= CLIENTS, (what, heard)
        assert heard.count("broken") <= (CLIENTS if what == "node" else 0), (what, heard)
    assert len(replicas()) == 1
