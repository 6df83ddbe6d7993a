"""The bundle: a folder that appears whole under its name, or not at all.

    DIR/model.onnx  [model.onnx.data]     the compressed model
    DIR/report.json                       everything that was decided and measured
    DIR/report.html                       the same to look at, offline
    DIR/README.md                         the model card
    DIR/manifest.json                     sha256 and size of every file, written last

Everything is written into `.DIR.partial-XXXX` beside it, which takes the name in one rename at the end. Whatever ends
the work early (an error, Ctrl-C, a full disk) removes that folder and leaves the old bundle as it was.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rsi_deploy.errors import UsageError


def check_target(path: Path, *, force: bool) -> None:
    """Refuse, before any long work, a target that would overwrite something.

    Raises:
        UsageError: a file, or a folder that is not empty without `force`.
    """
    if path.is_file():
        raise UsageError(f"{path} is a file; -o takes a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UsageError(f"{path} is not empty; choose another folder, or add --force to replace it")
    parent = path.resolve().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"cannot write into {existing}; choose another folder for -o")


@contextlib.contextmanager
def whole_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A working folder that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: the final name.
        force: replace a folder that is there and not empty.

    Raises:
        UsageError: see `check_target`; it is checked again at the end, since hours may lie between.
    """
    check_target(path, force=force)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield work
        check_target(path, force=force)
        os.chmod(work, 0o755)  # mkdtemp's 0700 would hide the bundle from a server's user
        _replace(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(work: Path, path: Path) -> None:
    """Rename `work` to `path`; what was there is moved aside first and comes back if the rename fails."""
    if not path.exists():
        os.replace(work, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.replaced-", dir=path.parent))
    try:
        os.replace(path, aside / "old")
        os.replace(work, path)
    except BaseException:
        if not path.exists():
            os.replace(aside / "old", path)
        with contextlib.suppress(OSError):
            aside.rmdir()  # empty by now; never a tree that may still hold the only copy
        raise
    shutil.rmtree(aside, ignore_errors=True)
