"""The front process: it runs both transports and the file watcher, and shuts down without losing an answer."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from rsi_deploy.core.errors import UsageError
from rsi_deploy.serving.access_log import AccessLog
from rsi_deploy.serving.service import Service
from rsi_deploy.serving.transports.common import Access
from rsi_deploy.serving.transports.grpc_app import grpc_server
from rsi_deploy.serving.transports.http_app import http_app
from rsi_deploy.serving.watching import watch

NOT_READY_SECONDS = 0.3
"""Seconds between "not ready" and refusing requests, for clients on open connections to see it."""
KEEP_ALIVE_SECONDS = 75
PATHS = {"encoder": "/v1/embeddings", "decoder": "/v1/chat/completions"}
"""Kind of a bundle -> path of OpenAI's protocol that answers most requests to it."""


@dataclass(frozen=True, kw_only=True)
class Listening:
    """The addresses and models of a server that is ready.

    Attributes:
        http: host and port of HTTP.
        grpc: host and port of gRPC, or "".
        models: name -> versions.
        workers: process ids of the workers; empty with `--engine ray`.
        refused: "NAME, version N" -> why it is not served.
        paths: name -> path of HTTP that answers its requests; without one, the Open Inference Protocol's.
    """

    http: str
    grpc: str
    models: dict[str, list[str]]
    workers: list[int]
    refused: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Front:
    """The parts of a server, ready to run.

    Attributes:
        service: the models, not started yet.
        access: API key and size limits.
        log: access log.
        listener: bound socket of HTTP.
        grpc: address of gRPC, or "".
        reload_seconds: seconds between checks for replaced files; 0 disables them.
        drain_seconds: seconds that accepted requests have to be answered at shutdown.
    """

    service: Service
    access: Access
    log: AccessLog
    listener: socket.socket
    grpc: str
    reload_seconds: float
    drain_seconds: float

    async def run(self, on_ready: Callable[[Listening], None]) -> None:
        """Load the models, serve them, and return after a signal when all accepted requests are answered."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        try:
            starting = asyncio.create_task(self.service.start())
            await _first(starting, stop.wait())
            if not starting.done():
                starting.cancel()
                await asyncio.wait([starting])
                return
            await starting
            await self._serve(stop, on_ready)
        finally:
            await self.service.close()

    async def _serve(self, stop: asyncio.Event, on_ready: Callable[[Listening], None]) -> None:
        http = self._http()
        serving = asyncio.create_task(http.serve(sockets=[self.listener]))
        rpc = await self._start_grpc()
        watcher = asyncio.create_task(watch(self.service, self.reload_seconds)) if self.reload_seconds else None
        while not http.started and not serving.done():
            await asyncio.sleep(0.005)
        host, port = self.listener.getsockname()[:2]
        models = {name: sorted(route.versions, key=int) for name, route in self.service.routes.items()}
        kinds = {name: route.versions[route.main].bundle.kind for name, route in self.service.routes.items()}
        paths = {name: PATHS[kind] for name, kind in kinds.items() if kind in PATHS}
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        refused = {label: str(error) for label, error in self.service.routes.refused.items()}
        pids = self.service.worker_pids()
        on_ready(Listening(http=address, grpc=self.grpc, models=models, paths=paths, workers=pids, refused=refused))
        await _first(serving, stop.wait())
        if watcher is not None:
            watcher.cancel()
        self.service.leaving = True
        for listening in http.servers:
            listening.close()
        await asyncio.sleep(NOT_READY_SECONDS)
        self.service.accepting = False
        http.should_exit = True
        ending = [serving] if rpc is None else [serving, asyncio.create_task(rpc.stop(self.drain_seconds))]
        await asyncio.wait(ending, timeout=self.drain_seconds + 5)

    def _http(self) -> Any:
        config = uvicorn.Config(
            http_app(self.service, self.access, self.log),
            http="h11",  # httptools does not limit headers: 200 MB of them took 200 MB of memory
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(self.drain_seconds)),
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # `run` handles signals
        return server

    async def _start_grpc(self) -> Any:
        if not self.grpc:
            return None
        server = grpc_server(self.service, self.access, self.log)
        try:
            server.add_insecure_port(self.grpc)
        except RuntimeError:
            raise UsageError(f"--grpc-port: {self.grpc} is in use; choose another, or 0 for a free one") from None
        await server.start()
        return server


async def _first(*awaitables: Any) -> None:
    """Wait until one of the awaitables is done."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
