"""Ports to listen on. Errors name the option that sets the port."""

import contextlib
import errno
import random
import socket

from rsi_deploy.core.errors import UsageError

UNCONTENDED = range(20000, 32768)
"""Ports that neither Ray gives to its workers nor Linux to programs that ask for any free port."""


def bound_socket(host: str, port: int, option: str) -> socket.socket:
    """Return a socket that is bound to the address.

    Raises:
        UsageError: the address is in use, not allowed, or not of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, socket.IPPROTO_TCP)  # without it, asyncio would not set TCP_NODELAY
    except OSError as error:
        raise UsageError(
            f"--host {host}: {error.strerror or error}; type an address of this machine, such as 127.0.0.1"
        ) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(0)  # without it, another process that only binds could share the port
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


def free_port(host: str, port: int, option: str) -> int:
    """Return the port, or a free one for 0.

    Raises:
        UsageError: as `bound_socket`.
    """
    with bound_socket(host, port, option) as sock:
        return int(sock.getsockname()[1])


def uncontended_port(host: str, port: int, option: str) -> int:
    """Return the port, or for 0 a free one that neither the system nor Ray assigns to other programs.

    Raises:
        UsageError: as `bound_socket`.
    """
    found = free_port(host, port, option)
    if port:
        return found
    for candidate in random.SystemRandom().sample(UNCONTENDED, 64):
        with contextlib.suppress(UsageError):
            return free_port(host, candidate, option)
    return found


def bracketed(host: str) -> str:
    """Return the host as it is written before a port.

    Example:
        >>> bracketed("::1"), bracketed("127.0.0.1")
        ('[::1]', '127.0.0.1')
    """
    return f"[{host}]" if ":" in host else host
