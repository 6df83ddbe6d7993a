"""Connecting to a Ray cluster, or starting one on this machine; no torch here.

local                               a Ray of its own on this machine, which ends with the block
HOST:PORT, ray://HOST:PORT, auto    a cluster that is there; it gets this code with the connection
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import rsi_deploy
from rsi_deploy.core.errors import UsageError


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected for as long as the block lasts.

    Args:
        address: of a cluster (`ray://HOST:PORT`, `HOST:PORT`, `auto`), or "local": a Ray of its own on this machine,
            which ends with the block. Where this process is connected already, that connection is used and stays.

    Raises:
        UsageError: ray is not installed, or nobody answers at the address.
    """
    check_ray(address)
    import ray

    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address == "local":
            ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, **quiet)
        else:
            ray.init(address=address, runtime_env={"py_modules": _modules()}, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        said = " ".join(str(error).split())[:300]
        raise UsageError(f"--ray {address}: cannot connect: {said}; type local, or a cluster's address") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_ray(address: str) -> None:
    """Refuse, before any long work, where `connected` would; Ray itself tries for minutes where nobody listens.

    Raises:
        UsageError: ray is not installed, or nobody answers at the address.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError('--ray needs ray: pip install "rsi-deploy[ray]"') from None
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if ray.is_initialized() or not colon:
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            return
    except (OSError, ValueError) as error:
        raise UsageError(f"--ray {address}: nobody answers there: {error}; type local, or an address") from error


def _modules() -> list[str]:
    """Our packages, so that a cluster computes with this code."""
    import graph_passes

    return [next(iter(package.__path__)) for package in (rsi_deploy, graph_passes)]
