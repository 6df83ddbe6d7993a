"""Python objects over a socket pair: eight bytes of length, then a pickle. Both ends belong to this server."""

import asyncio
import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!Q")


def send_frame(sock: socket.socket, value: Any) -> None:
    """Send one object over a blocking socket."""
    payload = pickle.dumps(value, protocol=5)
    sock.sendall(_LENGTH.pack(len(payload)))
    sock.sendall(payload)


def receive_frame(sock: socket.socket) -> Any:
    """Return the next object from a blocking socket.

    Raises:
        EOFError: the other end is closed.
    """
    (size,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    return pickle.loads(_exactly(sock, size))


async def send_frame_async(sock: socket.socket, value: Any) -> None:
    """Send one object over a non-blocking socket."""
    payload = pickle.dumps(value, protocol=5)
    loop = asyncio.get_running_loop()
    if len(payload) < 1 << 16:  # one call for small objects; large ones are not copied
        await loop.sock_sendall(sock, _LENGTH.pack(len(payload)) + payload)
        return
    await loop.sock_sendall(sock, _LENGTH.pack(len(payload)))
    await loop.sock_sendall(sock, payload)


async def receive_frame_async(sock: socket.socket) -> Any:
    """Return the next object from a non-blocking socket.

    Raises:
        EOFError: the other end is closed.
    """
    (size,) = _LENGTH.unpack(await _exactly_async(sock, _LENGTH.size))
    return pickle.loads(await _exactly_async(sock, size))


def _exactly(sock: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        count = sock.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return buffer


async def _exactly_async(sock: socket.socket, size: int) -> bytearray:
    loop = asyncio.get_running_loop()
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        count = await loop.sock_recv_into(sock, view[got:])
        if not count:
            raise EOFError
        got += count
    return buffer
