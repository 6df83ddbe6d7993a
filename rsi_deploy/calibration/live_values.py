"""A store for the values that one stage of a run passes to the next: in memory up to a limit, then on disk.

A file that is read again soon stays in the page cache of the operating system, so the disk costs little time.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from rsi_deploy.io.locks import ScratchFolder

MEMORY_LIMIT = 4 * 2**20


class _Stored(NamedTuple):
    """An array in a file that holds its raw bytes."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def load(self) -> Any:
        return np.fromfile(self.path, self.dtype, math.prod(self.shape)).reshape(self.shape)


class LiveValues:
    """A store of arrays by (batch, name). A `with` statement deletes its files at the end.

    Args:
        limit: bytes kept in memory. Further arrays go to temporary files, except strings and sequences of arrays.
    """

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self._limit = limit
        self._bytes = 0
        self._free: dict[int, list[Path]] = {}  # files by size, reused because their pages are in the cache
        self._count = 0
        self._values: dict[tuple[int, str], Any] = {}  # an array, a sequence of arrays, or a `_Stored`
        self._folder = ScratchFolder()

    def __enter__(self) -> "LiveValues":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values.clear()
        self._folder.cleanup()

    def put(self, batch: int, values: Mapping[str, Any]) -> None:
        """Store values of a batch; they replace earlier ones of the same names."""
        for name, value in values.items():
            self.drop(batch, [name])
            plain = isinstance(value, np.ndarray) and not value.dtype.hasobject
            if not plain or self._bytes + _bytes_of(value) <= self._limit:
                self._bytes += _bytes_of(value)
                self._values[batch, name] = value
                continue
            self._values[batch, name] = self._stored(value)

    def has(self, batch: int, name: str) -> bool:
        """Return whether a value is stored."""
        return (batch, name) in self._values

    def get(self, batch: int, names: Iterable[str]) -> dict[str, Any]:
        """Return values of a batch by name."""
        values = ((name, self._values[batch, name]) for name in names)
        return {name: value.load() if isinstance(value, _Stored) else value for name, value in values}

    def drop(self, batch: int, names: Iterable[str]) -> None:
        """Remove values of a batch, if they are stored."""
        for name in names:
            value = self._values.pop((batch, name), None)
            if isinstance(value, _Stored):
                self._free.setdefault(value.path.stat().st_size, []).append(value.path)
            elif value is not None:
                self._bytes -= _bytes_of(value)

    def keep_only(self, batch: int, names: Iterable[str]) -> None:
        """Remove all values of a batch except these."""
        kept = set(names)
        self.drop(batch, [name for number, name in list(self._values) if number == batch and name not in kept])

    def _stored(self, value: Any) -> _Stored:
        if same := self._free.pop(value.nbytes, None):
            path = same.pop()
            self._free |= {value.nbytes: same} if same else {}
        else:
            self._remove_one()
            path = Path(self._folder.name) / str(self._count)
            path.touch()
            self._count += 1
        with path.open("r+b") as file:
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b"")
        return _Stored(path, value.dtype, value.shape)

    def _remove_one(self) -> None:
        """Delete one free file, so that there are never more files than values."""
        for size, paths in self._free.items():
            paths.pop().unlink()
            if not paths:
                del self._free[size]
            return


def _bytes_of(value: Any) -> int:
    return sum(map(_bytes_of, value)) if isinstance(value, list) else int(value.nbytes)
