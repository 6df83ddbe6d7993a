"""A hook that refuses network access. tests/test_privacy.py puts it on PYTHONPATH of every process that it starts.

Each attempt to connect, send or look a name up adds a line to the file in $RSI_NO_NETWORK and fails as without a
network. Python's audit events are the hook: they come before the call, in every library that uses the socket module.
"""

import os
import socket
import sys

RECORD = os.environ.get("RSI_NO_NETWORK", "")
LOOK_UPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
CONNECTIONS = {"socket.connect", "socket.sendto", "socket.sendmsg"}


def refuse(event, arguments):
    """Raise for network access; sockets with a file's name (AF_UNIX) stay."""
    local = event in CONNECTIONS and arguments[0].family == getattr(socket, "AF_UNIX", None)
    if event in LOOK_UPS or (event in CONNECTIONS and not local):
        with open(RECORD, "a", encoding="utf-8") as record:
            record.write(f"{event} {arguments[0 if event in LOOK_UPS else 1]}\n")
        raise OSError(101, "the network is blocked")


if RECORD and __name__ == "sitecustomize":
    sys.addaudithook(refuse)
