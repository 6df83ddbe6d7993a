"""Atomic output: a file or folder appears under its name complete, or not at all.

    folder   .NAME.partial/lock       locked by the run that writes NAME; the system releases it when that run dies
                          /new        the new content, which gets the name in one rename
                          /old        the previous content, where the system cannot exchange two folders
                          /kept       finished results for the next run (`rsi_deploy.execution.result_store`)
    file     .NAME.partial-XXXXXXXX   locked while it is written, then renamed

All content is flushed to disk (fsync) before a rename. A run that ends early removes its partial files, except after
kill -9: then the lock is free, and the next run removes them.
"""

import contextlib
import ctypes
import errno
import functools
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy.core.errors import RsiDeployError, UsageError
from rsi_deploy.io.locks import deferred_signals, is_still_at, remove, remove_if_stale, take_lock

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error codes for a write that fails because the disk is full or a quota or file size limit is reached."""

_AT_FDCWD, _EXCHANGE = -100, 2  # arguments of Linux's renameat2


@dataclass(frozen=True, kw_only=True)
class OutputClaim:
    """The exclusive right of this run to write one folder.

    Attributes:
        target: final path, resolved.
        place: hidden folder beside the target in which the new content is built.
    """

    target: Path
    place: Path

    @property
    def new(self) -> Path:
        """Folder that becomes the target."""
        return self.place / "new"

    @property
    def old(self) -> Path:
        """Place of the previous target between two renames."""
        return self.place / "old"

    @property
    def kept(self) -> Path:
        """Finished results that survive a killed run."""
        return self.place / "kept"

    def deliver(self) -> None:
        """Rename `new` to the target; the previous content moves to `new` or `old` and is removed with the claim."""
        os.chmod(self.new, 0o755)  # readable for a server's user, whatever the umask
        sync_tree(self.new)
        if not self.target.exists():
            os.rename(self.new, self.target)
        elif not exchange(self.new, self.target):
            os.rename(self.target, self.old)
            try:
                os.rename(self.new, self.target)
            except BaseException:
                self.recover()
                raise
        _sync(self.target.parent)

    def set_aside(self) -> None:
        """Move the previous target away in one step; it is removed with the claim."""
        os.rename(self.target, self.old)

    def recover(self) -> None:
        """Move the previous target back if it was set aside and nothing replaced it."""
        if self.old.exists() and not self.target.exists():
            os.rename(self.old, self.target)

    def clear(self, *, kept: bool) -> None:
        """Empty the hidden folder except for the lock; `kept` says whether finished results are removed too."""
        self.recover()
        for path in self.place.iterdir():
            if path.name != "lock" and (kept or path.name != "kept"):
                remove(path)

    def end(self, *, kept: bool) -> None:
        """Remove the hidden folder, except for finished results unless `kept` is true."""
        self.clear(kept=kept)
        if not self.kept.exists():
            (self.place / "lock").unlink()
            self.place.rmdir()


@contextlib.contextmanager
def claim_output(target: Path) -> Iterator[OutputClaim]:
    """Keep other runs away from `target` while the block runs.

    Leftovers of a killed run are removed first, except finished results. Those are removed when the block succeeds or
    ends with an `RsiDeployError`; after a crash, a full disk or a signal they stay for the next run.

    Raises:
        UsageError: Another run is writing the target.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    claim = OutputClaim(target=target, place=target.with_name(f".{target.name}.partial"))
    done = False
    with contextlib.ExitStack() as held:
        held.enter_context(deferred_signals())
        handle = _locked(claim)
        held = held.pop_all()
    try:
        held.close()  # a deferred signal is raised here
        claim.clear(kept=False)
        yield claim
        done = True
    except RsiDeployError:
        done = True
        raise
    except BaseException as error:
        _add_notes(error, claim)
        raise
    finally:
        with deferred_signals():
            with contextlib.suppress(OSError):
                claim.end(kept=done)
            os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` when the block succeeds and removed when it fails.

    Args:
        path: final path; a file or link there is replaced in one step, the target of a link stays as it is.
        durable: whether to flush the file to disk before the rename; caches do not need it.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        remove_if_stale(stale)
    with contextlib.ExitStack() as held:
        held.enter_context(deferred_signals())
        work, handle = _locked_file(path)
        held = held.pop_all()
    try:
        held.close()
        yield work
        os.chmod(work, 0o666 & ~_umask())
        if durable:
            _sync(work)
        os.replace(work, path)
        if durable:
            _sync(path.parent)
    finally:
        with deferred_signals():
            work.unlink(missing_ok=True)
            os.close(handle)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a UTF-8 text file completely or not at all; see `atomic_file`."""
    with atomic_file(path, durable=durable) as work:
        work.write_text(text, encoding="utf-8", newline="\n")


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths of one file system in one step; return False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE) == 0)


def sync_tree(folder: Path) -> None:
    """Flush all files of a folder, and the folder itself, to disk."""
    for here, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(here) / name)
        _sync(Path(here))


def _add_notes(error: BaseException, claim: OutputClaim) -> None:
    """Add to an error how much disk space was used and left, and where finished results are kept."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        written = sum(path.stat().st_size for path in claim.place.rglob("*") if path.is_file())
        free = shutil.disk_usage(claim.place).free
        room = f"{written / 1e6:,.1f} MB of {claim.target} were written and {free / 1e6:,.1f} MB are free there"
        error.add_note(f"{room}: free some space, or choose another disk")
    if claim.kept.exists():
        error.add_note(f"finished results are kept: run the same command to continue, rm -r {claim.place} to drop them")


def _locked(claim: OutputClaim) -> int:
    """Return the open, locked lock file of a claim.

    Raises:
        UsageError: Another run holds it, or the file system has no locks and the hidden folder exists already.
    """
    path = claim.place / "lock"
    while True:
        try:
            claim.place.mkdir()
            fresh = True
        except FileExistsError:
            fresh = False
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another run just ended and removed it
            continue
        except NotADirectoryError:
            raise UsageError(f"{claim.place} is in the way: remove it, or choose another folder") from None
        except OSError:  # a full disk
            if fresh:
                claim.place.rmdir()
            raise
        got = take_lock(handle)
        if got is False:
            process = os.pread(handle, 20, 0).decode(errors="replace").strip()
            os.close(handle)
            raise UsageError(
                f"another run{f' (process {process})' * bool(process)} is writing {claim.target} now: "
                f"wait for it, or choose another folder"
            )
        if got is None and not fresh:
            os.close(handle)
            raise UsageError(
                f"{claim.place} exists, from a killed run or one that is still working (the file system has no locks "
                "to "
                "tell which)",
                hint="remove it if no other run is active, or choose another folder",
            )
        if got is None or is_still_at(handle, path):
            with contextlib.suppress(OSError):  # on a full disk the process number is left out
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        os.close(handle)


def _locked_file(path: Path) -> tuple[Path, int]:
    """Create a temporary file beside `path` and lock it; return its path and open handle."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        if take_lock(handle, wait=True) is None or is_still_at(handle, Path(name)):
            return Path(name), handle
        os.close(handle)  # another run removed it as stale before it was locked


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, or sync a file opened for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync need none
            raise
    finally:
        os.close(handle)


@functools.cache
def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
