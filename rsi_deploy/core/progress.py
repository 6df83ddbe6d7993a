"""What a long run is doing: its steps as they begin and end, and how far one has come, for whoever listens.

with listening(listener):              the command line does; functions that are called from Python have no listener
    with step("calibrate and plan"):
        at("features.3", 12, 57)       the 13th of 57 begins
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Listener(Protocol):
    """Is called for every step."""

    def begin(self, name: str) -> None:
        """A step begins, perhaps within another one."""

    def end(self, name: str) -> None:
        """The innermost step ends, or fails."""

    def at(self, what: str, index: int, total: int) -> None:
        """Within the step, number `index` of `total` pieces of work begins; the first one is 0."""


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, steps of this thread are told to the listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def step(name: str) -> Iterator[None]:
    """One step of a run."""
    listener = _listener.get()
    if listener is None:
        yield
        return
    listener.begin(name)
    try:
        yield
    finally:
        listener.end(name)


def at(what: str, index: int, total: int) -> None:
    """Number `index` of `total` pieces of the step's work begins."""
    if (listener := _listener.get()) is not None:
        listener.at(what, index, total)


def at_samples(done: int, total: int) -> None:
    """So many samples of the step's data are done."""
    at("samples", done, total)
