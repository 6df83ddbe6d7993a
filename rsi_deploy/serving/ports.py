"""Ports to listen on: bound, or refused with the option to change."""

import contextlib
import errno
import random
import socket

from rsi_deploy.core.errors import UsageError

QUIET = range(20000, 32768)
"""Between the ports that Ray gives its workers and those that Linux gives to whoever asks for any."""


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


def free_port(host: str, port: int, option: str) -> int:
    """The port, or a free one for 0, where it can be had.

    Raises:
        UsageError: as `bound_socket`.
    """
    with bound_socket(host, port, option) as sock:
        return int(sock.getsockname()[1])


def quiet_port(host: str, port: int, option: str) -> int:
    """As `free_port`, but of the free ones one that nobody gets who asks the system, or Ray, for any.

    Raises:
        UsageError: as `bound_socket`.
    """
    found = free_port(host, port, option)
    if port:
        return found
    for candidate in random.SystemRandom().sample(QUIET, 64):
        with contextlib.suppress(UsageError):
            return free_port(host, candidate, option)
    return found


def bracketed(host: str) -> str:
    """The host as it stands before a port.

    Example:
        >>> bracketed("::1"), bracketed("127.0.0.1")
        ('[::1]', '127.0.0.1')
    """
    return f"[{host}]" if ":" in host else host
