"""Who is at work on a file or folder: a lock that the system lets go of when its process dies, however it dies.

So what a killed run has left is told from what a living one is making, and the next run may remove it. Also the
temporary folders of the system's own place for them:

    TMP/rsi-deploy-scratch-XXXXXXXX      locked as long as it is used
"""

import contextlib
import functools
import logging
import os
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: no locks, so that leftovers are the user's to remove
    fcntl = None  # type: ignore[assignment]

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SCRATCH = "rsi-deploy-scratch-"
log = logging.getLogger(__name__)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Have signals that Python would raise wait until the block has ended; they are raised then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    for number in ENDING:
        if callable(handler := signal.getsignal(number)):
            before[number] = handler
            signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in came[:1]:
            before[number](number, frame)


def take_lock(handle: int, *, wait: bool = False) -> bool | None:
    """Take the lock of an open file or folder: whether it was got; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        log.info("no locks here: %s", error)
        return None
    return True


def remove_if_stale(path: Path) -> None:
    """Remove a temporary file or folder that no living run holds."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            if take_lock(handle):
                remove(path)
        finally:
            os.close(handle)


@functools.cache
def _clear_scratch(folder: str) -> None:
    """Remove the scratch folders that killed runs have left; once a process."""
    for path in Path(folder).glob(f"{SCRATCH}*"):
        remove_if_stale(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file still stands under its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder of the system that the next run removes where this one is killed."""

    def __init__(self) -> None:
        _clear_scratch(tempfile.gettempdir())
        while True:
            super().__init__(prefix=SCRATCH)
            try:
                handle = os.open(self.name, os.O_RDONLY)
            except FileNotFoundError:  # another run took it for a leftover before it was opened
                self.cleanup()
                continue
            if take_lock(handle, wait=True) is None or is_at(handle, Path(self.name)):
                break
            os.close(handle)  # or before it was locked
            self.cleanup()
        weakref.finalize(self, os.close, handle)
