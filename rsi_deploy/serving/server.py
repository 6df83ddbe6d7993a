"""`serve`: everything together in one front process, from the first socket to the last answer.

bind ports -> check bundles -> start workers -> all loaded -> listen -> ready
SIGTERM or SIGINT: say "not ready", let connections go -> take no more -> answer what was taken -> end
"""

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rsi_deploy.core.errors import UsageError
from rsi_deploy.serving.ports import bound_socket, bracketed, free_port, quiet_port

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
Engine = Literal["own", "ray"]
ENGINES = get_args(Engine)
EVERY_ADDRESS = ("0.0.0.0", "::")
RAY_GRPC = "Ray Serve listens for gRPC on every address of the machine, whatever --host says"


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
    engine: Engine = "own",
    ray: str = "",
    replicas: str = "",
    write_config: str | Path = "",
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
        engine: "own" server, or "ray": a Ray Serve application (`rsi_deploy.serving.ray.app`).
        ray: engine ray: address of a cluster; "" or "local" starts a Ray on this machine.
        replicas: engine ray: fewest and most, "1-4" where it is "".
        write_config: engine ray: the file to write for `serve deploy`, instead of serving.
        on_ready: called when it answers.

    Raises:
        UsageError: something missing, a port in use, names that do not fit.
        ModelError: a model that cannot be loaded.
        GateError: a bundle whose files are not what it claims.
    """
    if min(max_batch, latency_bound, max_body, max_json) <= 0:
        raise UsageError("max_batch, latency_bound, max_body and max_json must be more than 0")
    check_engine(engine, ray, replicas, write_config, workers, provider, access_log)
    if engine == "ray" and grpc and host not in EVERY_ADDRESS:
        raise UsageError(f"--engine ray: {RAY_GRPC}; type --no-grpc, or --host 0.0.0.0 with an API key")
    check_installed()
    from rsi_deploy.serving.catalog import anchored, read_catalog

    if engine == "ray":
        settings = {
            "models": tuple(map(anchored, models)),
            "canary": canary and anchored(canary),
            "canary_share": canary_share,
            "shadow": shadow and anchored(shadow),
            "threads": threads or 1,
            "max_batch": max_batch,
            "batch_delay": batch_delay,
            "latency_bound": latency_bound,
            "max_body": max_body,
            "max_json": max_json,
            "access_log": access_log,
            "reload_seconds": reload_seconds,
            "drain_seconds": drain_seconds,
            "api_key": api_key,
        }
        _serve_on_ray(settings, replicas, (host, http_port, grpc_port if grpc else None), ray, write_config, on_ready)
        return
    from rsi_deploy.serving.access_log import AccessLog
    from rsi_deploy.serving.engine.batches import BatchLimits
    from rsi_deploy.serving.front import Front
    from rsi_deploy.serving.service import Service
    from rsi_deploy.serving.transports.common import Access

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or min(2, cores)
    threads = threads or max(1, cores // workers)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bound_socket(host, http_port, "--http-port"))
        if grpc:
            grpc_port = free_port(host, grpc_port, "--grpc-port")
        routes = read_catalog(models, canary=canary, canary_share=canary_share, shadow=shadow)
        limits = BatchLimits(max_batch=max_batch, batch_delay=batch_delay, latency_bound=latency_bound)
        log = AccessLog(_log_stream(access_log, stack))
        stack.callback(log.close)
        front = Front(
            service=Service(routes, limits, workers=workers, threads=threads, provider=provider),
            access=Access(api_key=api_key, max_body=max_body, max_json=max_json),
            log=log,
            listener=listener,
            grpc=f"{bracketed(host)}:{grpc_port}" if grpc else "",
            reload_seconds=reload_seconds,
            drain_seconds=drain_seconds,
        )
        asyncio.run(front.run(on_ready))


def check_engine(
    engine: str, ray: str, replicas: str, write_config: str | Path, workers: int, provider: str, access_log: str
) -> None:
    """Refuse options that say nothing to the engine.

    Raises:
        UsageError: which, and what to type.
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine must be one of {', '.join(ENGINES)}, but got {engine!r}")
    if engine == "own":
        for option, value in (("--ray", ray), ("--replicas", replicas), ("--write-config", str(write_config))):
            if value:
                raise UsageError(f"{option} says nothing without --engine ray; add it, or leave {option} out")
        return
    if workers:
        raise UsageError("--workers says nothing to --engine ray, where each replica has one; type --replicas 1-4")
    if provider != "cpu":
        raise UsageError(f"--engine ray serves on cpu alone, but got --provider {provider}; leave out --engine ray")
    if access_log not in ("-", "off"):
        raise UsageError(
            f"--access-log {access_log}: with --engine ray it is -, the replica's stderr, which Ray keeps, or off; "
            "type one of these"
        )
    if ray and write_config:
        raise UsageError("--ray says nothing to --write-config: serve deploy takes the address; leave out one of them")


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


def _serve_on_ray(
    settings: dict[str, Any],
    replicas: str,
    address: tuple[str, int, int | None],
    ray: str,
    write_config: str | Path,
    on_ready: "Callable[[Listening], None]",
) -> None:
    """Ports found out, then `ray_engine`."""
    from rsi_deploy.packaging.replicas import parse_replicas
    from rsi_deploy.serving.ray import engine as ray_engine
    from rsi_deploy.serving.ray.app import read_settings

    host, http, grpc = address
    ray = ray or "local"
    here = ray == "local" and not write_config
    ports = {"--http-port": http} | ({} if grpc is None else {"--grpc-port": grpc})
    for option, port in ports.items():
        if here:
            ports[option] = quiet_port(host, port, option)
        elif not port:
            raise UsageError(f"{option} 0: every node of a cluster listens on the same port; name one")
    where = ray_engine.Address(host=host, http=ports["--http-port"], grpc=ports.get("--grpc-port"))
    whole = read_settings({**settings, "replicas": parse_replicas(replicas or "1-4")})
    if write_config:
        ray_engine.write_config(Path(write_config), whole, where)
    else:
        ray_engine.serve_on_ray(whole, where, ray, on_ready)


def _log_stream(name: str, stack: contextlib.ExitStack) -> RawIOBase | None:
    if name == "off":
        return None
    if name == "-":
        return stack.enter_context(open(sys.stderr.fileno(), "wb", buffering=0, closefd=False))
    try:
        return stack.enter_context(open(name, "ab", buffering=0))
    except OSError as error:
        raise UsageError(f"--access-log {name}: {error.strerror}; choose another file") from None
