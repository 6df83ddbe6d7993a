"""The bundle: an output folder that appears complete under its name, or not at all.

    DIR/model.onnx  [model.onnx.data]     compressed model
    DIR/report.json                       all decisions and measurements
    DIR/report.html                       the report as a page that works offline
    DIR/README.md                         model card
    DIR/manifest.json                     sha256 and size of every file, written last

A hidden folder beside it (see `rsi_deploy.io.atomic`) is filled first and renamed at the end. If the work ends early
(an error, Ctrl-C, a full disk), the hidden folder is removed and the old bundle stays as it was. Only folders that
rsi-deploy wrote are replaced: those with a manifest, and sweeps.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.io.atomic import claim_output
from rsi_deploy.io.manifest import read_manifest


def check_target(path: Path, *, force: bool, inputs: Sequence[object] = ()) -> None:
    """Refuse a target that would overwrite something, before any long work starts.

    Args:
        path: output folder.
        force: whether to replace a folder that rsi-deploy wrote.
        inputs: sources of the work; the target must not contain those that are paths.

    Raises:
        UsageError: The target is a file, is not empty and `force` is false or rsi-deploy did not write it, contains an
            input or lies inside one, or cannot be replaced.
    """
    if path.is_file():
        raise UsageError(f"{path} is a file", hint="-o takes a folder")
    if path.is_mount() or path.resolve().parent == path.resolve():
        raise UsageError(f"{path} is a mount point, which cannot be replaced", hint="choose a folder inside it for -o")
    parent = path.resolve().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"cannot write into {existing}", hint="choose another folder for -o")
    if not path.is_dir() or not any(path.iterdir()):
        return
    for source in inputs:
        if isinstance(source, str | Path):
            _check_input(path, source)
    if not is_ours(path):
        raise UsageError(
            f"{path} is not empty, and rsi-deploy did not write it: not even --force replaces it",
            hint=f"choose another folder for -o, or delete {path} yourself",
        )
    if not force:
        raise UsageError(f"{path} is not empty", hint="choose another folder, or add --force to replace it")


def is_ours(folder: Path) -> bool:
    """Return whether rsi-deploy wrote the folder: it has a manifest, or is a sweep."""
    try:
        return read_manifest(folder) is not None or is_sweep(folder)
    except (GateError, UsageError):  # a file of the same name with another content
        return False


def is_sweep(folder: Path) -> bool:
    """Return whether the folder holds a sweep, finished or interrupted at any moment."""
    document, work = folder / "sweep.json", folder / "work"
    if document.is_file():
        return b'"tool": "rsi-deploy' in document.read_bytes()
    if not work.is_dir():
        return False
    is_empty = all(path.name.startswith(".") for path in (*folder.iterdir(), *work.iterdir()) if path != work)
    return is_empty or (work / "key.txt").is_file()


def _check_input(path: Path, source: str | Path) -> None:
    """Refuse a target that contains an input or lies inside one, also through links."""
    name = str(source).partition("#")[0]  # a data path may end with "#COLUMNS"
    if not name or not os.path.exists(name):
        return
    target, resolved = path.resolve(), Path(name).resolve()
    if resolved.is_relative_to(target) or (resolved.is_dir() and target.is_relative_to(resolved)):
        raise UsageError(
            f"{path} contains {source}, which is an input: --force would remove it", hint="choose another folder for -o"
        )


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool = False, inputs: Sequence[object] = ()) -> Iterator[Path]:
    """Yield a working folder that is renamed to `path` when the block succeeds and removed when it fails.

    Args:
        path: output folder.
        force: whether to replace a folder that rsi-deploy wrote.
        inputs: as for `check_target`.

    Raises:
        UsageError: `check_target` refuses the folder, now or at the end of the block; or another run is writing it.
    """
    check_target(path, force=force, inputs=inputs)
    with claim_output(path) as claim:
        check_target(path, force=force)  # a folder that a killed run set aside is back now
        claim.new.mkdir()
        yield claim.new
        check_target(path, force=force)
        claim.deliver()


def finished_results_folder(work: Path) -> Path:
    """Return the folder of finished results that survive a killed run, for a working folder of `atomic_folder`."""
    return work.parent / "kept"
