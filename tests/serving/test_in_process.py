"""Rare events, in this process: a full queue, a worker that dies, a port that is taken."""

import asyncio
import contextlib
import os
import signal
import socket

import numpy as np
import psutil
import pytest
from served import linear

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.serving.access_log import AccessLog
from rsi_deploy.serving.catalog import read_catalog
from rsi_deploy.serving.engine.batches import MAX_BACKGROUND, MAX_WAITING, Batcher, BatchLimits
from rsi_deploy.serving.engine.pool import Pool, Worker, WorkerDied
from rsi_deploy.serving.engine.worker import LoadRequest
from rsi_deploy.serving.front import Front
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferRequest
from rsi_deploy.serving.service import Service
from rsi_deploy.serving.transports.common import Access

ROW = np.ones((1, 12), np.float32)


def service_of(path):
    return Service(read_catalog([str(path)]), BatchLimits(), workers=1, threads=1, provider="cpu")


def loading():
    """Return the worker processes of this process."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # also raised for a zombie
            found += [child] * any("serving.engine.worker" in argument for argument in child.cmdline())
    return found


@pytest.mark.parametrize(
    ("background", "most", "words", "retry"),
    [
        (False, MAX_WAITING, "too many requests wait; try again later", 1),
        (True, MAX_BACKGROUND, "too many shadow requests wait", 0),
    ],
)
def test_a_full_queue_refuses_requests(background, most, words, retry):
    async def filled():
        batcher = Batcher(BatchLimits(latency_bound=600.0), lambda *_: None)
        batcher.pool = Pool(1, "cpu", 1, batcher.pump)  # its worker is never started

        def asked():
            return batcher.run("m", {"x": ROW}, alone=False, background=background)

        waiting = [asyncio.create_task(asked()) for _ in range(most)]
        await asyncio.sleep(0)
        try:
            assert not any(task.done() for task in waiting)
            with pytest.raises(Refusal, match=words) as refused:
                await asked()
            return refused.value
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    refusal = asyncio.run(filled())
    assert (refusal.status, refusal.retry_after) == (429, retry)


def test_a_server_that_shuts_down_refuses_requests(tmp_path):
    async def leaving():
        service, request = service_of(linear(tmp_path / "m.onnx")), InferRequest(feeds={"x": ROW}, outputs={})
        await service.start()
        try:
            assert (await service.infer("m", "", request)).outputs["y"].shape == (1, 5)
            service.accepting = False
            with pytest.raises(Refusal, match="the server is shutting down; try another one") as refused:
                await service.infer("m", "", request)
            return refused.value
        finally:
            await service.close()

    refusal = asyncio.run(leaving())
    assert (refusal.status, refusal.retry_after) == (503, 1)


def test_a_worker_that_dies_while_it_loads_is_reported(tmp_path):
    async def killed():
        service = service_of(linear(tmp_path / "m.onnx"))
        starting = asyncio.create_task(service.start())
        while not loading():
            await asyncio.sleep(0)
        for child in loading():
            child.kill()
        try:
            await starting
        finally:
            await service.close()

    with pytest.raises(ModelError, match="a worker ended while it loaded the models; serve fewer at a time, or give"):
        asyncio.run(killed())


def test_requests_that_a_dead_worker_had_not_read_are_known():
    """They are retried without a count, because the process cannot have died of them."""

    async def died_with(end):
        ended = asyncio.Event()
        worker = Worker(LoadRequest(bundles={}, provider="cpu", threads=1), lambda _: ended.set())
        await worker.load()
        await end(worker, ended)
        with pytest.raises(WorkerDied) as died:
            await worker.run("m", [], 5.0)
        await asyncio.wait_for(ended.wait(), 10)
        return died.value.had_request

    async def dead(worker, ended):
        os.kill(worker.pid, signal.SIGKILL)
        await asyncio.wait_for(ended.wait(), 10)

    async def closing(worker, ended):
        worker.close()  # its end has not been read yet

    async def unread(worker, ended):
        os.kill(worker.pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.2, os.kill, worker.pid, signal.SIGKILL)

    async def read(worker, ended):
        """Do nothing: the worker has no model "m", so it ends after it has read the request."""

    assert asyncio.run(died_with(dead)) is False
    assert asyncio.run(died_with(closing)) is False
    assert asyncio.run(died_with(unread)) is False
    assert asyncio.run(died_with(read)) is True


def test_a_grpc_port_that_is_taken_meanwhile(tmp_path):
    """Another process may take the port between the check and the start of the server."""
    service = service_of(linear(tmp_path / "m.onnx"))
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        front = Front(
            service=service,
            access=Access(),
            log=AccessLog(None),
            listener=listener,
            grpc=address,
            reload_seconds=0,
            drain_seconds=1,
        )
        with pytest.raises(UsageError, match=f"--grpc-port: {address} is in use; choose another, or 0 for a free one"):
            asyncio.run(front.run(lambda _: pytest.fail("it is not ready")))
    _, alive = psutil.wait_procs(loading(), 5)
    assert not alive
