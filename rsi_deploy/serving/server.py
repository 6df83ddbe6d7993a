"""`serve`: everything together in one front process, from the first socket to the last answer.

bind ports -> check bundles -> start workers -> all loaded -> listen -> ready
SIGTERM or SIGINT: say "not ready", let connections go -> take no more -> answer what was taken -> end
"""

import asyncio
import contextlib
import errno
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Sequence
from io import RawIOBase
from typing import TYPE_CHECKING

from rsi_deploy.errors import UsageError

if TYPE_CHECKING:
    from rsi_deploy.serving.front import Listening

NEEDED = {
    "grpc": "grpcio",
    "orjson": "orjson",
    "prometheus_client": "prometheus_client",
    "starlette": "starlette",
    "tritonclient": "tritonclient[grpc]",
    "uvicorn": "uvicorn",
}
"""Module -> package of the extra `serve`."""


def serve(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    grpc: bool = True,
    workers: int = 0,
    threads: int = 0,
    provider: str = "cpu",
    max_batch: int = 16,
    batch_delay: float = 0.002,
    latency_bound: float = 2.0,
    canary: str = "",
    canary_share: float = 0.0,
    shadow: str = "",
    api_key: str = "",
    max_body: int = 64 << 20,
    max_json: int = 8 << 20,
    access_log: str = "-",
    reload_seconds: float = 1.0,
    drain_seconds: float = 30.0,
    on_ready: "Callable[[Listening], None]" = lambda listening: None,
) -> None:
    """Serve models until SIGTERM or SIGINT, then answer what was taken and return.

    It must be called from the main thread, which is the one that gets signals.

    Args:
        models: `[NAME[:VERSION]=]PATH` of a bundle, an ONNX file, or a folder of numbered bundles (versions).
        host: address to listen on; the default is reachable from this machine alone.
        http_port: 0 takes a free one.
        grpc_port: likewise.
        grpc: whether to speak gRPC.
        workers: processes that run models; 0: two, or one on a single core.
        threads: of each worker; 0: the cores shared out among the workers.
        provider: of onnxruntime.
        max_batch: rows of a batch of several requests; 1 joins none.
        batch_delay: seconds that a request waits for others while a worker is idle.
        latency_bound: seconds in which a request is to be answered; what would take longer is refused with 429.
        canary: `[NAME=]PATH` of a model that answers a share of the requests.
        canary_share: that share, 0 to 1.
        shadow: `[NAME=]PATH` of a model that runs beside and is compared.
        api_key: that must come with every request but health; "" asks for none.
        max_body: bytes of a request.
        max_json: bytes of JSON in it.
        access_log: a file, "-" for stderr, or "off".
        reload_seconds: between looks at the files; 0 never looks.
        drain_seconds: that requests which were taken have, to be answered when the server ends.
        on_ready: called when it answers.

    Raises:
        UsageError: something missing, a port in use, names that do not fit.
        ModelError: a model that cannot be loaded.
        GateError: a bundle whose files are not what it claims.
    """
    check_installed()
    from rsi_deploy.serving.access_log import AccessLog
    from rsi_deploy.serving.batches import BatchLimits
    from rsi_deploy.serving.catalog import read_catalog
    from rsi_deploy.serving.front import Front
    from rsi_deploy.serving.service import Service
    from rsi_deploy.serving.transport import Access

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or min(2, cores)
    threads = threads or max(1, cores // workers)
    if min(max_batch, latency_bound, max_body, max_json) <= 0:
        raise UsageError("max_batch, latency_bound, max_body and max_json must be more than 0")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bound_socket(host, http_port, "--http-port"))
        if grpc:
            grpc_port = _free_port(host, grpc_port)
        routes = read_catalog(models, canary=canary, canary_share=canary_share, shadow=shadow)
        limits = BatchLimits(max_batch=max_batch, batch_delay=batch_delay, latency_bound=latency_bound)
        log = AccessLog(_log_stream(access_log, stack))
        stack.callback(log.close)
        front = Front(
            service=Service(routes, limits, workers=workers, threads=threads, provider=provider),
            access=Access(api_key=api_key, max_body=max_body, max_json=max_json),
            log=log,
            listener=listener,
            grpc=f"{_bracketed(host)}:{grpc_port}" if grpc else "",
            reload_seconds=reload_seconds,
            drain_seconds=drain_seconds,
        )
        asyncio.run(front.run(on_ready))


def check_installed() -> None:
    """Refuse where a package of the extra is missing.

    Raises:
        UsageError: with what to install.
    """
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}: pip install 'rsi-deploy[serve]'")
    if importlib.util.find_spec("onnxruntime") is None:
        raise UsageError("serve needs onnxruntime: pip install 'rsi-deploy[serve,cpu]'")


def bound_socket(host: str, port: int, option: str) -> socket.socket:
    """A socket bound to the address, not listening yet.

    Raises:
        UsageError: it is in use, not allowed, or no address of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, socket.IPPROTO_TCP)  # unnamed, asyncio would leave Nagle's delays on
    except OSError as error:
        raise UsageError(
            f"--host {host}: {error.strerror or error}; type an address of this machine, such as 127.0.0.1"
        ) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(0)  # a bind alone may share the port with one who does not listen yet
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"{option}: port {port} on {host} is in use; choose another, or 0 for a free one"
            ) from None
        raise UsageError(
            f"{option}: cannot listen on {host} port {port}: {error.strerror}; choose another port or host"
        ) from None
    return sock


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0, where it can be had."""
    with bound_socket(host, port, "--grpc-port") as sock:
        return int(sock.getsockname()[1])


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _log_stream(name: str, stack: contextlib.ExitStack) -> RawIOBase | None:
    if name == "off":
        return None
    if name == "-":
        return stack.enter_context(open(sys.stderr.fileno(), "wb", buffering=0, closefd=False))
    try:
        return stack.enter_context(open(name, "ab", buffering=0))
    except OSError as error:
        raise UsageError(f"--access-log {name}: {error.strerror}; choose another file") from None
