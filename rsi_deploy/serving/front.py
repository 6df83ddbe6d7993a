"""The front process at run time: both transports, the watcher, and an end that loses no answer."""

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

LEAVE_SECONDS = 0.3
"""Between "not ready" and taking no more: long enough for clients on open connections to be told."""
KEEP_ALIVE_SECONDS = 75


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where the server answers; told once, when it is ready.

    Attributes:
        http: host and port.
        grpc: likewise; "" without gRPC.
        models: name -> versions.
        workers: their process ids; none where Ray has them.
        refused: "NAME, version N" -> why it is not served.
    """

    http: str
    grpc: str
    models: dict[str, list[str]]
    workers: list[int]
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Front:
    """What `serve` has put together.

    Attributes:
        service: the models, not started yet.
        access: who may ask for how much.
        log: of requests.
        listener: bound socket of HTTP.
        grpc: address of gRPC, or "".
        reload_seconds: between looks at the files; 0 never looks.
        drain_seconds: that requests which were taken have, to be answered at the end.
    """

    service: Service
    access: Access
    log: AccessLog
    listener: socket.socket
    grpc: str
    reload_seconds: float
    drain_seconds: float

    async def run(self, on_ready: Callable[[Listening], None]) -> None:
        """Load, serve, and return after a signal, when everything is answered."""
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
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        refused = {label: str(error) for label, error in self.service.routes.refused.items()}
        pids = self.service.worker_pids()
        on_ready(Listening(http=address, grpc=self.grpc, models=models, workers=pids, refused=refused))
        await _first(serving, stop.wait())
        if watcher is not None:
            watcher.cancel()
        self.service.leaving = True
        for listening in http.servers:
            listening.close()
        await asyncio.sleep(LEAVE_SECONDS)
        self.service.accepting = False
        http.should_exit = True
        ending = [serving] if rpc is None else [serving, asyncio.create_task(rpc.stop(self.drain_seconds))]
        await asyncio.wait(ending, timeout=self.drain_seconds + 5)

    def _http(self) -> Any:
        config = uvicorn.Config(
            http_app(self.service, self.access, self.log),
            http="h11",  # httptools takes headers without end: 200 MB of them were 200 MB of memory
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(self.drain_seconds)),
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # signals are ours
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
    """Wait until one of them is done."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
