"""Signals that end a command, made exceptions: so that whatever it was making is taken away on the way out."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class EndedError(BaseException):
    """A signal has ended the command. It is no `Exception`, so that no handler of failures catches it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = signal.Signals(number)
        super().__init__(self.number.name)

    @property
    def exit_code(self) -> int:
        """Return the exit code that a shell reports for a command that the signal has ended."""
        return 128 + self.number


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise `EndedError`, unless somebody has seen to them already (as `nohup` does)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    raise EndedError(number)
