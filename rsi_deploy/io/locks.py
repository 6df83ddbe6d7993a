"""File locks, which the system releases when a process dies, and deferred signals.

A lock tells whether the run that wrote a temporary file or folder is still alive; if not, the next run removes it.

    TMP/rsi-deploy-scratch-XXXXXXXX      scratch folder, locked while it is used
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
except ImportError:  # Windows: no locks; the user removes leftovers
    fcntl = None  # type: ignore[assignment]

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SCRATCH = "rsi-deploy-scratch-"
log = logging.getLogger(__name__)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP until the block has ended; the first one is handled then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    for number in ENDING:
        if callable(handler := signal.getsignal(number)):
            before[number] = handler
            signal.signal(number, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in received[:1]:
            before[number](number, frame)


def take_lock(handle: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder; return whether it worked, or None where locks are not supported."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        log.info("locks are not supported: %s", error)
        return None
    return True


def remove_if_stale(path: Path) -> None:
    """Remove a temporary file or folder unless a running process has locked it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            if take_lock(handle):
                remove(path)
        finally:
            os.close(handle)


@functools.cache
def _clear_scratch(folder: str) -> None:
    """Remove the scratch folders of killed runs, once per process."""
    for path in Path(folder).glob(f"{SCRATCH}*"):
        remove_if_stale(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_still_at(handle: int, path: Path) -> bool:
    """Return whether `path` still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder that the next run removes if this one is killed."""

    def __init__(self) -> None:
        _clear_scratch(tempfile.gettempdir())
        while True:
            super().__init__(prefix=SCRATCH)
            try:
                handle = os.open(self.name, os.O_RDONLY)
            except FileNotFoundError:  # another run removed it as stale before it was opened
                self.cleanup()
                continue
            if take_lock(handle, wait=True) is None or is_still_at(handle, Path(self.name)):
                break
            os.close(handle)  # another run removed it before it was locked
            self.cleanup()
        weakref.finalize(self, os.close, handle)
