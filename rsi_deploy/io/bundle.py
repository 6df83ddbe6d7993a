"""The bundle: a folder that appears whole under its name, or not at all.

    DIR/model.onnx  [model.onnx.data]     the compressed model
    DIR/report.json                       everything that was decided and measured
    DIR/report.html                       the same to look at, offline
    DIR/README.md                         the model card
    DIR/manifest.json                     sha256 and size of every file, written last

Everything is written into a hidden folder beside it (see `rsi_deploy.io.atomic`), which takes the name in one rename at
the end. Whatever ends the work early (an error, Ctrl-C, a full disk) removes it and leaves the old bundle as it was.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.atomic import claimed


def check_target(path: Path, *, force: bool, inputs: Sequence[object] = ()) -> None:
    """Refuse, before any long work, a target that would overwrite something.

    Args:
        path: the folder to be.
        force: whether one that is not empty is replaced.
        inputs: what the work reads; those that are paths must not go with it.

    Raises:
        UsageError: a file, a folder that is not empty without `force`, one that holds an input or lies in one, or one
            that cannot be replaced at all.
    """
    if path.is_file():
        raise UsageError(f"{path} is a file; -o takes a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UsageError(f"{path} is not empty; choose another folder, or add --force to replace it")
    if path.is_mount() or path.resolve().parent == path.resolve():
        raise UsageError(f"{path} is a mount point, which cannot be replaced whole; name a folder in it for -o")
    parent = path.resolve().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"cannot write into {existing}; choose another folder for -o")
    for given in inputs:
        _check_input(path, given)


def _check_input(path: Path, given: object) -> None:
    """Refuse a target whose replacing would take an input with it, by whatever name either is called."""
    if not isinstance(given, str | Path) or not path.exists() or not path.is_dir() or not any(path.iterdir()):
        return
    name = str(given).partition("#")[0]  # data may be told with a choice of columns
    if not name or not os.path.exists(name):
        return
    target, source = path.resolve(), Path(name).resolve()
    if source.is_relative_to(target) or (source.is_dir() and target.is_relative_to(source)):
        raise UsageError(f"{path} holds {given}, which is read: --force would remove it; choose another folder for -o")


@contextlib.contextmanager
def whole_folder(path: Path, *, force: bool = False, inputs: Sequence[object] = ()) -> Iterator[Path]:
    """A working folder that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: the final name.
        force: replace a folder that is there and not empty.
        inputs: as for `check_target`.

    Raises:
        UsageError: see `check_target`, which is asked again at the end, since hours may lie between; or another run
            is making the folder.
    """
    check_target(path, force=force, inputs=inputs)
    with claimed(path) as claim:
        check_target(path, force=force)  # what a killed run had moved aside is there again
        claim.new.mkdir()
        yield claim.new
        check_target(path, force=force)
        claim.deliver()


def kept_beside(work: Path) -> Path:
    """Where finished work lies that outlives a killed run, for the working folder of `whole_folder`."""
    return work.parent / "kept"
