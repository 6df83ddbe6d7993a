"""`serve --engine ray`: runs the application on a local Ray or on a cluster until a signal.

    check bundles -> connect -> Ray Serve listens -> replicas load -> ready
    SIGTERM or SIGINT: delete the application -> replicas answer their accepted requests -> Ray Serve ends

`write_config` writes a config for `serve deploy` instead, for a service that runs on after the command.
"""

import http.client
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.packaging.yaml_text import yaml_text
from rsi_deploy.runtime.ray_connection import connect_to_ray
from rsi_deploy.serving import KEY_VARIABLE
from rsi_deploy.serving.catalog import Catalog, all_versions
from rsi_deploy.serving.engine.model import LoadedModel
from rsi_deploy.serving.front import Listening
from rsi_deploy.serving.ports import bracketed
from rsi_deploy.serving.ray.app import RayAppSettings, build

NAME = "rsi-deploy"
SERVICER = "rsi_deploy.serving.ray.grpc.add_to_server"
READY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Address:
    """The address of Ray Serve's proxies.

    Attributes:
        host: host to listen on.
        http: port of HTTP.
        grpc: port of gRPC, or None.
    """

    host: str
    http: int
    grpc: int | None

    def options(self, longest: float) -> dict[str, Any]:
        """Return Ray Serve's options; after `longest` seconds it answers a request with 408."""
        options: dict[str, Any] = {
            "http_options": {"host": self.host, "port": self.http, "request_timeout_s": longest},
        }
        if self.grpc is not None:
            options["grpc_options"] = {
                "port": self.grpc,
                "grpc_servicer_functions": [SERVICER],
                "request_timeout_s": longest,
            }
        return options


def serve_on_ray(settings: RayAppSettings, where: Address, ray: str, on_ready: Callable[[Listening], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer the accepted requests and return. Call it from the main thread.

    Args:
        settings: settings of the application.
        where: address of Ray Serve's proxies, on this machine or on each node of the cluster that has a replica.
        ray: "local", or the address of a cluster.
        on_ready: called when the service answers requests.

    Raises:
        UsageError: Ray is not installed, the cluster does not answer, or Ray Serve already runs there.
        ModelError: a model cannot be loaded, or the replicas did not start.
        GateError: the files of a bundle are missing or changed.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("ray.serve") is None:
        raise UsageError("--engine ray needs ray[serve]: pip install 'rsi-deploy[serve,ray,cpu]'")
    routes = load_all(settings)
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", f"{READY_SECONDS:g}")  # 5 s is short on a laptop
    results = sys.stdout
    with redirect_stdout(sys.stderr), connect_to_ray(ray) as cluster:  # Ray prints its errors to stdout
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        _check_cpus(cluster, settings, may_grow=ray != "local")
        if serve.status().proxies:
            raise UsageError(
                f"--ray {ray}: Ray Serve already runs there, with its own address; write a config with "
                "--write-config FILE and type serve deploy FILE"
            )
        stop, ready = threading.Event(), threading.Event()
        with _signals(stop, ready), suppress(_Interrupted):
            try:
                _start(serve, settings, where, everywhere=ray != "local")
                models = {name: sorted(route.versions, key=int) for name, route in routes.items()}
                ready.set()
                with redirect_stdout(results):
                    on_ready(_listening(where, models))
                while not stop.wait(3600):
                    pass
            finally:
                ready.set()
                if NAME in serve.status().applications:
                    serve.delete(NAME)
                serve.shutdown()


def write_config(path: Path, settings: RayAppSettings, where: Address) -> None:
    """Check and load every bundle, and write the config for `serve deploy`.

    Raises:
        UsageError: the file exists, or it cannot be written.
        ModelError, GateError: as `serve_on_ray`.
    """
    load_all(settings)
    needs_key = bool(settings.api_key)
    args = settings.model_copy(update={"needs_key": needs_key}).model_dump(mode="json", exclude={"api_key"})
    document = {
        "proxy_location": "EveryNode",
        **where.options(settings.longest),
        "applications": [
            {"name": NAME, "route_prefix": "/", "import_path": "rsi_deploy.serving.ray.app:build", "args": args}
        ],
    }
    head = "# serve deploy FILE. Every node needs rsi-deploy[serve,ray,cpu], and the models under these paths.\n"
    if needs_key:
        head += f"# The replicas read the API key from ${KEY_VARIABLE}; without it they do not start.\n"
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(head + yaml_text(document))
    except FileExistsError:
        raise UsageError(f"--write-config {path}: the file exists; choose another one") from None
    except OSError as error:
        raise UsageError(f"--write-config {path}: {error.strerror}; choose another file") from None


def load_all(settings: RayAppSettings) -> Catalog:
    """Check each bundle and load each model once in this process, where a failure is one clear message.

    Raises:
        UsageError, ModelError, GateError: as `read_catalog` and `LoadedModel`.
    """
    routes = settings.catalog()
    for served in all_versions(routes):
        LoadedModel(served.bundle, threads=settings.threads, try_batches=False)
    return routes


def _check_cpus(cluster: Any, settings: RayAppSettings, *, may_grow: bool) -> None:
    """Refuse replicas for which the nodes lack CPUs: Ray would wait for ever.

    Raises:
        UsageError: with what fits.
    """
    if may_grow:
        return
    nodes = [int(node["Resources"].get("CPU", 0)) for node in cluster.nodes() if node["Alive"]]
    if (most := max(nodes, default=0)) < settings.threads:
        raise UsageError(
            f"--threads {settings.threads}: a replica takes as many CPUs, but a node has {most}; type --threads {most}"
        )
    room = sum(count // settings.threads for count in nodes)
    if room < settings.replicas[0]:
        raise UsageError(
            f"--replicas {settings.replicas[0]}: there are CPUs for {room} replicas of {settings.threads} threads; "
            f"type --replicas {room}"
        )


def _start(serve: Any, settings: RayAppSettings, where: Address, *, everywhere: bool) -> None:
    location = "EveryNode" if everywhere else "HeadOnly"
    try:
        serve.start(proxy_location=location, **where.options(settings.longest))
        serve.run(build(settings.model_dump()), name=NAME, route_prefix="/", blocking=False)
    except (RuntimeError, TimeoutError) as error:
        raise ModelError(
            f"Ray Serve did not start the service: {' '.join(str(error).split())[-1000:]}; "
            "`ray logs` on that cluster says more"
        ) from error
    if everywhere:
        return  # this machine may have no proxy
    end = time.monotonic() + READY_SECONDS
    while not _answers(where):
        if time.monotonic() > end:
            raise ModelError(
                f"Ray Serve's proxy does not answer at {where} after {READY_SECONDS:g} s; choose another --http-port"
            )
        time.sleep(0.05)


class _Interrupted(BaseException):
    """A signal before the service was ready; it ends the same way as a later one."""


@contextmanager
def _signals(stop: threading.Event, ready: threading.Event) -> Iterator[None]:
    """Make SIGINT and SIGTERM set `stop`, and raise `_Interrupted` before `ready`; restore the handlers at the end."""

    def handle(number: int, frame: Any) -> None:
        if not stop.is_set() and not ready.is_set():
            stop.set()
            raise _Interrupted
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answers(where: Address) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(where.host, where.host)
    connection = http.client.HTTPConnection(host, where.http, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        if connection.getresponse().status != 200:
            return False
        if where.grpc is not None:
            socket.create_connection((host, where.grpc), timeout=5).close()
        return True
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _listening(where: Address, models: dict[str, list[str]]) -> Listening:
    grpc = "" if where.grpc is None else f"{bracketed(where.host)}:{where.grpc}"
    return Listening(http=f"{bracketed(where.host)}:{where.http}", grpc=grpc, models=models, workers=[])
