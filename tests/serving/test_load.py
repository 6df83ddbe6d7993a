"""Many clients at once, workers that are killed, bundles that are replaced: no wrong answer and no silence."""

import asyncio
import collections
import http.client
import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import onnxruntime
import psutil
import pytest
from served import Server, alone, body, linear, run_threads, running_sum, slow, tokens

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")
import tritonclient.grpc
import tritonclient.http

from rsi_deploy.serving.catalog import read_catalog
from rsi_deploy.serving.engine.batches import BatchLimits
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferRequest
from rsi_deploy.serving.service import Service

ROWS = np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32)


def asked(server, model, feeds):
    """Status and first output, or the error's words."""
    status, _, text = server.ask("POST", f"/v2/models/{model}/infer", body(feeds))
    document = json.loads(text)
    if status != 200:
        return status, document["error"]
    output = document["outputs"][0]
    return status, np.array(output["data"], np.float32).reshape(output["shape"])


@pytest.fixture(scope="module")
def batching(tmp_path_factory):
    """A server with one worker and a long batch delay, so that requests are joined whenever possible."""
    folder = tmp_path_factory.mktemp("batching")
    models = {"linear": linear(folder / "linear.onnx"), "tokens": tokens(folder / "tokens.onnx")}
    models["sum"] = running_sum(folder / "sum.onnx")
    with Server(*models.values(), "--batch-delay", "20ms", "--workers", "1", log=folder / "log") as server:
        yield server, models


def batches_and_requests(server, model):
    names = "rsi_batch_rows_count", "rsi_batched_requests_total"
    return tuple(server.metric(name, model=model) for name in names)


def test_requests_are_joined_and_answered_right(batching):
    server, models = batching
    want = alone(models["linear"], {"x": ROWS})["y"]

    def client(number):
        c = tritonclient.http.InferenceServerClient(server.http)
        for step in range(15):
            first = (number * 5 + step) % 60
            rows = slice(first, first + 1 + step % 4)
            put = tritonclient.http.InferInput("x", ROWS[rows].shape, "FP32")
            put.set_data_from_numpy(ROWS[rows])
            np.testing.assert_allclose(c.infer("linear", [put]).as_numpy("y"), want[rows], rtol=0, atol=1e-5)
        return True

    assert run_threads(16, client) == [True] * 16
    batches, requests = batches_and_requests(server, "linear")
    assert requests == 240
    assert batches < 150
    assert server.metric("rsi_batch_rows_bucket", model="linear", le="16.0") == batches  # no more than --max-batch
    np.testing.assert_allclose(asked(server, "linear", {"x": ROWS})[1], want, rtol=0, atol=1e-5)
    assert batches_and_requests(server, "linear") == (batches + 1, 241)  # 64 rows in one request are one batch


def test_only_the_faulty_request_of_a_batch_fails(batching):
    server, models = batching

    def client(number):
        length = 3 + number % 2  # two shapes, which cannot be joined
        ids = np.arange(length)[None] + number
        if number == 5:
            ids[0, 0] = 999
        feeds = {"ids": ids, "mask": np.ones_like(ids)}
        status, found = asked(server, "tokens", feeds)
        if number == 5:
            return status == 400 and "could not run these inputs" in found
        np.testing.assert_allclose(found, alone(models["tokens"], feeds)["y"], rtol=0, atol=1e-5)
        return status == 200

    for _ in range(3):
        assert run_threads(12, client) == [True] * 12
    assert batches_and_requests(server, "tokens")[0] < 36


def test_rows_that_depend_on_each_other_are_never_joined(batching):
    server, _ = batching

    def client(number):
        x = np.full((4, 3), number + 1, np.float32)
        status, found = asked(server, "sum", {"x": x})
        np.testing.assert_allclose(found, np.cumsum(x, axis=0), rtol=0, atol=1e-5)
        return status

    assert run_threads(12, client) == [200] * 12
    assert batches_and_requests(server, "sum") == (12, 12)
    assert "sum 1: requests are not batched: samples are not proved independent: CumSum" in server.errors()


class Load:
    """Clients that send requests without pause on open connections; a context manager that counts the answers."""

    def __init__(self, server, model, clients, judge):
        self.server, self.path, self.judge = server, f"/v2/models/{model}/infer", judge
        self.counts, self.wrong, self.lost = collections.Counter(), [], []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self._client, args=(n,), daemon=True) for n in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self.threads), "a client got no answer"

    def _client(self, number):
        connection, step = http.client.HTTPConnection(self.server.http, timeout=15), number
        while not self.ended.is_set():
            step += 1
            row = step % len(ROWS)
            try:
                connection.request("POST", self.path, body({"x": ROWS[row : row + 1]}))
                response = connection.getresponse()
                document = json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
                if self.ended.is_set():
                    return
                connection.close()
                time.sleep(0.05)
                continue
            self.counts[response.status] += 1
            if response.status != 200:
                assert document["error"]
                continue
            which = self.judge(row, np.array(document["outputs"][0]["data"], np.float32))
            self.counts[which] += 1
            if which == "wrong":
                self.wrong.append((row, document))


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def judge_by(**answers):
    def judge(row, found):
        for name, want in answers.items():
            if np.allclose(found, want[row], rtol=0, atol=1e-4):
                return name
        return "wrong"

    return judge


def test_a_killed_worker_costs_no_answer(tmp_path):
    model = linear(tmp_path / "m.onnx")
    want = alone(model, {"x": ROWS})["y"]
    with Server(model, log=tmp_path / "log") as server:
        first = server.info["workers"]
        with Load(server, "m", 8, judge_by(right=want)) as load:
            for pid in first:
                time.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: server.metric("rsi_workers") == 2 == server.metric("rsi_worker_restarts"))
            time.sleep(0.2)
        assert not load.wrong
        assert not load.lost
        assert load.counts["right"] == load.counts[200] > 20
        assert load.counts.keys() <= {200, "right", 429, 503}
        assert server.metric("rsi_worker_restarts") == 2 == server.errors().count("has died")
        wait_for(lambda: server.metric("rsi_workers") == 2)
    assert judge_by(right=want)(0, want[1]) == "wrong"


def test_all_workers_killed_at_once(tmp_path):
    model = linear(tmp_path / "m.onnx")
    want = alone(model, {"x": ROWS})["y"]
    with Server(model, "--latency-bound", "20s") as server:
        for pid in server.info["workers"]:
            os.kill(pid, signal.SIGKILL)
        status, found = asked(server, "m", {"x": ROWS})  # waits for the next workers
        assert status == 200
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def test_a_worker_that_hangs_is_killed(tmp_path):
    async def hang():
        limits = BatchLimits(run_timeout=1.0, latency_bound=20.0)
        service = Service(
            read_catalog([str(linear(tmp_path / "m.onnx"))]), limits, workers=1, threads=1, provider="cpu"
        )
        await service.start()
        try:
            (pid,) = service.worker_pids()
            os.kill(pid, signal.SIGSTOP)
            answer = await service.infer("m", "", InferRequest(feeds={"x": ROWS}, outputs={}))
            return pid, service.worker_pids(), answer.outputs["y"]
        finally:
            await service.close()

    before, after, found = asyncio.run(hang())
    assert after != [before]
    np.testing.assert_allclose(found, alone(tmp_path / "m.onnx", {"x": ROWS})["y"], rtol=0, atol=1e-5)


def test_a_request_that_kills_two_workers_fails(tmp_path):
    async def poison():
        model, rows = slow(tmp_path / "m.onnx"), np.ones((1000, 1536), np.float32)  # runs for seconds
        limits = BatchLimits(max_batch=1000, latency_bound=60.0)
        service = Service(read_catalog([str(model)]), limits, workers=1, threads=1, provider="cpu")
        await service.start()
        killed = set()

        async def kill_all():
            while True:
                pids = service.worker_pids()
                await asyncio.sleep(0.5)  # time to read the request
                for pid in set(pids) - killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)

        killer = asyncio.create_task(kill_all())
        try:
            with pytest.raises(Refusal, match="twice") as refused:
                await service.infer("m", "", InferRequest(feeds={"x": rows}, outputs={}))
            assert len(killed) == 2
            return refused.value
        finally:
            killer.cancel()
            await service.close()

    refusal = asyncio.run(poison())
    assert refusal.status == 503


def test_workers_end_with_the_front(tmp_path):
    server = Server(linear(tmp_path / "m.onnx"))
    server.process.kill()
    server.process.wait()
    server.process.stdout.close()
    _, alive = psutil.wait_procs([psutil.Process(p) for p in server.info["workers"] if psutil.pid_exists(p)], 5)
    assert not alive


def test_past_saturation_some_are_refused_and_none_is_lost(tmp_path):
    model, row = slow(tmp_path / "slow.onnx"), np.ones((1, 1536), np.float32) / 100
    want = alone(model, {"x": row})["y"]
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    session.run(None, {"x": row})
    began = time.monotonic()
    session.run(None, {"x": np.repeat(row, 2, axis=0)})
    bound = max(3 * (time.monotonic() - began), 0.02)  # of twelve batches that 24 clients ask for at once
    with Server(model, "--latency-bound", f"{1000 * bound:.0f}ms", "--max-batch", "2") as server:
        assert asked(server, "slow", {"x": row})[0] == 200

        def client(number):
            statuses = []
            for _ in range(4):
                status, headers, text = server.ask("POST", "/v2/models/slow/infer", body({"x": row}))
                statuses.append(status)
                document = json.loads(text)
                if status == 200:
                    np.testing.assert_allclose(np.array(document["outputs"][0]["data"]), want[0], rtol=0, atol=1e-4)
                else:
                    assert document["error"]
                    assert int(headers["retry-after"]) >= 1
            return statuses

        statuses = collections.Counter(status for found in run_threads(24, client) for status in found)
        assert statuses.keys() <= {200, 429, 503}
        assert statuses[200] >= 3
        assert statuses[429] >= 10
        assert asked(server, "slow", {"x": row})[0] == 200  # accepted again at once
        assert (
            server.metric("rsi_requests_total", status="429") + server.metric("rsi_requests_total", status="503")
            == sum(statuses.values()) - statuses[200]
        )


def test_a_replaced_bundle_is_loaded_without_losing_a_request(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    served = tmp_path / "m"
    for folder, seed in ((old, 0), (new, 7)):
        bundle(folder, seed)
    answers = {name: alone(f / "model.onnx", {"x": ROWS})["y"] for name, f in (("old", old), ("new", new))}
    shutil.copytree(old, served)
    with Server(served, "--reload-every", "100ms", log=tmp_path / "log") as server:
        with Load(server, "m", 6, judge_by(**answers)) as load:
            time.sleep(0.5)
            replace(served, new)
            wait_for(lambda: load.counts["new"])
            time.sleep(0.3)
        assert not load.wrong
        assert not load.lost
        assert load.counts["old"] > 10 < load.counts["new"]
        assert load.counts.keys() <= {200, "old", "new"}
        assert asked(server, "m", {"x": ROWS})[1] == pytest.approx(answers["new"], abs=1e-4)
        assert server.metric("rsi_reloads_total", outcome="done") == 1
        assert server.metric("rsi_workers") == 2
        _, alive = psutil.wait_procs([psutil.Process(p) for p in server.info["workers"] if psutil.pid_exists(p)], 5)
        assert not alive  # the old workers have ended

        (served / "model.onnx").write_bytes((old / "model.onnx").read_bytes())  # its hash is not in the report
        wait_for(lambda: server.metric("rsi_reloads_total", outcome="refused"))
        assert asked(server, "m", {"x": ROWS})[1] == pytest.approx(answers["new"], abs=1e-4)

        replace(served, old)  # correct files are loaded again after a refusal
        wait_for(lambda: server.metric("rsi_reloads_total", outcome="done") == 2)
        assert asked(server, "m", {"x": ROWS})[1] == pytest.approx(answers["old"], abs=1e-4)
    assert "not reloaded" in server.errors()
    assert "changed since report.json was written" in server.errors()


def replace(served, by):
    """Put a copy of a folder in the place of a served one."""
    ready, gone = (served.with_name(f"{by.name}-{end}") for end in ("ready", "gone"))
    shutil.copytree(by, ready)
    served.rename(gone)
    ready.rename(served)


def bundle(folder, seed):
    """Write a folder with a model and the fields of report.json that a server reads."""
    import hashlib

    folder.mkdir()
    content = linear(folder / "model.onnx", seed=seed).read_bytes()
    report = {"schema_version": 1, "files": {"model.onnx": hashlib.sha256(content).hexdigest()}}
    (folder / "report.json").write_text(json.dumps(report))


def test_accepted_requests_are_answered_at_shutdown(tmp_path):
    model, row = slow(tmp_path / "slow.onnx"), np.ones((1, 1536), np.float32) / 100
    want = alone(model, {"x": row})["y"]
    with Server(model, "--latency-bound", "30s", "--max-batch", "1", "--workers", "1") as server:
        started = threading.Barrier(9)
        rpc = tritonclient.grpc.InferenceServerClient(server.grpc)

        def client(number):
            started.wait()
            if number < 2:
                put = tritonclient.grpc.InferInput("x", row.shape, "FP32")
                put.set_data_from_numpy(row)
                status, found = 200, rpc.infer("slow", [put]).as_numpy("y")
            else:
                status, found = asked(server, "slow", {"x": row})
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)
            return status

        def end():
            started.wait()
            time.sleep(0.15)
            server.process.send_signal(signal.SIGTERM)

        threading.Thread(target=end, daemon=True).start()
        assert run_threads(8, client) == [200] * 8
        assert server.process.wait(10) == 0


def test_not_ready_is_reported_before_connections_close(tmp_path):
    model = linear(tmp_path / "m.onnx")
    want = alone(model, {"x": ROWS})["y"]
    with Server(model) as server, Load(server, "m", 4, judge_by(right=want)) as load:
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        load.ended.set()
    assert not load.wrong
    assert load.counts.keys() <= {200, "right"}
    assert all("Refused" in lost for lost in load.lost), load.lost  # no connection breaks within a request
