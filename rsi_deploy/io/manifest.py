"""The manifest of a folder: sha256 and size of every file in it, so that whoever gets the folder sees what changed.

    DIR/manifest.json    {"schema_version": 1, "files": {"model.onnx": {"bytes": 123, "sha256": "..."}, ...}}

`write_manifest` is the last thing done to a folder, `check_manifest` the first thing done before its model is served.
Names are POSIX paths within the folder; the manifest itself is not in it. It protects from accidents (a copy cut off, a
file edited or forgotten), not from somebody who can write the manifest as well. What Python leaves in `__pycache__`
beside a module that it ran is passed over. No torch, no onnxruntime here.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import pydantic

from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.io.documents import read_document

MANIFEST = "manifest.json"
NAME_BYTES = 255
"""That a file system takes as one name."""
THREADS = min(4, os.cpu_count() or 1)
OLDER = "no manifest.json: it was written before bundles had one; export (or package) again to get one"


def inside(name: str) -> str:
    """The name, where it stays within the folder.

    Raises:
        ValueError: it leaves the folder, or is not written as such a path is.
    """
    path = PurePosixPath(name)
    if "\0" in name or any(len(part.encode()) > NAME_BYTES for part in path.parts):
        raise ValueError(f"a file's name has up to {NAME_BYTES} bytes and no zero among them, but got {name[:40]!r}...")
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in (".", MANIFEST):
        raise ValueError(f"a file's name must be its path within the folder, but got {name!r}")
    return name


class FileRecord(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One file: its size in bytes and its sha256 in hexadecimal."""

    bytes: pydantic.NonNegativeInt
    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


class Manifest(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The document: every file of the folder but itself."""

    schema_version: Literal[1] = 1
    files: dict[Annotated[str, pydantic.AfterValidator(inside)], FileRecord]


class ManifestCheck(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What a folder is beside its manifest.

    Attributes:
        present: whether there is a manifest at all; without one nothing could be checked.
        files: how many files it lists.
        changed: listed files with another size or content.
        missing: listed files that are not there.
        foreign: files that are there and not listed.
    """

    present: bool
    files: int = 0
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing contradicts the manifest; also true of a folder without one (look at `present`)."""
        return not (self.changed or self.missing or self.foreign)

    @property
    def summary(self) -> str:
        """What was found, in one line that names the files."""
        if not self.present:
            return OLDER
        named = {"changed": self.changed, "missing": self.missing, "not in the manifest": self.foreign}
        found = [f"{what}: {', '.join(names)}" for what, names in named.items() if names]
        return "; ".join(found) or f"size and sha256 of {self.files} files as listed"


def write_manifest(folder: str | Path) -> Manifest:
    """Write `folder/manifest.json` over every file that is in the folder now, subfolders too.

    Raises:
        UsageError: a link: what it points to may change without the folder.
    """
    folder = Path(folder)
    names = _names(folder)
    if links := [name for name in names if (folder / name).is_symlink()]:
        raise UsageError(
            f"{folder}: {', '.join(links)}: a link has no content of its own to list; copy the file instead"
        )
    manifest = Manifest(files={name: _record(folder / name) for name in names})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")
    return manifest


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of the folder; None where there is none.

    Raises:
        GateError: one that cannot be read: it is damaged, or of another version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(read_document(path))
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise GateError(
            f"{path} is not a manifest of schema version 1: {where}: {first['msg']}; get the folder again"
        ) from error


def check_manifest(folder: str | Path, hash_of: Callable[[Path], str] | None = None) -> ManifestCheck:
    """Hold every file of the folder against its manifest; sizes first, so that a short file is found without reading.

    Args:
        folder: with a manifest or without one.
        hash_of: the sha256 of a file, called from several threads; None reads each file.

    Returns:
        what is changed, missing or foreign, by name; `present` is false where the folder has no manifest.

    Raises:
        GateError: a manifest that cannot be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return ManifestCheck(present=False)
    there = _names(folder)
    files = [name for name in manifest.files if (folder / name).is_file()]

    def is_same(name: str) -> bool:
        record = manifest.files[name]
        return (folder / name).stat().st_size == record.bytes and (hash_of or file_hash)(folder / name) == record.sha256

    with ThreadPoolExecutor(THREADS) as pool:  # hashing lets go of the interpreter's lock
        same = list(pool.map(is_same, files))
    return ManifestCheck(
        present=True,
        files=len(manifest.files),
        changed=tuple(name for name, is_as_listed in zip(files, same, strict=True) if not is_as_listed),
        missing=tuple(sorted(manifest.files.keys() - files)),
        foreign=tuple(name for name in there if name not in manifest.files),
    )


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(source: object) -> str:
    """What tells whether data are still the same: sha256 of a file, or of a folder's names, sizes and times.

    Args:
        source: a path, perhaps with a choice behind a `#`; "" is told of anything else, as of a function.
    """
    name = str(source).partition("#")[0] if isinstance(source, str | Path) else ""
    if os.path.isfile(name):
        return file_hash(Path(name))
    if not os.path.isdir(name):
        return ""
    files = [Path(here, file) for here, _, names in os.walk(name) for file in names]
    return stamps(sorted(files))


def stamps(files: Iterable[Path]) -> str:
    """What tells that none of these files was changed: sha256 of their names, sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        told = file.stat()
        digest.update(f"{file.resolve()}\0{told.st_size}\0{told.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _record(path: Path) -> FileRecord:
    return FileRecord(bytes=path.stat().st_size, sha256=file_hash(path))


def _names(folder: Path) -> list[str]:
    """Every file in the folder, and every link, but the manifest and Python's own leavings; sorted."""
    found = []
    for here, folders, files in os.walk(folder):
        files = [name for name in files if not (Path(here).name == "__pycache__" and name.endswith(".pyc"))]
        links = [name for name in folders if (Path(here) / name).is_symlink()]
        found += [(Path(here) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(name for name in found if name != MANIFEST)
