"""`serve --engine ray`: starts the application on a Ray of its own or on a cluster, and ends it with a signal.

    check bundles -> connect -> Ray Serve listens -> replicas load -> ready
    SIGTERM or SIGINT: the application is deleted: replicas answer what they took -> Ray Serve ends

`write_config` writes what `serve deploy` takes instead, for a service that outlives the command.
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
from rsi_deploy.serving.catalog import Catalog, all_served
from rsi_deploy.serving.engine.model import LoadedModel
from rsi_deploy.serving.front import Listening
from rsi_deploy.serving.ports import bracketed
from rsi_deploy.serving.ray.app import RayAppSettings, build

NAME = "rsi-deploy"
SERVICER = "rsi_deploy.serving.ray.grpc.add_to_server"
READY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the proxies of Ray Serve listen.

    Attributes:
        host: to listen on.
        http: port.
        grpc: port; None without gRPC.
    """

    host: str
    http: int
    grpc: int | None

    def options(self, longest: float) -> dict[str, Any]:
        """As Ray Serve takes them; `longest` is the seconds after which a request is given up with 408."""
        found: dict[str, Any] = {
            "http_options": {"host": self.host, "port": self.http, "request_timeout_s": longest},
        }
        if self.grpc is not None:
            found["grpc_options"] = {
                "port": self.grpc,
                "grpc_servicer_functions": [SERVICER],
                "request_timeout_s": longest,
            }
        return found


def check_ray_serve() -> None:
    """Refuse where Ray Serve is missing.

    Raises:
        UsageError: with what to install.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("ray.serve") is None:
        raise UsageError("--engine ray needs ray[serve]: pip install 'rsi-deploy[serve,ray,cpu]'")


def serve_on_ray(settings: RayAppSettings, where: Address, ray: str, on_ready: Callable[[Listening], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was taken and return; from the main thread.

    Args:
        settings: of the application.
        where: Ray Serve's proxies listen; on this machine, or on each of the cluster's nodes that has a replica.
        ray: "local", or the address of a cluster.
        on_ready: called when it answers.

    Raises:
        UsageError: Ray is missing or nobody is there, or Ray Serve runs there already.
        ModelError: a model that cannot be loaded, or replicas that did not start.
        GateError: a bundle whose files are not what it claims.
    """
    check_ray_serve()
    routes = loadable(settings)
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", f"{READY_SECONDS:g}")  # 5 s is short on a laptop
    results = sys.stdout
    with redirect_stdout(sys.stderr), connect_to_ray(ray) as cluster:  # Ray prints its errors as if they were results
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        _check_room(cluster, settings, may_grow=ray != "local")
        if serve.status().proxies:
            raise UsageError(
                f"--ray {ray}: Ray Serve runs there already, with an address of its own; write a config with "
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
    """Write the config that `serve deploy` takes, once every bundle is found to be what it claims and to load.

    Raises:
        UsageError: there is such a file already, or it cannot be written.
        ModelError, GateError: as `serve_on_ray`.
    """
    loadable(settings)
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
        head += f"# The replicas take the API key from ${KEY_VARIABLE}; without it they do not start.\n"
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(head + yaml_text(document))
    except FileExistsError:
        raise UsageError(f"--write-config {path}: there is such a file already; name another one") from None
    except OSError as error:
        raise UsageError(f"--write-config {path}: {error.strerror}; choose another file") from None


def loadable(settings: RayAppSettings) -> Catalog:
    """The models, each bundle checked and each model loaded once here, where a failure can be said in one line.

    Raises:
        UsageError, ModelError, GateError: as `read_catalog` and `LoadedModel`.
    """
    routes = settings.catalog()
    for served in all_served(routes):
        LoadedModel(served.bundle, threads=settings.threads, try_batches=False)
    return routes


def _check_room(cluster: Any, settings: RayAppSettings, *, may_grow: bool) -> None:
    """Refuse what would wait for ever: replicas that no node has the CPUs for.

    Raises:
        UsageError: with what fits.
    """
    nodes = [int(node["Resources"].get("CPU", 0)) for node in cluster.nodes() if node["Alive"]]
    if (most := max(nodes, default=0)) < settings.threads and not may_grow:
        raise UsageError(f"--threads {settings.threads}: a replica takes as many CPUs, but there are {most} here")
    room = sum(count // settings.threads for count in nodes)
    if room < settings.replicas[0] and not may_grow:
        raise UsageError(
            f"--replicas {settings.replicas[0]}: there are CPUs for {room} of {settings.threads} threads; ask for fewer"
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
        return  # there need be no proxy on this machine
    end = time.monotonic() + READY_SECONDS
    while not _answers(where):
        if time.monotonic() > end:
            raise ModelError(
                f"Ray Serve's proxy does not answer at {where} after {READY_SECONDS:g} s; choose another --http-port"
            )
        time.sleep(0.05)


class _Interrupted(BaseException):
    """A signal before the service was ready: it ends as one that came later."""


@contextmanager
def _signals(stop: threading.Event, ready: threading.Event) -> Iterator[None]:
    """Have SIGINT and SIGTERM set `stop`, or interrupt what is not `ready` yet; Ray's own ways are back afterwards."""

    def heard(number: int, frame: Any) -> None:
        if not stop.is_set() and not ready.is_set():
            stop.set()
            raise _Interrupted
        stop.set()

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
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
