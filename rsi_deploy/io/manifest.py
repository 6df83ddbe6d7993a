"""The manifest of a folder: size and sha256 of every file, to detect changes.

    DIR/manifest.json    {"schema_version": 1, "files": {"model.onnx": {"bytes": 123, "sha256": "..."}, ...}}

`write_manifest` is the last step of writing a folder, `check_manifest` the first step of serving its model. Names are
POSIX paths relative to the folder. The manifest detects accidents (an incomplete copy, an edited or forgotten file),
not an attacker who can also write the manifest. It lists neither itself nor the `.pyc` files in `__pycache__`. This
module needs neither torch nor onnxruntime.
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
"""Longest name of a file or folder that file systems accept."""
THREADS = min(4, os.cpu_count() or 1)
_NO_MANIFEST = "no manifest.json: it was written before bundles had one; export (or package) again to get one"


def check_inner_name(name: str) -> str:
    """Return the name if it is a normalized relative path that stays within the folder.

    Raises:
        ValueError: It is another path.
    """
    path = PurePosixPath(name)
    if "\0" in name or any(len(part.encode()) > NAME_BYTES for part in path.parts):
        raise ValueError(
            f"a file's name must have at most {NAME_BYTES} bytes, none of them zero, but got {name[:40]!r}..."
        )
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in (".", MANIFEST):
        raise ValueError(f"a file's name must be its path within the folder, but got {name!r}")
    return name


class FileRecord(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One file: its size in bytes and its sha256 in hexadecimal."""

    bytes: pydantic.NonNegativeInt
    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


class Manifest(pydantic.BaseModel, frozen=True, extra="forbid"):
    """All files of a folder except the manifest itself."""

    schema_version: Literal[1] = 1
    files: dict[Annotated[str, pydantic.AfterValidator(check_inner_name)], FileRecord]


class ManifestCheck(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Differences between a folder and its manifest.

    Attributes:
        present: whether the folder has a manifest; without one nothing is checked.
        files: number of files in the manifest.
        changed: listed files whose size or content differs.
        missing: listed files that do not exist.
        foreign: files that exist but are not listed.
    """

    present: bool
    files: int = 0
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether nothing contradicts the manifest; also true without a manifest (see `present`)."""
        return not (self.changed or self.missing or self.foreign)

    @property
    def summary(self) -> str:
        """The result in one line, with the names of the files."""
        if not self.present:
            return _NO_MANIFEST
        named = {"changed": self.changed, "missing": self.missing, "not in the manifest": self.foreign}
        found = [f"{what}: {', '.join(names)}" for what, names in named.items() if names]
        return "; ".join(found) or f"size and sha256 of {self.files} files as listed"


def write_manifest(folder: str | Path) -> Manifest:
    """Write `folder/manifest.json` for all files in the folder and its subfolders.

    Raises:
        UsageError: The folder contains a link, whose target may change independently.
    """
    folder = Path(folder)
    names = _names(folder)
    if links := [name for name in names if (folder / name).is_symlink()]:
        raise UsageError(f"{folder}: {', '.join(links)}: a manifest cannot list links", hint="copy the files instead")
    manifest = Manifest(files={name: _record(folder / name) for name in names})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")
    return manifest


def read_manifest(folder: str | Path) -> Manifest | None:
    """Read the manifest of the folder; None if there is none.

    Raises:
        GateError: The manifest is damaged or has another version.
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
            f"{path} is not a manifest of schema version 1: {where}: {first['msg']}", hint="get the folder again"
        ) from error


def check_manifest(folder: str | Path, hash_of: Callable[[Path], str] | None = None) -> ManifestCheck:
    """Compare every file of the folder with its manifest, sizes first.

    Args:
        folder: folder, with or without a manifest.
        hash_of: function that returns the sha256 of a file, called from several threads; None reads each file.

    Raises:
        GateError: The manifest cannot be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return ManifestCheck(present=False)
    present = _names(folder)
    files = [name for name in manifest.files if (folder / name).is_file()]

    def is_same(name: str) -> bool:
        record = manifest.files[name]
        return (folder / name).stat().st_size == record.bytes and (hash_of or file_hash)(folder / name) == record.sha256

    with ThreadPoolExecutor(THREADS) as pool:  # hashing releases the GIL
        same = list(pool.map(is_same, files))
    return ManifestCheck(
        present=True,
        files=len(manifest.files),
        changed=tuple(name for name, is_as_listed in zip(files, same, strict=True) if not is_as_listed),
        missing=tuple(sorted(manifest.files.keys() - files)),
        foreign=tuple(name for name in present if name not in manifest.files),
    )


def file_hash(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(source: object) -> str:
    """Return a hash that changes when data change: sha256 of a file, or of a folder's names, sizes and times.

    Args:
        source: path, optionally followed by `#` and a choice of columns. For anything else the result is "".
    """
    name = str(source).partition("#")[0] if isinstance(source, str | Path) else ""
    if os.path.isfile(name):
        return file_hash(Path(name))
    if not os.path.isdir(name):
        return ""
    files = [Path(here, file) for here, _, names in os.walk(name) for file in names]
    return stat_hash(sorted(files))


def stat_hash(files: Iterable[Path]) -> str:
    """Return the sha256 of the names, sizes and modification times of files."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _record(path: Path) -> FileRecord:
    return FileRecord(bytes=path.stat().st_size, sha256=file_hash(path))


def _names(folder: Path) -> list[str]:
    """List every file and link in the folder, except the manifest and Python's caches; sorted."""
    found = []
    for here, folders, files in os.walk(folder):
        files = [name for name in files if not (Path(here).name == "__pycache__" and name.endswith(".pyc"))]
        links = [name for name in folders if (Path(here) / name).is_symlink()]
        found += [(Path(here) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(name for name in found if name != MANIFEST)
