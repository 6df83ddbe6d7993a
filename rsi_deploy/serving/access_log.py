"""The access log: one JSON object a line. A thread writes it, so a slow reader of the log does not delay requests."""

import collections
import datetime
import threading
from io import RawIOBase
from typing import Any

import orjson

MAX_LINES = 10_000


class AccessLog:
    """A log that never blocks. Lines that cannot be written in time are dropped and counted.

    Args:
        stream: unbuffered output (closing a buffered one may wait for its lock); None disables the log.

    Attributes:
        lost: number of dropped lines.
    """

    def __init__(self, stream: RawIOBase | None):
        self._stream, self.lost = stream, 0
        self._lines: collections.deque[dict[str, Any]] = collections.deque()
        self._more, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._write, name="access log", daemon=True)
        if stream is not None:
            self._thread.start()

    def note(self, **entry: Any) -> None:
        """Append one line, with the current time."""
        if self._stream is None:
            return
        if len(self._lines) >= MAX_LINES:
            self.lost += 1
            return
        self._lines.append({"time": datetime.datetime.now(datetime.UTC), **entry})
        self._more.set()

    def close(self) -> None:
        """Write the remaining lines, for at most one second."""
        self._ended = True
        self._more.set()
        if self._stream is not None:
            self._thread.join(timeout=1.0)

    def _write(self) -> None:
        assert self._stream is not None
        while not (self._ended and not self._lines):
            self._more.wait()
            self._more.clear()
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            text = memoryview(b"".join(orjson.dumps(line) + b"\n" for line in lines))
            try:
                while text:
                    text = text[self._stream.write(text) or 0 :]
            except (OSError, ValueError):
                self.lost += len(lines)
