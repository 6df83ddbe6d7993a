"""The clients of `bench.serving`, in a process of their own: binary tensors over HTTP, every answer checked.

    closed loop    `--clients N`: each sends its next request after the answer, or after Retry-After of a refusal
    open loop      `--rate R`: requests come as a Poisson process and wait for no answer; latency counts from when a
                   request was due

Prints one JSON object: what came back (by status), wrong and lost answers, seconds, and latencies of answers in ms.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DATATYPES = {"float32": "FP32", "int64": "INT64"}
TOLERANCE = 1e-3
"""Of the largest value: another batch is another order of sums."""


@dataclass(kw_only=True)
class Heard:
    """The answers and failures that the clients have counted."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    lost: int = 0
    latencies: list[float] = field(default_factory=list)
    events: list[tuple[float, bool]] = field(default_factory=list)


class Client:
    """A client with one persistent connection, which is opened again when it is lost."""

    def __init__(self, host: str, port: int, requests: Sequence[bytes], expected: Any, heard: Heard):
        self._address, self._requests, self._wanted, self._heard = (host, port), requests, expected, heard
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, row: int, due: float) -> float:
        """One request; what comes of it is noted, whatever it is.

        Returns:
            seconds that the server asks to wait; 0 where it names none.
        """
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(*self._address)
            reader, writer = self._streams
            writer.write(self._requests[row])
            status, content, length, pause = await answer(reader)
        except (OSError, asyncio.IncompleteReadError):
            self._heard.lost += 1
            self._streams = None
            return 0.0
        now = time.perf_counter()
        self._heard.statuses[str(status)] += 1
        self._heard.events.append((now, status == 200))
        if status == 200:
            self._heard.latencies.append(now - due)
            found = np.frombuffer(content[length:], np.float32)
            far = np.abs(found - self._wanted[row]).max() if found.shape == self._wanted[row].shape else np.inf
            self._heard.wrong += not far <= TOLERANCE * np.abs(self._wanted[row]).max()
        return pause


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes, int, float]:
    """Status, body, the bytes of JSON before the tensors, and what Retry-After says."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    body = await reader.readexactly(int(headers["content-length"]))
    length, pause = int(headers.get("inference-header-content-length", 0)), float(headers.get("retry-after", 0))
    return int(lines[0].split(" ")[1]), body, length, pause


def encoded(path: str, feeds: dict[str, Any], output: str, host: str) -> bytes:
    """Return one HTTP request with binary tensors."""
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": DATATYPES[str(array.dtype)],
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in feeds.items()
    ]
    outputs = [{"name": output, "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    body = head + b"".join(array.tobytes() for array in feeds.values())
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    lines.append(f"Inference-Header-Content-Length: {len(head)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def closed(clients: Sequence[Client], rows: int, seconds: float) -> None:
    """Every client asks again when it has been answered."""
    end = time.perf_counter() + seconds

    async def one(number: int, client: Client) -> None:
        step = number
        while (now := time.perf_counter()) < end:
            await asyncio.sleep(await client.ask(step % rows, now))
            step += len(clients)

    await asyncio.gather(*(one(number, client) for number, client in enumerate(clients)))


async def opened(clients: list[Client], rows: int, seconds: float, rate: float, seed: int) -> None:
    """Requests come when they are due; each takes a client that is free."""
    rng, start, due, number = np.random.default_rng(seed), time.perf_counter(), 0.0, 0
    tasks = []

    async def one(row: int, when: float) -> None:
        client = clients.pop()
        await client.ask(row, when)
        clients.append(client)

    while (due := due + rng.exponential(1 / rate)) < seconds:
        await asyncio.sleep(max(start + due - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(one(number % rows, start + due)))
        number += 1
    await asyncio.gather(*tasks)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("address", metavar="HOST:PORT")
    options.add_argument("model")
    options.add_argument("data", type=Path, help=".npz: one array for each input, and `expected`, its rows' outputs")
    options.add_argument("--output", required=True, metavar="NAME")
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: closed loop")
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    host, _, port = args.address.rpartition(":")
    data = dict(np.load(args.data))
    expected = data.pop("expected")
    path, heard = f"/v2/models/{args.model}/infer", Heard()
    requests = [
        encoded(path, {name: array[row : row + 1] for name, array in data.items()}, args.output, host)
        for row in range(len(expected))
    ]
    count = 1000 if args.rate else args.clients
    clients = [Client(host, int(port), requests, expected.reshape(len(expected), -1), heard) for _ in range(count)]
    start = time.perf_counter()
    if args.rate:
        asyncio.run(opened(clients, len(expected), args.seconds, args.rate, args.seed))
    else:
        asyncio.run(closed(clients, len(expected), args.seconds))
    print(json.dumps(report(heard, start, time.perf_counter())))


def report(heard: Heard, start: float, end: float) -> dict[str, Any]:
    """The clients' report."""
    latencies = 1e3 * np.asarray(heard.latencies or [np.nan])
    refused = [when - start for when, fine in heard.events if not fine]
    return {
        "statuses": dict(heard.statuses),
        "wrong": heard.wrong,
        "lost": heard.lost,
        "seconds": end - start,
        "answered_a_second": heard.statuses["200"] / (end - start),
        "ms": {f"p{p}": float(np.percentile(latencies, p)) for p in (50, 90, 99)} | {"max": float(latencies.max())},
        "last_refusal_at": max(refused, default=0.0),
    }


if __name__ == "__main__":
    main()
