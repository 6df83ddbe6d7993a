"""The one way in which files and folders appear: whole under their name, or not at all.

    folder   .NAME.partial/lock       held by the run that makes NAME; the system lets go of it when that run dies
                          /new        what is being made: it takes the name in one rename
                          /old        what stood there, where the system cannot exchange two folders
                          /kept       finished work, for the next run (`rsi_deploy.execution.result_store`)
    file     .NAME.partial-XXXXXXXX   locked while it is written, then renamed

Before a rename everything is on the disk (fsync). Whatever ends the work early takes it away, kill -9 alone excepted:
what that leaves is told from a living run's work by its lock, which nobody holds any more, and the next run removes it.
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
from rsi_deploy.io.locks import held_signals, is_at, remove, remove_if_stale, take_lock

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says where the disk, a quota or a limit on files does not let a write be done."""

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


@dataclass(frozen=True, kw_only=True)
class OutputClaim:
    """A folder that this run alone may make.

    Attributes:
        target: its final name, resolved.
        place: the hidden folder beside it in which the work is done.
    """

    target: Path
    place: Path

    @property
    def new(self) -> Path:
        """What is to become the target."""
        return self.place / "new"

    @property
    def old(self) -> Path:
        """What stood there, for the moment between two renames."""
        return self.place / "old"

    @property
    def kept(self) -> Path:
        """Finished work that outlives this run if it is killed."""
        return self.place / "kept"

    def deliver(self) -> None:
        """Give `new` the target's name; what stands there is `new` then, or `old`, and goes when the claim ends."""
        os.chmod(self.new, 0o755)  # whatever the umask: a bundle is for a server's user too
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
        """Move what stands there away in one step; it goes when the claim ends."""
        os.rename(self.target, self.old)

    def recover(self) -> None:
        """Bring back what stood there, where it was moved aside and nothing has come in its place."""
        if self.old.exists() and not self.target.exists():
            os.rename(self.old, self.target)

    def clear(self, *, kept: bool) -> None:
        """Remove what lies in the hidden folder but for the lock, and `kept` too if told so."""
        self.recover()
        for path in self.place.iterdir():
            if path.name != "lock" and (kept or path.name != "kept"):
                remove(path)

    def end(self, *, kept: bool) -> None:
        """Remove the hidden folder, or all of it but for `kept`, where there is some and it is not told to go."""
        self.clear(kept=kept)
        if not self.kept.exists():
            (self.place / "lock").unlink()
            self.place.rmdir()


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[OutputClaim]:
    """Keep all other runs away from `target` for as long as the block lasts.

    What a killed run has left of it is removed first, but for finished work. That is removed when the block ends well
    or with an error of the request itself; a crash, a full disk or a signal leaves it for the next run.

    Raises:
        UsageError: another run is making it.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    claim = OutputClaim(target=target, place=target.with_name(f".{target.name}.partial"))
    over = False
    with contextlib.ExitStack() as held:
        held.enter_context(held_signals())
        handle = _locked(claim)
        held = held.pop_all()
    try:
        held.close()  # a signal that came meanwhile is raised here
        claim.clear(kept=False)
        yield claim
        over = True
    except RsiDeployError:
        over = True
        raise
    except BaseException as error:
        _note(error, claim)
        raise
    finally:
        with held_signals():
            with contextlib.suppress(OSError):
                claim.end(kept=over)
            os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write a file at, which becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: the final name; what is there is replaced in one step, and a link itself rather than what it points to.
        durable: on the disk before it has its name; not for caches, which may as well be lost.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        remove_if_stale(stale)
    with contextlib.ExitStack() as held:
        held.enter_context(held_signals())
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
        with held_signals():
            work.unlink(missing_ok=True)
            os.close(handle)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file in UTF-8, whole or not at all; see `whole_file`."""
    with whole_file(path, durable=durable) as work:
        work.write_text(text, encoding="utf-8", newline="\n")


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths of one file system in one step; False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(call(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0)


def sync_tree(folder: Path) -> None:
    """Have the disk hold every file of the folder, and the folders themselves."""
    for here, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(here) / name)
        _sync(Path(here))


def _note(error: BaseException, claim: OutputClaim) -> None:
    """Have an error that ended the work early say how much room there was, and what of the work is left."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        written = sum(path.stat().st_size for path in claim.place.rglob("*") if path.is_file())
        free = shutil.disk_usage(claim.place).free
        room = f"{written / 1e6:,.1f} MB of {claim.target} were written and {free / 1e6:,.1f} MB are free there"
        error.add_note(f"{room}: make room, or choose another disk")
    if claim.kept.exists():
        error.add_note(f"finished work is kept: the same command goes on from it, rm -r {claim.place} drops it")


def _locked(claim: OutputClaim) -> int:
    """The open lock of a claim.

    Raises:
        UsageError: a living run holds it; or nobody can tell, as the file system has no locks.
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
        except FileNotFoundError:  # another run has just ended and removed it
            continue
        except NotADirectoryError:
            raise UsageError(f"{claim.place} is in the way: remove it, or choose another folder") from None
        except OSError:  # a full disk
            if fresh:
                claim.place.rmdir()
            raise
        got = take_lock(handle)
        if got is False:
            said = os.pread(handle, 20, 0).decode(errors="replace").strip()
            os.close(handle)
            raise UsageError(
                f"another run{f' (process {said})' * bool(said)} is making {claim.target} now: wait for it, or choose "
                f"another folder"
            )
        if got is None and not fresh:
            os.close(handle)
            raise UsageError(
                f"{claim.place} is there, of a run that was killed or one that is at work: its file system has no "
                f"locks to tell. Remove it if no run is, or choose another folder"
            )
        if got is None or is_at(handle, path):
            with contextlib.suppress(OSError):  # a full disk: nobody is told the number then
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        os.close(handle)


def _locked_file(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, and its open lock."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        if take_lock(handle, wait=True) is None or is_at(handle, Path(name)):
            return Path(name), handle
        os.close(handle)  # another run took it for a leftover before it was locked


def _sync(path: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there, nor a file synced that is only read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what has no such thing needs none
            raise
    finally:
        os.close(handle)


@functools.cache
def _umask() -> int:
    """What the process takes away from a new file's rights."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
