"""The values that flow between two waves of a run, a batch each: in memory while they are few, then on disk."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

MEMORY_LIMIT = 32 * 2**20


class LiveValues:
    """Arrays by (batch, name). Use it in a `with`: the files go when it ends.

    Args:
        limit: bytes kept in memory; what comes beyond goes to temporary files, but for strings and sequences of arrays.
    """

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self._limit = limit
        self._bytes = 0
        self._count = 0
        self._values: dict[tuple[int, str], Any] = {}  # an array, a sequence of them, or where one is stored
        self._folder = tempfile.TemporaryDirectory(prefix="rsi-deploy-live-")

    def __enter__(self) -> "LiveValues":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values.clear()
        self._folder.cleanup()

    def put(self, batch: int, values: Mapping[str, Any]) -> None:
        """Keep these values of a batch, in place of those of the same names."""
        for name, value in values.items():
            self.drop(batch, [name])
            plain = isinstance(value, np.ndarray) and not value.dtype.hasobject
            if not plain or self._bytes + _bytes_of(value) <= self._limit:
                self._bytes += _bytes_of(value)
                self._values[batch, name] = value
                continue
            path = Path(self._folder.name) / f"{self._count}.npy"
            self._count += 1
            np.save(path, value, allow_pickle=False)
            self._values[batch, name] = path

    def has(self, batch: int, name: str) -> bool:
        """Whether a value is there."""
        return (batch, name) in self._values

    def get(self, batch: int, names: Iterable[str]) -> dict[str, Any]:
        """These values of a batch."""
        found = {}
        for name in names:
            value = self._values[batch, name]
            found[name] = np.load(value, allow_pickle=False) if isinstance(value, Path) else value
        return found

    def drop(self, batch: int, names: Iterable[str]) -> None:
        """Forget these values of a batch, where they are there."""
        for name in names:
            value = self._values.pop((batch, name), None)
            if isinstance(value, Path):
                value.unlink()
            elif value is not None:
                self._bytes -= _bytes_of(value)

    def keep_only(self, batch: int, names: Iterable[str]) -> None:
        """Forget all values of a batch but these."""
        wanted = set(names)
        self.drop(batch, [name for number, name in list(self._values) if number == batch and name not in wanted])


def _bytes_of(value: Any) -> int:
    return sum(map(_bytes_of, value)) if isinstance(value, list) else int(value.nbytes)
