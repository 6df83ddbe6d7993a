"""The access log: one JSON object a line, written by a thread, so that a reader who stops reading stops no request."""

import collections
import datetime
import threading
from io import RawIOBase
from typing import Any

import orjson

MOST_LINES = 10_000


class AccessLog:
    """A log that never blocks; lines that nobody takes are dropped and counted.

    Args:
        stream: where the lines go, unbuffered: a buffer's lock would hold up who closes it; None writes none.

    Attributes:
        lost: lines that were dropped.
    """

    def __init__(self, stream: RawIOBase | None):
        self._stream, self.lost = stream, 0
        self._lines: collections.deque[dict[str, Any]] = collections.deque()
        self._more, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._write, name="access log", daemon=True)
        if stream is not None:
            self._thread.start()

    def note(self, **entry: Any) -> None:
        """One line; the time is added."""
        if self._stream is None:
            return
        if len(self._lines) >= MOST_LINES:
            self.lost += 1
            return
        self._lines.append({"time": datetime.datetime.now(datetime.UTC), **entry})
        self._more.set()

    def close(self) -> None:
        """Write what is left, as far as it goes within a second."""
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
