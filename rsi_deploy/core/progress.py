"""Progress of a long run: its steps, and how far each has come, reported to a listener.

with listening(listener):              the command line does this; calls from Python have no listener
    with step("calibrate and plan"):
        at("features.3", 12, 57)       the 13th of 57 begins
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Listener(Protocol):
    """Receives the progress of a run."""

    def begin(self, name: str) -> None:
        """Handle the begin of a step, possibly within another one."""

    def end(self, name: str) -> None:
        """Handle the end or failure of the innermost step."""

    def at(self, what: str, index: int, total: int) -> None:
        """Handle the begin of piece `index` (from 0) of `total` in the step."""


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report steps of this thread to the listener while the block runs."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Report the block as one step of a run."""
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
    """Report that piece `index` (from 0) of the step's `total` begins."""
    if (listener := _listener.get()) is not None:
        listener.at(what, index, total)


def at_samples(done: int, total: int) -> None:
    """Report how many samples of the step's data are done."""
    at("samples", done, total)
