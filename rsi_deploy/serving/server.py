"""`serve`: checks the options, builds the parts of the server and runs them until a signal.

bind ports -> check bundles -> start workers -> load models -> listen -> ready
SIGTERM or SIGINT: report "not ready" -> refuse new requests -> answer the accepted ones -> end
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
from rsi_deploy.serving.ports import bound_socket, bracketed, free_port, uncontended_port

if TYPE_CHECKING:
    from rsi_deploy.serving.front import Listening

REQUIRED_MODULES = {
    "grpc": "grpcio",
    "orjson": "orjson",
    "prometheus_client": "prometheus_client",
    "starlette": "starlette",
    "tritonclient": "tritonclient[grpc]",
    "uvicorn": "uvicorn",
}
"""Module -> package of the extra `serve` that has it."""
Engine = Literal["own", "ray"]
ENGINES = get_args(Engine)
EVERY_ADDRESS = ("0.0.0.0", "::")
RAY_GRPC = "Ray Serve listens for gRPC on every address of the machine and ignores --host"


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
    max_tokens: int = 1024,
    generation_wait: float = 60.0,
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
    """Serve models until SIGTERM or SIGINT, then answer the accepted requests and return.

    It must be called from the main thread, which receives the signals.

    Args:
        models: `[NAME[:VERSION]=]PATH` of a bundle, an ONNX file, or a folder of numbered bundles (versions).
        host: address to listen on; the default is reachable from this machine alone.
        http_port: port of HTTP; 0 takes a free one.
        grpc_port: port of gRPC; 0 takes a free one.
        grpc: whether to serve gRPC.
        workers: number of worker processes; 0: two, or one on a single core.
        threads: threads of each worker; 0 divides the cores among the workers.
        provider: onnxruntime provider.
        max_batch: most rows of a batch of several requests; 1 joins none.
        batch_delay: seconds that a request waits for others while a worker is idle.
        latency_bound: seconds within which a request must be answered; one that would take longer is refused with 429.
        max_tokens: most tokens that a request may generate.
        generation_wait: seconds that a request to generate text waits for a worker; then it is refused.
        canary: `[NAME=]PATH` of a model that answers a share of the requests.
        canary_share: share of the canary, 0 to 1.
        shadow: `[NAME=]PATH` of a model that is compared with the one that answers.
        api_key: key that every request but health must have; "" requires none.
        max_body: most bytes of a request.
        max_json: most bytes of JSON in a request.
        access_log: a file, "-" for stderr, or "off".
        reload_seconds: seconds between checks for replaced files; 0 disables them.
        drain_seconds: seconds that accepted requests have to be answered at shutdown.
        engine: "own" server, or "ray" for a Ray Serve application (`rsi_deploy.serving.ray.app`).
        ray: address of a cluster for engine ray; "" or "local" starts Ray on this machine.
        replicas: fewest and most replicas for engine ray; "" is "1-4".
        write_config: file to write for `serve deploy` instead of serving, for engine ray.
        on_ready: called when the server answers requests.

    Raises:
        UsageError: a package is missing, a port is in use, or an argument is invalid.
        ModelError: no model can be loaded.
        GateError: the files of a bundle are missing or changed.
    """
    positive = {"max_batch": max_batch, "latency_bound": latency_bound, "max_body": max_body, "max_json": max_json}
    positive |= {"max_tokens": max_tokens, "generation_wait": generation_wait}
    if min(positive.values()) <= 0:
        raise UsageError(f"{', '.join(positive)} must be more than 0")
    check_engine(engine, ray, replicas, write_config, workers, provider, access_log)
    if engine == "ray" and grpc and host not in EVERY_ADDRESS:
        raise UsageError(f"--engine ray: {RAY_GRPC}; type --no-grpc, or --host 0.0.0.0 with an API key")
    check_installed()
    from rsi_deploy.serving.catalog import read_catalog, with_absolute_path

    if engine == "ray":
        settings = {
            "models": tuple(map(with_absolute_path, models)),
            "canary": canary and with_absolute_path(canary),
            "canary_share": canary_share,
            "shadow": shadow and with_absolute_path(shadow),
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
        limits = BatchLimits(
            max_batch=max_batch, batch_delay=batch_delay, latency_bound=latency_bound, generation_wait=generation_wait
        )
        log = AccessLog(_log_stream(access_log, stack))
        stack.callback(log.close)
        front = Front(
            service=Service(routes, limits, workers=workers, threads=threads, provider=provider),
            access=Access(api_key=api_key, max_body=max_body, max_json=max_json, max_tokens=max_tokens),
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
    """Refuse options that have no effect with the engine.

    Raises:
        UsageError: the option, and what to type instead.
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine must be one of {', '.join(ENGINES)}, but got {engine!r}")
    if engine == "own":
        for option, value in (("--ray", ray), ("--replicas", replicas), ("--write-config", str(write_config))):
            if value:
                raise UsageError(f"{option} has no effect without --engine ray; add it, or leave {option} out")
        return
    if workers:
        raise UsageError("--workers has no effect with --engine ray, where a replica has one; type --replicas 1-4")
    if provider != "cpu":
        raise UsageError(f"--engine ray serves on cpu alone, but got --provider {provider}; leave out --engine ray")
    if access_log not in ("-", "off"):
        raise UsageError(
            f"--access-log {access_log}: with --engine ray it must be - (the replica's stderr, which Ray keeps) or off"
        )
    if ray and write_config:
        raise UsageError("--ray has no effect with --write-config: serve deploy has the address; leave out one of them")


def check_installed() -> None:
    """Check that the packages of the extra `serve` are installed.

    Raises:
        UsageError: with what to install.
    """
    missing = [package for module, package in REQUIRED_MODULES.items() if importlib.util.find_spec(module) is None]
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
    """Choose the ports and run `rsi_deploy.serving.ray.engine`."""
    from rsi_deploy.packaging.replicas import parse_replicas
    from rsi_deploy.serving.ray import engine as ray_engine
    from rsi_deploy.serving.ray.app import read_settings

    host, http, grpc = address
    ray = ray or "local"
    this_machine = ray == "local" and not write_config
    ports = {"--http-port": http} | ({} if grpc is None else {"--grpc-port": grpc})
    for option, port in ports.items():
        if this_machine:
            ports[option] = uncontended_port(host, port, option)
        elif not port:
            raise UsageError(f"{option} 0: every node of a cluster listens on the same port; type its number")
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
