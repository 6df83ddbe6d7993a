"""Connect to a Ray cluster, or start one on this machine, without importing torch.

local                               start Ray on this machine until the block ends
HOST:PORT, ray://HOST:PORT, auto    connect to a running cluster, which gets this code with the connection
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
def connect_to_ray(address: str) -> Iterator[Any]:
    """Yield the module `ray`, connected while the block runs.

    Args:
        address: address of a cluster (`ray://HOST:PORT`, `HOST:PORT`, `auto`), or "local" to start Ray on this machine.
            If this process is already connected, that connection is used and stays open.

    Raises:
        UsageError: Ray is not installed, or the address does not respond.
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
        message = " ".join(str(error).split())[:300]
        raise UsageError(
            f"--ray {address}: cannot connect: {message}", hint="type local, or a cluster's address"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_ray(address: str) -> None:
    """Raise early where `connect_to_ray` would; Ray itself retries for minutes if nothing listens at an address.

    Raises:
        UsageError: Ray is not installed, or the address does not respond.
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
        raise UsageError(
            f"--ray {address}: the address does not respond: {error}", hint="type local, or an address"
        ) from error


def _modules() -> list[str]:
    """Return the folders of our packages, so that the cluster runs this code."""
    import graph_passes

    return [next(iter(package.__path__)) for package in (rsi_deploy, graph_passes)]
